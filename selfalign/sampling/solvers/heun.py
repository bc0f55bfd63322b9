"""Heun's method for the ODE."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.parts import register
from selfalign.sampling.solvers import StepVelocity
from selfalign.sampling.solvers.euler import Euler

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from selfalign.flow import Path


@register("heun")
@dataclass(frozen=True)
class Heun(Euler):
    """Euler's steps, each but the last corrected with the velocity at its end (second order)."""

    def evaluations(self, steps: int) -> list[tuple[float, int]]:
        """Two per step, one in the last."""
        starts = self.times(steps)[:-1]
        return [(t, 2 if step < steps - 1 else 1) for step, t in enumerate(starts)]

    def solve(
        self,
        velocity: StepVelocity,
        noise: Float[Tensor, "B C *sides"],
        steps: int,
        path: Path,
        step_noise: Callable[[int], Float[Tensor, "B C *sides"]],
    ) -> Float[Tensor, "B C *sides"]:
        """Second order; the correction follows the step's own decision on guidance."""
        x = noise
        for step, (t, t_next) in enumerate(itertools.pairwise(self.times(steps))):
            of_step = velocity.at(step, t)
            slope = of_step(x, t)
            if step < steps - 1:
                ahead = x + (t_next - t) * slope
                slope = 0.5 * slope + 0.5 * of_step(ahead, t_next)
            x = x + (t_next - t) * slope
        return x
