"""A second velocity head at an early block, from which sampling can be guided (arXiv:2512.24176)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from selfalign.backbones import find_tap
from selfalign.parts import register
from selfalign.terms import Term, over_values

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn

    from selfalign.config import ResolvedConfig, RunConfig
    from selfalign.network import Backbone, Tap
    from selfalign.objective import Pass


@register("early-velocity")
@dataclass(frozen=True)
class EarlyVelocity(Term):
    """Squared error of the velocity that a head predicts from an early block (internal guidance)."""

    weight: float = 0.5
    """Weight lambda; the released code's is 0.5."""
    block: int | float | str = 0.3
    """Block of the head: its number from 1, a share of the depth, or a module's name; theirs is 8 of 28."""

    def check_in(self, config: Any) -> None:
        """The block must be there."""
        self.tap(config)

    def tap(self, config: RunConfig) -> Tap:
        """Where the head hangs."""
        return find_tap(self.block, config.depth, self.dotted("block"))

    def head_names(self, config: ResolvedConfig) -> tuple[str, ...]:
        """The released name."""
        from selfalign.network import EARLY_VELOCITY

        return (EARLY_VELOCITY,)

    def heads(
        self, config: ResolvedConfig, backbone: Backbone
    ) -> Mapping[str, tuple[Tap, nn.Module]]:
        """Another of the backbone's last layers."""
        (name,) = self.head_names(config)
        return {name: (self.tap(config), backbone.velocity_head())}

    def __call__(self, forward: Pass) -> Float[Tensor, B]:
        """The same target as denoising has, per sample."""
        (name,) = self.head_names(forward.config)
        views, velocity = forward.views, forward.output.projected[name]
        return over_values(views.groups, (), views.there, velocity, views.target)
