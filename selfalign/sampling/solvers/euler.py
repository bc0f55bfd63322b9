"""Euler's method for the ODE."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.parts import register
from selfalign.sampling.solvers import Solver, StepVelocity

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from selfalign.flow import Path


@register("euler")
@dataclass(frozen=True)
class Euler(Solver):
    """dx/dt = v on equal intervals from t = 1 to 0."""

    def solve(
        self,
        velocity: StepVelocity,
        noise: Float[Tensor, "B C *sides"],
        steps: int,
        path: Path,
        step_noise: Callable[[int], Float[Tensor, "B C *sides"]],
    ) -> Float[Tensor, "B C *sides"]:
        """First order."""
        x = noise
        for step, (t, t_next) in enumerate(itertools.pairwise(self.times(steps))):
            x = x + (t_next - t) * velocity.at(step, t)(x, t)
        return x
