"""Models and data whose answers are known in closed form."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from selfalign.conditions.label import Label
from selfalign.data.source import DataSource, MemorySplit
from selfalign.network import Backbone, Hidden
from selfalign.randomness import make_generator
from selfalign.tokens import TokenGrid, TokenGroups


class Analytic(Backbone):
    """A backbone whose velocity is a function of (tokens, timesteps of tokens, labels, groups)."""

    def __init__(
        self, grid: TokenGrid, classes: int, function: Callable[..., Tensor], channels: int = 1
    ) -> None:
        super().__init__(grid, channels, Label(), classes)
        self.blocks, self.hidden_size = nn.ModuleList(), 1
        self.anchor = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.function = function

    def transform(
        self,
        tokens: Tensor,
        timesteps: Tensor,
        condition: Any,
        groups: TokenGroups,
        taps: Sequence[int] = (),
        last: int | None = None,
    ) -> Hidden:
        """See `Backbone.transform`."""
        t = groups.broadcast(timesteps[..., None])[..., 0]
        return Hidden(self.function(tokens, t, condition, groups), {}, timesteps[..., None])


def gaussian_posterior(covariance: Tensor) -> Callable[..., Tensor]:
    """E[e - x0 | x_t] of Gaussian images, one value a token, whatever each token's timestep (linear path)."""

    def velocity(tokens: Tensor, t: Tensor, labels: Tensor, groups: TokenGroups) -> Tensor:
        count = tokens.shape[1]
        order = groups.order if groups.order is not None else torch.arange(count)[None]
        sigma = covariance[order[:, :, None], order[:, None, :]]
        if groups.separate:
            member = torch.repeat_interleave(torch.tensor(groups.sizes))
            sigma = sigma * (member[:, None] == member)
        a, b = 1 - t, t
        seen = a[:, :, None] * sigma * a[:, None] + torch.diag_embed(b * b + 1e-12)
        cross = -sigma * a[:, None] + torch.diag_embed(b)
        return cross @ torch.linalg.solve(seen, tokens)

    return velocity


def correlated(side: int, length: float) -> Tensor:
    """Covariance of a stationary Gaussian image of side×side values, by distance over a length."""
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).double()
    return torch.exp(-torch.cdist(places, places) / length)


def gaussian_source(covariance: Tensor, count: int) -> DataSource:
    """Images from N(0, covariance), without classes."""
    side = round(len(covariance) ** 0.5)
    noise = torch.randn(
        count, len(covariance), generator=make_generator(0, "known"), dtype=torch.float64
    )
    images = noise @ torch.linalg.cholesky(covariance).T
    split = MemorySplit(images.reshape(count, 1, side, side), torch.zeros(count, dtype=torch.int64))
    return DataSource(split, split, 1, (side, side), (), "gaussian")


def class_source(means: Tensor, deviation: float, count: int) -> DataSource:
    """Images that are their class's mean, and noise of a deviation."""
    generator = make_generator(0, "classes")
    side = round(means.shape[1] ** 0.5)

    def split(size: int) -> MemorySplit:
        labels = torch.arange(size) % len(means)
        noise = torch.randn(size, means.shape[1], generator=generator, dtype=torch.float64)
        return MemorySplit((means[labels] + deviation * noise).reshape(size, 1, side, side), labels)

    names = tuple(map(str, range(len(means))))
    return DataSource(split(count), split(count), 1, (side, side), names, "classes")


def class_means(means: Tensor, deviation: float) -> Callable[..., Tensor]:
    """The exact velocity for these classes where the label is known; that of one wide Gaussian where not."""
    overall = means.mean(dim=0)
    wide = (means - overall).square().mean() + deviation**2

    def velocity(tokens: Tensor, t: Tensor, labels: Tensor, groups: TokenGroups) -> Tensor:
        known = labels < len(means)
        middle = torch.where(known[:, None], means[labels.clamp(max=len(means) - 1)], overall)
        variance = torch.where(known, deviation**2, wide)[:, None]
        a, b, x = 1 - t, t, tokens[..., 0]
        rest = x - a * middle
        seen = a * a * variance + b * b + 1e-12
        return ((b - a * variance) / seen * rest - middle)[..., None]

    return velocity


def relabelled(source: DataSource, labels: Tensor) -> DataSource:
    """The same images with other training labels."""
    return dataclasses.replace(source, train=dataclasses.replace(source.train, labels=labels))
