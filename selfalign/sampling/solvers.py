"""Solvers from t = 1 (noise) to t = 0 (data): Euler and Heun for the ODE, Euler–Maruyama for the SDE.

The state is kept in float64, as the released samplers keep it, while the model runs in its own dtype.
"""

import itertools
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from selfalign.flow import Path
from selfalign.sampling.guidance import GuidedModel

LAST_SDE_TIME = 0.04
"""Where the SDE's last step starts; that step takes the mean (SiT, REPA)."""


def ode_times(steps: int) -> list[float]:
    """Where the ODE's steps start, and 0: equal intervals."""
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()


def sde_times(steps: int) -> list[float]:
    """Where the SDE's steps start, and 0: equal intervals down to 0.04, then the last step."""
    return [*torch.linspace(1, LAST_SDE_TIME, steps, dtype=torch.float64).tolist(), 0.0]


def _start(noise: Tensor) -> Tensor:
    # MPS has no float64.
    return noise.to(torch.float32 if noise.device.type == "mps" else torch.float64)


@torch.no_grad()
def solve_ode(
    guided: GuidedModel, noise: Float[Tensor, "B C H W"], steps: int, *, heun: bool = False
) -> Float[Tensor, "B C H W"]:
    """Integrate dx/dt = v on `steps` equal intervals from t = 1 to 0.

    Args:
        guided: the model, its labels and its guidance.
        noise: x at t = 1.
        steps: number of intervals.
        heun: correct every step but the last with the velocity at its end (second order).
    """
    x = _start(noise)
    for step, (t, t_next) in enumerate(itertools.pairwise(ode_times(steps))):
        velocity = guided.at(step, t)
        slope = velocity(x, t)
        if heun and step < steps - 1:
            ahead = x + (t_next - t) * slope
            slope = 0.5 * slope + 0.5 * velocity(ahead, t_next)
        x = x + (t_next - t) * slope
    return x


@torch.no_grad()
def solve_sde(
    guided: GuidedModel,
    noise: Float[Tensor, "B C H W"],
    steps: int,
    *,
    path: Path,
    step_noise: Callable[[int], Float[Tensor, "B C H W"]],
) -> Float[Tensor, "B C H W"]:
    """Euler–Maruyama for dx = (v - t·score) dt + sqrt(2t) dw, run backwards in time.

    Times are `steps` points from 1 to 0.04 and then 0; the last step takes the mean.

    Args:
        guided: the model, its labels and its guidance.
        noise: x at t = 1.
        steps: number of steps, the last included.
        path: relates velocity and score.
        step_noise: the standard normal noise of each step but the last.
    """
    x = _start(noise)
    for step, (t, t_next) in enumerate(itertools.pairwise(sde_times(steps))):
        velocity = guided.at(step, t)(x, t)
        score = path.score(velocity, x, torch.tensor(t, dtype=x.dtype, device=x.device))
        x_next = x + (t_next - t) * (velocity - t * score)
        if step < steps - 1:
            x_next = x_next + (2 * t * (t - t_next)) ** 0.5 * step_noise(step).to(x)
        x = x_next
    return x
