"""Euler–Maruyama for the SDE, as SiT and REPA sample."""

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


@register("sde")
@dataclass(frozen=True)
class EulerMaruyama(Solver):
    """dx = (v - t·score) dt + sqrt(2t) dw, run backwards in time; the last step takes the mean."""

    last_step: float = 0.04
    """t where the last step starts (SiT, REPA)."""

    def check(self) -> None:
        """Limits of the numbers."""
        self.require_number("last_step", 1e-6, 1 - 1e-6, "a number above 0 and below 1")

    def times(self, steps: int) -> list[float]:
        """Equal intervals from 1 to where the last step starts, and 0."""
        import torch

        return [*torch.linspace(1, self.last_step, steps, dtype=torch.float64).tolist(), 0.0]

    def step(
        self,
        velocity: Velocity,
        x: Float[Tensor, "B C *sides"],
        t: float,
        t_next: float,
        path: Path,
        draw_noise: Callable[[], Float[Tensor, "B C *sides"]],
    ) -> Float[Tensor, "B C *sides"]:
        """Noise of variance 2t·dt in every step but the last."""
        import torch

        v = velocity(x, t)
        score = path.score(v, x, torch.tensor(t, dtype=x.dtype, device=x.device))
        x_next = x + (t_next - t) * (v - t * score)
        if t_next > 0:
            x_next = x_next + (2 * t * (t - t_next)) ** 0.5 * draw_noise().to(x)
        return x_next
