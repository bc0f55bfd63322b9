"""Partitions: how each sample's tokens are split into groups (Eq. 5 and 6, and beyond)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from selfalign.parts import Part

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float, Int
    from torch import Generator, Tensor

    from selfalign.flow import Path
    from selfalign.network import Backbone, Tap
    from selfalign.randomness import Share
    from selfalign.tokens import TokenGrid, TokenGroups


@dataclass(frozen=True)
class Ungrouped:
    """A batch whose tokens are not in groups yet: all that a partition may look at."""

    grid: TokenGrid
    sizes: tuple[int, ...]
    """Tokens of each group."""
    samples: int
    """Samples B of the batch."""
    generator: Generator
    """The step's, for `uniform` and `integers`."""
    x0: Float[Tensor, "B C *sides"] | None = None
    """The clean samples, NaN beyond the end of those that end early; None where only shapes are known."""
    noise: Float[Tensor, "B C *sides"] | None = None
    """The step's."""
    path: Path | None = None
    """From data to noise."""
    teacher: Backbone | None = None
    """The EMA model; None where there is none, as where a batch is only shown."""
    condition: Any = None
    """Of every sample, for the teacher."""
    share: Share | None = None
    """Which of the samples that a step draws for these are; None: all."""
    padded: bool = False
    """Whether samples are of unequal lengths."""

    @property
    def device(self) -> torch.device:
        """Where the order is made."""
        return self.generator.device

    def uniform(self, *shape: int) -> Float[Tensor, "B ..."]:
        """Random numbers in [0, 1) for every sample."""
        import torch

        return self._drawn(torch.rand, shape)

    def integers(self, below: int, *shape: int) -> Int[Tensor, "B ..."]:
        """Random whole numbers from 0, below another one, for every sample."""
        import torch

        return self._drawn(partial(torch.randint, below), shape)

    def _drawn(self, draw: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        """Numbers for the samples of all shares, of which these keep their own."""
        shares = 1 if self.share is None else self.share.count
        drawn = draw((shares * self.samples, *shape), generator=self.generator, device=self.device)
        return drawn if self.share is None else self.share.own(drawn)

    def teacher_features(self, tap: Tap, timestep: float) -> Float[Tensor, "B N D"] | None:
        """The teacher's features of the whole samples at one timestep, in image order; None without one.

        Of tokens that are not there: the mean of the others.
        """
        import torch

        if self.teacher is None or self.x0 is None:
            return None
        tokens, _, timesteps, groups = self._seen(timestep)
        with torch.no_grad():
            made = self.teacher.features(tokens, timesteps, self.condition, groups, (tap,))
        features = made[tap]
        if groups.present is None:
            return features
        there = groups.present[..., None]
        total = features.masked_fill(~there, 0).sum(dim=1, keepdim=True)
        return torch.where(there, features, total / there.sum(dim=1, keepdim=True))

    def teacher_errors(self, timestep: float) -> Float[Tensor, "B N"] | None:
        """The teacher's squared velocity error of every token (Eq. 2), in image order; None without one.

        Of tokens that are not there: 0.
        """
        import torch

        if self.teacher is None or self.x0 is None:
            return None
        tokens, target, timesteps, groups = self._seen(timestep)
        with torch.no_grad():
            velocity = self.teacher(tokens, timesteps, self.condition, groups).velocity
        errors = (velocity[..., : target.shape[2]] - target).square().mean(dim=2)
        return errors if groups.present is None else errors.masked_fill(~groups.present, 0)

    def _seen(self, timestep: float) -> tuple[Tensor, Tensor, Tensor, TokenGroups]:
        """The noised whole samples, the velocity there, their timestep, and one group."""
        import torch

        from selfalign.tokens import TokenGroups, without_padding

        assert self.x0 is not None and self.noise is not None and self.path is not None
        timesteps = torch.full((self.samples, 1), timestep, device=self.device)
        clean, noise, present = self.grid.patchify(self.x0), self.grid.patchify(self.noise), None
        if self.padded:
            clean, noise, there = without_padding(clean, noise)
            present = there.any(dim=2)
        groups = TokenGroups(None, (self.grid.num_tokens,), present=present)
        t = timesteps[..., None]
        tokens, velocity = (
            made(clean, noise, t) for made in (self.path.interpolate, self.path.velocity)
        )
        return tokens, velocity, timesteps, groups


@dataclass(frozen=True)
class Partition(Part):
    """Sorts tokens; the groups' sizes, which all samples share, come from `views.mask_ratios`.

    Every token's timestep is distributed as p(t) under any partition, since a group's timestep does not
    depend on which tokens it holds.
    """

    kind: ClassVar[str] = "partition"

    @abstractmethod
    def order(self, batch: Ungrouped) -> Int[Tensor, "B N"]:
        """A permutation of each sample's tokens; group k is its k-th slice, of `batch.sizes[k]` tokens.

        Args:
            batch: all there is to look at, and what draws. The order is on its generator's device.
        """
