"""The order of the data as a function of (seed, epoch), and each step's batch of the step."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from selfalign.data.datasets import Split
from selfalign.errors import UserError
from selfalign.randomness import derive_seed, make_generator

Batch = tuple[Float[Tensor, "B C H W"], Int[Tensor, "B"]]


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, size: int) -> Tensor:
    """The permutation in which an epoch visits the data."""
    return torch.randperm(size, generator=make_generator(seed, "order", epoch))


@dataclass(frozen=True)
class _Failure:
    """A UserError on its way out of a worker, which could not pass it on as it is."""

    message: str


@dataclass(frozen=True)
class _BatchOfMicroStep(Dataset[Batch | _Failure]):
    """Item i is this process's batch of the i-th micro-step since the start of training."""

    split: Split
    seed: int
    batch_size: int
    rank: int
    processes: int

    def __getitem__(self, micro_step: int) -> Batch | _Failure:
        first = (micro_step * self.processes + self.rank) * self.batch_size
        size = len(self.split)
        positions = range(first, first + self.batch_size)
        indices = [int(epoch_order(self.seed, p // size, size)[p % size]) for p in positions]
        try:
            return self.split.read(
                indices, [derive_seed(self.seed, "augment", p) for p in positions]
            )
        except UserError as error:
            return _Failure(str(error))


def training_batches(
    split: Split,
    *,
    seed: int,
    batch_size: int,
    first: int,
    last: int,
    rank: int = 0,
    processes: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """This process's batches of micro-steps first to last-1.

    The processes together walk through one permutation per epoch; an epoch's rest fills a batch
    together with the next epoch's start, so no image is skipped.

    Args:
        split: the training split.
        seed: the run's seed.
        batch_size: images per process and micro-step.
        first, last: range of micro-steps; resuming starts at another `first`.
        rank, processes: which process this is, of how many.
        workers: processes that read ahead.
        pin_memory: hand out page-locked memory, for faster copies to a GPU.

    Raises:
        UserError: what reading the data raised, from whichever process.
    """
    batches = DataLoader(
        _BatchOfMicroStep(split, seed, batch_size, rank, processes),
        sampler=range(first, last),
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        # Without one of its own, the loader would draw its workers' seeds from the global one.
        generator=torch.Generator(),
    )
    for batch in batches:
        if isinstance(batch, _Failure):
            raise UserError(batch.message)
        yield tuple(batch)
