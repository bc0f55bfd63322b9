"""Dispersive loss: features of different samples repel each other (arXiv:2506.09027)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from selfalign.backbones import find_tap
from selfalign.parts import register
from selfalign.terms import Term

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from selfalign.config import ResolvedConfig, RunConfig
    from selfalign.network import Tap
    from selfalign.objective import Pass


@register("dispersive")
@dataclass(frozen=True)
class Dispersive(Term):
    """log mean exp(-distance / temperature) over all pairs of a batch; needs no target and no head."""

    weight: float = 0.5
    """Weight lambda; the paper's is 0.5."""
    block: int | float | str = 0.25
    """Block whose features disperse: its number from 1, a share of the depth, or a module's name."""
    temperature: float = 0.5
    """tau: the distance at which repulsion falls to 1/e."""

    def check(self) -> None:
        """Limits of the numbers."""
        super().check()
        self.require_number("temperature", 1e-6, 1e6, "a number above 0")

    def check_in(self, config: Any) -> None:
        """The block must be there, and another sample, compared place by place."""
        self.tap(config)
        config.views.require_all_tokens(self)
        self.require_pairs(config)

    def tap(self, config: RunConfig) -> Tap:
        """Whose features disperse."""
        return find_tap(self.block, config.depth, self.dotted("block"))

    def taps(self, config: ResolvedConfig) -> tuple[Tap, ...]:
        """The block."""
        return (self.tap(config),)

    def __call__(self, forward: Pass) -> Float[Tensor, ""]:
        """The InfoNCE-like form with squared distances, in float32.

        Distances are between flattened features and divided by their number, as in the released code;
        the pairs of a sample with itself count, at distance 0. Tokens are compared in image order; of
        samples of unequal lengths over the places that both have.
        """
        from selfalign.precision import full_precision

        features, groups = forward.output.features[self.tap(forward.config)], forward.views.groups
        z = groups.restore(features).float()
        with full_precision(z.device):
            if groups.present is None:
                flat = z.flatten(1)
                squares = flat.square().sum(dim=1)
                distance = squares[:, None] + squares - 2 * flat @ flat.t()
                scaled = distance.clamp(min=0) / (flat.shape[1] * self.temperature)
            else:
                there = groups.restore(groups.present[..., None].to(z))
                flat, place = (z * there).flatten(1), there[..., 0]
                squares = (z * there).square().sum(dim=2) @ place.t()
                distance = squares + squares.t() - 2 * flat @ flat.t()
                count = (place @ place.t()) * z.shape[2]
                scaled = distance.clamp(min=0) / (count * self.temperature)
        return scaled.neg().exp().mean().log()
