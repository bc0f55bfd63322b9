"""The order of the data as a function of (seed, epoch), and each step's batch of the step."""

import functools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

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
        indices: list[int] = []
        while len(indices) < self.batch_size:  # a batch may span epochs
            epoch, begin = divmod(first + len(indices), size)
            end = begin + self.batch_size - len(indices)
            indices += epoch_order(self.seed, epoch, size)[begin:end].tolist()
        try:
            return self.split.read(
                indices, [derive_seed(self.seed, "augment", p) for p in positions]
            )
        except UserError as error:
            return _Failure(str(error))


@dataclass(frozen=True)
class _Ahead(IterableDataset[Batch | _Failure]):
    """The batches of micro-steps in their order, read ahead by threads."""

    batch_of: _BatchOfMicroStep
    micro_steps: Iterable[int]
    threads: int

    def __iter__(self) -> Iterator[Batch | _Failure]:
        pool = ThreadPoolExecutor(self.threads, "data")
        pending: deque[Future[Batch | _Failure]] = deque()
        try:
            for micro_step in self.micro_steps:
                pending.append(pool.submit(self.batch_of.__getitem__, micro_step))
                if len(pending) > 2 * self.threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


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
        workers: how many read ahead: processes, or threads where the split says so.
        pin_memory: hand out page-locked memory, for faster copies to a GPU.

    Raises:
        UserError: what reading the data raised, from whichever process.
    """
    micro_steps = range(first, last)
    batch_of = _BatchOfMicroStep(split, seed, batch_size, rank, processes)
    in_threads = workers > 0 and split.reads_in_threads
    batches = DataLoader(
        _Ahead(batch_of, micro_steps, workers) if in_threads else batch_of,
        sampler=None if in_threads else micro_steps,
        batch_size=None,
        num_workers=0 if in_threads else workers,
        pin_memory=pin_memory,
        # Without one of its own, the loader would draw its workers' seeds from the global one.
        generator=torch.Generator(),
    )
    for batch in batches:
        if isinstance(batch, _Failure):
            raise UserError(batch.message)
        yield tuple(batch)
