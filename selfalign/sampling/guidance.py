"""Classifier-free guidance within an interval of t, at the cost of one pass outside it."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfalign.errors import UserError
from selfalign.models.sit import SiT
from selfalign.views import TokenGroups

Velocity = Callable[[Tensor, float], Tensor]
"""Maps a state (B, C, H, W) and a timestep to dx/dt, in the state's dtype."""


@dataclass(frozen=True)
class Guidance:
    """v = v_null + scale·(v_label - v_null) where low <= t <= high; a scale of 1 is off."""

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise UserError(f"guidance interval is {low} {high}: allowed are 0 <= low <= high <= 1")
        if not 1 <= self.scale < math.inf:
            raise UserError(f"guidance scale is {self.scale}: allowed is 1 (off) or more")

    def applies(self, t: float) -> bool:
        """Whether a step that starts at t is guided."""
        return self.scale > 1 and self.interval[0] <= t <= self.interval[1]


@dataclass(frozen=True)
class GuidedModel:
    """A model with labels and guidance: a velocity for each solver step.

    Args:
        model: the network; it runs in its own parameters' dtype.
        labels: one class per sample.
        null_label: the label of the unguided direction.
        guidance: where and how strongly to guide.
        groups: token groups by step, which separate attention in sampling; None for whole images.
    """

    model: SiT
    labels: Int[Tensor, "B"]
    null_label: int
    guidance: Guidance
    groups: Callable[[int], TokenGroups] | None = None

    def at(self, step: int, t_start: float) -> Velocity:
        """The velocity during one step. All its evaluations follow the decision at `t_start`."""
        groups = self.groups(step) if self.groups else None
        if not self.guidance.applies(t_start):
            return lambda x, t: self._evaluate(x, t, self.labels, groups)
        labels = torch.cat([self.labels, torch.full_like(self.labels, self.null_label)])
        if groups is not None and groups.order is not None:
            doubled = torch.cat([groups.order, groups.order])
            groups = TokenGroups(doubled, groups.sizes, separate=groups.separate)

        def velocity(x: Tensor, t: float) -> Tensor:
            both = self._evaluate(torch.cat([x, x]), t, labels, groups)
            conditional, unconditional = both.chunk(2)
            return unconditional + self.guidance.scale * (conditional - unconditional)

        return velocity

    def _evaluate(
        self, x: Float[Tensor, "B C H W"], t: float, labels: Tensor, groups: TokenGroups | None
    ) -> Float[Tensor, "B C H W"]:
        dtype = self.model.x_embedder.proj.weight.dtype
        timesteps = torch.full((len(x),), t, dtype=dtype, device=x.device)
        return self.model.velocity(x.to(dtype), timesteps, labels, groups).to(x.dtype)
