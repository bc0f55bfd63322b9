"""The alignment loss: a block's projected features against a target's (Eq. 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from selfalign.backbones import find_tap
from selfalign.parts import Part, chosen, register
from selfalign.terms import Term, check_group_weights, over_groups

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor, nn

    from selfalign.config import ResolvedConfig, RunConfig
    from selfalign.network import Backbone, Tap
    from selfalign.objective import Pass

HEAD = "ap_head"
"""The released name of SRA's head."""
PROJECTORS = "projectors"
"""The released name of REPA's heads, one per encoder."""
SPREAD = 1e-6
"""Added to the deviations that features are divided by, as iREPA does."""


def distance(
    name: str, student: Float[Tensor, "B N D"], target: Float[Tensor, "B N D"]
) -> Float[Tensor, ""]:
    """A distance d of Eq. 3 between features, averaged.

    `cosine` is Eq. 3: over D, then the mean over tokens. `cosine-over-tokens` runs over the N tokens of
    each channel, which is what the released SRA, DTS and AS code computes. Features in half precision
    are compared in float32: the square of a norm is beyond float16.
    """
    from torch.nn import functional

    student, target = _precise(student), _precise(target)
    if name == "cosine":
        return 1 - functional.cosine_similarity(student, target, dim=2).mean()
    if name == "cosine-over-tokens":
        return 1 - functional.cosine_similarity(student, target, dim=1).mean()
    if name == "smooth-l1":
        return functional.smooth_l1_loss(student, target, beta=0.05)
    return {"l1": functional.l1_loss, "l2": functional.mse_loss}[name](student, target)


def normalised(
    kind: str, features: Float[Tensor, "B N Z"], present: Bool[Tensor, "B N"] | None = None
) -> Float[Tensor, "B N Z"]:
    """A target's features with their mean over tokens and, `zscore`, their deviation taken out.

    `zscore` is iREPA's: (z - mean) / (unbiased deviation + 1e-6), per sample and feature; `none` leaves
    them as they are.

    Args:
        kind: `none` or `zscore`.
        features: in group order.
        present: which tokens are there and count; None: all.
    """
    if kind == "none":
        return features
    features = _precise(features)
    if present is None:
        centred = features - features.mean(dim=1, keepdim=True)
        return centred / (features.std(dim=1, keepdim=True) + SPREAD)
    there = present[..., None]
    count = there.sum(dim=1, keepdim=True)
    mean = features.masked_fill(~there, 0).sum(dim=1, keepdim=True) / count.clamp(min=1)
    centred = (features - mean).masked_fill(~there, 0)
    variance = centred.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
    return centred / (variance.sqrt() + SPREAD)


def _precise(features: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
    """In float32 at least."""
    import torch

    return features.to(torch.promote_types(features.dtype, torch.float32))


@register("alignment")
@dataclass(frozen=True)
class Alignment(Term):
    """L_align: the student's block m, through a head, against a target."""

    weight: float = 0.5
    """Weight lambda of the alignment loss (Eq. 4)."""
    target: str = chosen("target", "none", none="none")
    """What the student's features are aligned with; none: nothing, and the term is off."""
    distance: Literal["cosine", "cosine-over-tokens", "smooth-l1", "l1", "l2"] = "cosine"
    """Distance of Eq. 3; cosine-over-tokens is what the released SRA code computes."""
    block: int | float | str = 0.3
    """Student block m: its number from 1, a share of the depth, or a module's name."""
    projector: str = chosen("projector", "sra", none="none")
    """What turns the student's features into the target's; none compares them as they are."""
    spatial_norm: Literal["none", "zscore"] = "none"
    """What is done to the target's features over the tokens of a sample; zscore is iREPA's."""
    group_weights: tuple[float, ...] = ()
    """Weight of a token in each group; 0: the group is not aligned. Left out: all the same."""

    def is_used(self, config: RunConfig) -> bool:
        """With a target."""
        return self.target != "none"

    def check_in(self, config: Any) -> None:
        """The block must be there, and a weight per group."""
        self.tap(config)
        self.require(
            not (config.padded and self.distance == "cosine-over-tokens"),
            "distance",
            "it runs over all tokens, and samples are of unequal lengths; allowed are the others",
        )
        check_group_weights(self, self.group_weights, config)

    def tap(self, config: RunConfig) -> Tap:
        """Where the student's features are taken."""
        return find_tap(self.block, config.depth, self.dotted("block"))

    def uses(self, config: Any) -> tuple[Part, ...]:
        """The projector."""
        return () if self.projector == "none" else (config.projectors[self.projector],)

    def target_names(self) -> tuple[str, ...]:
        """The chosen one."""
        return (self.target,)

    def taps(self, config: ResolvedConfig) -> tuple[Tap, ...]:
        """The block, where its features are compared as they are."""
        return (self.tap(config),) if self.projector == "none" else ()

    def head_names(self, config: ResolvedConfig) -> tuple[str, ...]:
        """One per part of the target, under the names that SRA and REPA gave them."""
        parts = len(config.targets[self.target].part_widths(config))
        if self.projector == "none":
            return ()
        if self.projector == "sra" and parts == 1:
            return (HEAD,)
        return tuple(f"{PROJECTORS}.{part}" for part in range(parts))

    def heads(
        self, config: ResolvedConfig, backbone: Backbone
    ) -> Mapping[str, tuple[Tap, nn.Module]]:
        """A projector for each part of the target."""
        width = backbone.hidden_size
        widths = [part or width for part in config.targets[self.target].part_widths(config)]
        if self.projector == "none":
            self.require(
                widths == [width],
                "projector",
                f"the student has {width} features and {self.target} {' and '.join(map(str, widths))}; "
                f"allowed is one of {', '.join(config.projectors)}",
            )
            return {}
        projector, tap = config.projectors[self.projector], self.tap(config)
        names = self.head_names(config)
        return {
            name: (tap, projector.build(width, part, config.grid))
            for name, part in zip(names, widths, strict=True)
        }

    def __call__(self, forward: Pass) -> Float[Tensor, ""]:
        """The distance, averaged over the tokens that the student sees and over the target's parts."""
        config, output = forward.config, forward.output
        own = (HEAD, f"{PROJECTORS}.")
        students = [made for name, made in output.projected.items() if name.startswith(own)]
        students = students or [output.features[self.tap(config)]]
        groups, target = forward.views.groups, forward.targets[self.target]
        present = None if groups.present is None else groups.present[:, : target.shape[1]]
        target = normalised(self.spatial_norm, target, present)
        target = target[:, : students[0].shape[1]]  # hidden tokens come last
        targets = target.split([student.shape[2] for student in students], dim=2)
        between = partial(distance, self.distance)
        distances = [
            over_groups(between, groups, self.group_weights, *pair)
            for pair in zip(students, targets, strict=True)
        ]
        return sum(distances[1:], start=distances[0]) / len(distances)
