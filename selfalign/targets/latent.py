"""The clean input itself as target: SRA 2 (arXiv:2601.17830)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.parts import register
from selfalign.targets import Target

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from selfalign.config import ResolvedConfig
    from selfalign.objective import Pass


@register("latent")
@dataclass(frozen=True)
class LatentTarget(Target):
    """The clean patches of what the model sees: a VAE's latents, or pixels. Nothing is run for it."""

    def part_widths(self, config: ResolvedConfig) -> tuple[int | None, ...]:
        """The values of a patch."""
        return (config.grid.patch_positions * config.model.channels,)

    def features(self, forward: Pass) -> Float[Tensor, "B N P"]:
        """Each token's own patch before noise."""
        return forward.views.x0
