"""The alignment loss: a block's projected features against a target's (Eq. 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from selfalign.backbones import find_tap
from selfalign.parts import chosen, register
from selfalign.terms import Term

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn

    from selfalign.config import ResolvedConfig, RunConfig
    from selfalign.network import Backbone, Tap
    from selfalign.objective import Pass

HEAD = "ap_head"
"""The released name of the student's head."""


def distance(
    name: str, student: Float[Tensor, "B N D"], target: Float[Tensor, "B N D"]
) -> Float[Tensor, ""]:
    """A distance d of Eq. 3 between features, averaged.

    `cosine` is Eq. 3: over D, then the mean over tokens. `cosine-over-tokens` runs over the N tokens of
    each channel, which is what the released SRA, DTS and AS code computes.
    """
    from torch.nn import functional

    if name == "cosine":
        return 1 - functional.cosine_similarity(student, target, dim=2).mean()
    if name == "cosine-over-tokens":
        return 1 - functional.cosine_similarity(student, target, dim=1).mean()
    if name == "smooth-l1":
        return functional.smooth_l1_loss(student, target, beta=0.05)
    return {"l1": functional.l1_loss, "l2": functional.mse_loss}[name](student, target)


@register("alignment")
@dataclass(frozen=True)
class Alignment(Term):
    """L_align: the student's block m, through a head, against a target."""

    head_names = (HEAD,)

    weight: float = 0.5
    """Weight lambda of the alignment loss (Eq. 4)."""
    target: str = chosen("target", "none", none="none")
    """What the student's features are aligned with; none: nothing, and the term is off."""
    distance: Literal["cosine", "cosine-over-tokens", "smooth-l1", "l1", "l2"] = "cosine"
    """Distance of Eq. 3; cosine-over-tokens is what the released SRA code computes."""
    block: int | float | str = 0.3
    """Student block m: its number from 1, a share of the depth, or a module's name."""

    def is_used(self, config: RunConfig) -> bool:
        """With a target."""
        return self.target != "none"

    def check_in(self, config: Any) -> None:
        """The block must be there."""
        self.tap(config)

    def tap(self, config: RunConfig) -> Tap:
        """Where the student's features are taken."""
        return find_tap(self.block, config.depth, self.dotted("block"))

    def target_names(self) -> tuple[str, ...]:
        """The chosen one."""
        return (self.target,)

    def heads(
        self, config: ResolvedConfig, backbone: Backbone
    ) -> Mapping[str, tuple[Tap, nn.Module]]:
        """SRA's head."""
        from selfalign.heads import ProjectionHead

        return {HEAD: (self.tap(config), ProjectionHead(backbone.hidden_size))}

    def __call__(self, forward: Pass) -> Float[Tensor, ""]:
        """The distance, averaged over tokens."""
        return distance(self.distance, forward.output.projected[HEAD], forward.targets[self.target])
