"""Solvers from t = 1 (noise) to t = 0 (data).

The state is kept in float64, as the released samplers keep it, while the model runs in its own dtype.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from selfalign.parts import Part

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from selfalign.flow import Path

Velocity = Callable[["Tensor", float], "Tensor"]
"""Maps a state (B, C, *sides) and a timestep to dx/dt, in the state's dtype."""


class StepVelocity(Protocol):
    """A velocity for each solver step; guidance is decided by where the step starts."""

    def at(self, step: int, t_start: float) -> Velocity:
        """The velocity of a step that starts at `t_start`."""
        ...


@dataclass(frozen=True)
class Solver(Part):
    """A way from noise to data along a velocity."""

    kind: ClassVar[str] = "solver"

    predicts: ClassVar[str] = "velocity"
    """What it needs a model to predict: velocity, or noise at diffusion steps."""

    def times(self, steps: int) -> list[float]:
        """Where the steps start, and 0: equal intervals by default."""
        import torch

        return torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()

    def evaluations(self, steps: int) -> list[tuple[float, int]] | None:
        """Where each step starts and how often it asks for a velocity; None if that depends on the model."""
        return [(t, 1) for t in self.times(steps)[:-1]]

    def solve(
        self,
        velocity: StepVelocity,
        noise: Float[Tensor, "B C *sides"],
        steps: int,
        path: Path,
        step_noise: Callable[[int], Float[Tensor, "B C *sides"]],
    ) -> Float[Tensor, "B C *sides"]:
        """x at t = 0, one step after the other. Called without gradients.

        Args:
            velocity: of the model, guided or not.
            noise: x at t = 1, in float64 where the device has it.
            steps: number of steps.
            path: relates velocity and score.
            step_noise: standard normal noise of a step, for solvers that add some.
        """
        x = noise
        for number, (t, t_next) in enumerate(itertools.pairwise(self.times(steps))):
            draw = functools.partial(step_noise, number)
            x = self.step(velocity.at(number, t), x, t, t_next, path, draw)
        return x

    def step(
        self,
        velocity: Velocity,
        x: Float[Tensor, "B C *sides"],
        t: float,
        t_next: float,
        path: Path,
        draw_noise: Callable[[], Float[Tensor, "B C *sides"]],
    ) -> Float[Tensor, "B C *sides"]:
        """x at `t_next`. Solvers that choose their steps on the way define `solve` instead.

        Args:
            velocity: of the model in this step.
            x: the state at `t`.
            t: where the step starts.
            t_next: where it ends, below `t`; 0 for the last one.
            path: relates velocity and score.
            draw_noise: standard normal noise of this step.
        """
        raise NotImplementedError
