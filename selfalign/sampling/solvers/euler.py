"""Euler's method for the ODE."""

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


@register("euler")
@dataclass(frozen=True)
class Euler(Solver):
    """dx/dt = v on equal intervals from t = 1 to 0."""

    def step(
        self,
        velocity: Velocity,
        x: Float[Tensor, "B C *sides"],
        t: float,
        t_next: float,
        path: Path,
        draw_noise: Callable[[], Float[Tensor, "B C *sides"]],
    ) -> Float[Tensor, "B C *sides"]:
        """First order."""
        return x + (t_next - t) * velocity(x, t)
