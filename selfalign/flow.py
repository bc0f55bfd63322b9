"""Paths from data to noise, their velocities and scores, the loss of a velocity, and p(t) (Eq. 1 and 2).

Everywhere in this package t = 0 is data and **t = 1 is pure noise**.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from selfalign.sections import FlowConfig


@dataclass(frozen=True)
class Path:
    """x_t = alpha(t)·x0 + sigma(t)·noise, with the derivatives of both coefficients.

    Every function maps a tensor of timesteps to a tensor of the same shape.
    """

    alpha: Callable[[Tensor], Tensor]
    sigma: Callable[[Tensor], Tensor]
    alpha_derivative: Callable[[Tensor], Tensor]
    sigma_derivative: Callable[[Tensor], Tensor]

    def interpolate(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t (Eq. 1). `t` broadcasts against `x0` and `noise`."""
        return self.alpha(t) * x0 + self.sigma(t) * noise

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """d x_t / d t, the regression target of Eq. 2. `t` broadcasts against `x0`."""
        return self.alpha_derivative(t) * x0 + self.sigma_derivative(t) * noise

    def score(self, velocity: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """∇ log p_t(x_t) from the velocity (SiT, Eq. 9), for t > 0. `t` broadcasts against `xt`."""
        alpha, sigma = self.alpha(t), self.sigma(t)
        ratio = alpha / self.alpha_derivative(t)
        variance = sigma**2 - ratio * self.sigma_derivative(t) * sigma
        return (ratio * velocity - xt) / variance


PATHS: dict[str, Path] = {
    "linear": Path(
        alpha=lambda t: 1 - t,
        sigma=lambda t: t,
        alpha_derivative=lambda t: -torch.ones_like(t),
        sigma_derivative=torch.ones_like,
    ),
    "cosine": Path(
        alpha=lambda t: torch.cos(t * math.pi / 2),
        sigma=lambda t: torch.sin(t * math.pi / 2),
        alpha_derivative=lambda t: -math.pi / 2 * torch.sin(t * math.pi / 2),
        sigma_derivative=lambda t: math.pi / 2 * torch.cos(t * math.pi / 2),
    ),
}
"""The paths by name. `linear`: x_t = (1-t)·x0 + t·noise, with velocity noise - x0."""


def velocity_error(
    velocity: Float[Tensor, "B N P"], target: Float[Tensor, "B N P"]
) -> Float[Tensor, "B"]:
    """L_gen of every sample: the mean over tokens and channels of the squared error (Eq. 2)."""
    return (velocity - target).square().mean(dim=(1, 2))


@dataclass(frozen=True)
class TimestepDistribution:
    """p(t) for the samples of one batch: called, it draws one for each, anew every time."""

    flow: FlowConfig
    count: int
    """Samples B of the batch."""
    generator: torch.Generator

    def __call__(self) -> Float[Tensor, "B"]:
        """Independent draws from p(t)."""
        return sample_timesteps(self.flow, self.count, self.generator)

    def uniform(self) -> Float[Tensor, "B"]:
        """Independent draws from [0, 1), whatever p(t) is."""
        return torch.rand(self.count, generator=self.generator, device=self.generator.device)

    def quantile(self, levels: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """The timesteps below which p(t) has these shares of its mass."""
        if self.flow.timestep_distribution == "uniform":
            return levels
        normal = torch.special.ndtri(levels)
        return torch.sigmoid(self.flow.logit_mean + self.flow.logit_std * normal)


def sample_timesteps(
    flow: FlowConfig, count: int, generator: torch.Generator
) -> Float[Tensor, "count"]:
    """Draw timesteps from p(t), on the generator's device."""
    device = generator.device
    if flow.timestep_distribution == "uniform":
        return torch.rand(count, generator=generator, device=device)
    normal = torch.randn(count, generator=generator, device=device)
    return torch.sigmoid(flow.logit_mean + flow.logit_std * normal)
