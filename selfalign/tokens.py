"""Tokens: the grid they come from, and the groups they are sorted into. Knows nothing above it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line prints its help without torch
    from jaxtyping import Bool, Float, Int
    from torch import Tensor, device


@dataclass(frozen=True)
class TokenGrid:
    """How a sample (C, *sides) is cut into tokens: equal patches along one, two or three axes.

    Signals have one axis, images two, videos three (time, height, width).
    """

    sides: tuple[int, ...]
    """Length of the sample along every axis."""
    patch_size: int
    """Side of a patch; it divides every side."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Tokens along every axis."""
        return tuple(side // self.patch_size for side in self.sides)

    @property
    def num_tokens(self) -> int:
        """Tokens N of a sample."""
        return math.prod(self.shape)

    @property
    def patch_positions(self) -> int:
        """Positions within a patch; a token holds as many values per channel."""
        return int(self.patch_size ** len(self.sides))

    def patchify(self, samples: Float[Tensor, "B C *sides"]) -> Float[Tensor, "B N P"]:
        """Cut samples into row-major patches, each flattened as (row, column, channel)."""
        return patchify(samples, self.patch_size)

    def unpatchify(self, tokens: Float[Tensor, "B N P"]) -> Float[Tensor, "B C *sides"]:
        """The inverse of `patchify`."""
        return unpatchify(tokens, self.patch_size, self.sides)

    def coordinates(self, device: device | None = None) -> Int[Tensor, "N A"]:
        """Every token's place along every axis, in image order; made on the device."""
        import torch

        axes = [torch.arange(length, device=device) for length in self.shape]
        places = torch.meshgrid(*axes, indexing="ij")
        return torch.stack([place.flatten() for place in places], dim=1)


def patchify(samples: Float[Tensor, "B C *sides"], patch_size: int) -> Float[Tensor, "B N P"]:
    """Cut samples into row-major patches, each flattened as (row, column, channel).

    Along one axis a patch is (position, channel), along three (frame, row, column, channel).
    """
    batch, channels, *sides = samples.shape
    split = [length for side in sides for length in (side // patch_size, patch_size)]
    outer = [2 + 2 * axis for axis in range(len(sides))]
    patches = samples.reshape(batch, channels, *split)
    patches = patches.permute(0, *outer, *(axis + 1 for axis in outer), 1)
    return patches.reshape(batch, -1, int(patch_size ** len(sides)) * channels)


def unpatchify(
    tokens: Float[Tensor, "B N P"], patch_size: int, sides: Sequence[int]
) -> Float[Tensor, "B C *sides"]:
    """The inverse of `patchify`."""
    axes = len(sides)
    shape = [side // patch_size for side in sides]
    patches = tokens.reshape(len(tokens), *shape, *[patch_size] * axes, -1)
    order = [place for axis in range(1, axes + 1) for place in (axis, axis + axes)]
    return patches.permute(0, 2 * axes + 1, *order).reshape(len(tokens), -1, *sides)


def group_sizes(mask_ratios: Sequence[float], num_tokens: int) -> tuple[int, ...]:
    """Tokens per group: shares of `num_tokens` rounded down, the largest fractions take the rest.

    Args:
        mask_ratios: normalised share of each of the K groups.
        num_tokens: tokens N of an image.

    Returns:
        K counts that sum to N.
    """
    expected = [ratio * num_tokens for ratio in mask_ratios]
    sizes = [math.floor(share) for share in expected]
    by_fraction = sorted(range(len(sizes)), key=lambda k: (sizes[k] - expected[k], k))
    for k in by_fraction[: num_tokens - sum(sizes)]:
        sizes[k] += 1
    return tuple(sizes)


@dataclass(frozen=True)
class Passing:
    """Groups that pass by some blocks unchanged (TREAD, arXiv:2501.04765)."""

    groups: int
    """How many, counted from the last."""
    first: int
    """The first block that they pass by, counted from 1."""
    last: int
    """The last one."""
    masked: bool = False
    """Whether a mask token stands for each of their tokens (MaskDiT, arXiv:2306.09305)."""


@dataclass(frozen=True)
class TokenGroups:
    """How tokens are sorted into groups, each a contiguous slice of the same size in every sample."""

    order: Int[Tensor, "B N"] | None
    """`order[b, i]` is the image position of the i-th token; None is the image's own order."""
    sizes: tuple[int, ...]
    """Tokens in each of the K groups."""
    whole: int = 0
    """The first `whole` samples of the batch are whole images: their groups attend to each other."""
    separate: bool = False
    """Whether the tokens of the other samples attend within their group only (Eq. 8 and 9)."""
    passing: Passing | None = None
    """Which groups pass by which blocks."""
    present: Bool[Tensor, "B N"] | None = None
    """Which tokens are there, in group order, where samples are of unequal lengths; None: all."""

    @property
    def ends(self) -> tuple[int, ...]:
        """Where each group's tokens end."""
        return tuple(itertools.accumulate(self.sizes))

    @property
    def slices(self) -> tuple[slice, ...]:
        """Where each group's tokens are."""
        ends = zip(self.ends, self.sizes, strict=True)
        return tuple(slice(end - size, end) for end, size in ends)

    def kept(self, hidden: int) -> TokenGroups:
        """The groups without the last ones.

        Args:
            hidden: how many are left out.
        """
        sizes = self.sizes[: len(self.sizes) - hidden]
        order = None if self.order is None else self.order[:, : sum(sizes)]
        present = None if self.present is None else self.present[:, : sum(sizes)]
        return TokenGroups(order, sizes, self.whole, self.separate, present=present)

    def in_block(self, number: int) -> TokenGroups:
        """The groups that a block works on, counted from 1: these, or those that do not pass by."""
        passing = self.passing
        if passing is None or not passing.first <= number <= passing.last:
            return self
        return self.kept(passing.groups)

    def attention_parts(self, batch: int) -> tuple[tuple[int, int, int, int], ...]:
        """First and end sample, first and end token of each dense attention that covers the batch."""
        whole = self.whole if self.separate else batch
        parts = [(0, whole, 0, self.ends[-1])] if whole else []
        if whole < batch:
            parts += [(whole, batch, part.start, part.stop) for part in self.slices]
        return tuple(parts)

    def sort(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Bring tokens from image order into group order; those of one image (1 N D) for every image."""
        return tokens if self.order is None else _reorder(tokens, self.order)

    def restore(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Bring tokens from group order back into image order."""
        return tokens if self.order is None else _reorder(tokens, self.order.argsort(dim=1))

    def broadcast(self, values: Float[Tensor, "B K D"]) -> Float[Tensor, "B N D"]:
        """Give every token the values of its group."""
        import torch

        slices = [values[:, k, None].expand(-1, n, -1) for k, n in enumerate(self.sizes)]
        return torch.cat(slices, dim=1)

    def repeat(self, times: int) -> TokenGroups:
        """The groups of a batch that is the same samples several times over. Without whole images."""
        order = None if self.order is None else self.order.repeat(times, 1)
        present = None if self.present is None else self.present.repeat(times, 1)
        return TokenGroups(order, self.sizes, separate=self.separate, present=present)


def without_padding(
    clean: Float[Tensor, "B N P"], noise: Float[Tensor, "B N P"]
) -> tuple[Float[Tensor, "B N P"], Float[Tensor, "B N P"], Bool[Tensor, "B N P"]]:
    """Tokens of samples whose missing end is NaN, and their noise: zeros there, and which values are there.

    Without noise beyond the end too, since in a token that ends early it would be seen. A token is there
    where any of its values is.
    """
    missing = clean.isnan()
    return clean.masked_fill(missing, 0), noise.masked_fill(missing, 0), ~missing


def one_group(num_tokens: int) -> TokenGroups:
    """All tokens together, in the image's own order."""
    return TokenGroups(order=None, sizes=(num_tokens,))


def _reorder(tokens: Float[Tensor, "B N D"], order: Int[Tensor, "B N"]) -> Float[Tensor, "B N D"]:
    """`tokens[b, order[b, i]]` at i, in whole rows: a gather takes them number by number."""
    import torch

    images, count, _ = tokens.shape
    first = count * torch.arange(images, device=order.device)
    rows = tokens.flatten(0, 1)
    return torch.nn.functional.embedding(first[:, None] + order, rows)
