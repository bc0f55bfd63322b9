"""Heun's method for the ODE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.parts import register
from selfalign.sampling.solvers import Solver, Velocity

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from selfalign.flow import Path


@register("heun")
@dataclass(frozen=True)
class Heun(Solver):
    """Euler's steps, each but the last corrected with the velocity at its end (second order)."""

    def evaluations(self, steps: int) -> list[tuple[float, int]]:
        """Two per step, one in the last."""
        starts = self.times(steps)[:-1]
        return [(t, 2 if step < steps - 1 else 1) for step, t in enumerate(starts)]

    def step(
        self,
        velocity: Velocity,
        x: Float[Tensor, "B C *sides"],
        t: float,
        t_next: float,
        path: Path,
        draw_noise: Callable[[], Float[Tensor, "B C *sides"]],
    ) -> Float[Tensor, "B C *sides"]:
        """Second order; the last step is Euler's, since a velocity at t = 0 is not asked for."""
        slope = velocity(x, t)
        if t_next > 0:
            ahead = x + (t_next - t) * slope
            slope = 0.5 * slope + 0.5 * velocity(ahead, t_next)
        return x + (t_next - t) * slope
