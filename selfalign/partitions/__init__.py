"""Partitions: how each sample's tokens are split into groups (Eq. 5 and 6, and beyond)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from selfalign.parts import Part

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Generator, Tensor

    from selfalign.flow import Path
    from selfalign.network import Backbone, Tap
    from selfalign.tokens import TokenGrid


@dataclass(frozen=True)
class Scene:
    """What there is to look at when a batch is split."""

    grid: TokenGrid
    sizes: tuple[int, ...]
    """Tokens of each group."""
    batch: int
    """Samples B."""
    generator: Generator
    """The step's."""
    x0: Float[Tensor, "B C *sides"] | None
    """The clean samples; None where only shapes are known."""
    noise: Float[Tensor, "B C *sides"]
    """The step's."""
    path: Path
    teacher: Backbone | None = None
    """The EMA model; None where there is none, as where a batch is only shown."""
    condition: Any = None
    """Of every sample, for the teacher."""

    def teacher_features(self, tap: Tap, timestep: float) -> Float[Tensor, "B N D"] | None:
        """The teacher's features of the whole samples at one timestep, in image order; None without one."""
        import torch

        if self.teacher is None or self.x0 is None:
            return None
        tokens, timesteps, groups = self._seen(timestep)
        with torch.no_grad():
            features = self.teacher.features(tokens, timesteps, self.condition, groups, (tap,))
        return features[tap]

    def teacher_errors(self, timestep: float) -> Float[Tensor, "B N"] | None:
        """The teacher's squared velocity error of every token (Eq. 2), in image order; None without one."""
        import torch

        if self.teacher is None or self.x0 is None:
            return None
        tokens, timesteps, groups = self._seen(timestep)
        clean, noise = (self.grid.patchify(samples) for samples in (self.x0, self.noise))
        target = self.path.velocity(clean, noise, timesteps[..., None])
        with torch.no_grad():
            velocity = self.teacher(tokens, timesteps, self.condition, groups).velocity
        return (velocity[..., : target.shape[2]] - target).square().mean(dim=2)

    def _seen(self, timestep: float) -> tuple[Any, Any, Any]:
        """The noised whole samples, their timestep, and one group."""
        import torch

        from selfalign.tokens import one_group

        assert self.x0 is not None
        timesteps = torch.full((self.batch, 1), timestep, device=self.x0.device)
        clean, noise = (self.grid.patchify(samples) for samples in (self.x0, self.noise))
        tokens = self.path.interpolate(clean, noise, timesteps[..., None])
        return tokens, timesteps, one_group(self.grid.num_tokens)


@dataclass(frozen=True)
class Partition(Part):
    """Sorts tokens; the groups' sizes, which all samples share, come from `views.mask_ratios`.

    Every token's timestep is distributed as p(t) under any partition, since a group's timestep does not
    depend on which tokens it holds.
    """

    kind: ClassVar[str] = "partition"

    asks_teacher: ClassVar[bool] = False
    """Whether the EMA teacher is run for it: a forward pass more in every step."""

    @abstractmethod
    def order(
        self,
        grid: TokenGrid,
        sizes: tuple[int, ...],
        batch: int,
        generator: Generator,
        x0: Float[Tensor, "B C *sides"] | None,
    ) -> Int[Tensor, "B N"]:
        """A permutation of each sample's tokens; group k is its k-th slice, of `sizes[k]` tokens.

        Args:
            grid: where the tokens lie.
            sizes: tokens of each group.
            batch: samples B.
            generator: the step's; the order is on its device and nothing else draws.
            x0: the clean samples, for partitions by content; None where only shapes are known.
        """

    def split(self, scene: Scene) -> Int[Tensor, "B N"]:
        """The permutation, for partitions that look at more than places and clean samples.

        Args:
            scene: all there is to look at.
        """
        return self.order(scene.grid, scene.sizes, scene.batch, scene.generator, scene.x0)
