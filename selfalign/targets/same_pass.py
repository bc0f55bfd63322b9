"""A later block of the student's own pass as target: LayerSync (arXiv:2510.12581)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from selfalign.backbones import find_tap
from selfalign.parts import register
from selfalign.targets import Target

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from selfalign.config import ResolvedConfig, RunConfig
    from selfalign.network import Tap
    from selfalign.objective import Pass


@register("same-pass")
@dataclass(frozen=True)
class SamePassTarget(Target):
    """Block n of the pass that the student makes anyway, with its gradient stopped; no teacher runs."""

    block: int | float | str = 0.57
    """Block n: its number from 1, a share of the depth, or a module's name; LayerSync's is 16 of 28."""

    def check_in(self, config: Any) -> None:
        """The block must be there, and another than the student's."""
        alignment = config.terms["alignment"]
        same = alignment.target == self.name and alignment.tap(config) == self.tap(config)
        self.require(not same, "block", "this is terms.alignment.block itself; allowed is another")

    def tap(self, config: RunConfig) -> Tap:
        """Where the features are taken."""
        return find_tap(self.block, config.depth, self.dotted("block"))

    def taps(self, config: ResolvedConfig) -> tuple[Tap, ...]:
        """The block."""
        return (self.tap(config),)

    def features(self, forward: Pass) -> Float[Tensor, "B N D"]:
        """sg[h^n], the raw output of block n."""
        return forward.output.features[self.tap(forward.config)].detach()
