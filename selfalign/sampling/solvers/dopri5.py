"""Dormand–Prince's adaptive method for the ODE, by torchdiffeq."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.errors import UserError
from selfalign.parts import register
from selfalign.sampling.solvers import Solver, StepVelocity

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from selfalign.flow import Path


@register("dopri5")
@dataclass(frozen=True)
class Dopri5(Solver):
    """Fifth order with adaptive steps, all samples of a batch together; `steps` has no effect.

    Since a batch shares its steps, samples depend on the batch size to within the tolerances. Guidance in
    an interval is decided at every evaluation.
    """

    rtol: float = 1e-5
    """Relative tolerance of a step."""
    atol: float = 1e-5
    """Absolute tolerance of a step."""

    def check(self) -> None:
        """Limits of the numbers; time is a float32, whose steps end at about 1e-7."""
        for name in ("rtol", "atol"):
            self.require_number(name, 1e-6, 1, "a number from 1e-6 to 1")

    def evaluations(self, steps: int) -> None:
        """As many as the model's velocity takes."""
        return None

    def solve(
        self,
        velocity: StepVelocity,
        noise: Float[Tensor, "B C *sides"],
        steps: int,
        path: Path,
        step_noise: Callable[[int], Float[Tensor, "B C *sides"]],
    ) -> Float[Tensor, "B C *sides"]:
        """From t = 1 to 0, however many steps that takes."""
        try:
            from torchdiffeq import odeint
        except ImportError as error:
            raise UserError(
                "solver is 'dopri5': needs torchdiffeq (pip install 'selfalign[solvers]')"
            ) from error

        def slope(t: Tensor, x: Tensor) -> Tensor:
            now = float(t)
            return velocity.at(0, now)(x, now)

        times = noise.new_tensor([1.0, 0.0])
        return odeint(slope, noise, times, rtol=self.rtol, atol=self.atol, method="dopri5")[-1]
