"""The order of the data as a function of (seed, epoch), and each step's batch of the step."""

import atexit
import functools
import multiprocessing
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from selfalign.data.batch import Batch
from selfalign.data.source import Features, Split
from selfalign.errors import UserError
from selfalign.randomness import derive_seed, make_generator
from selfalign.signals import stop_signals


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, size: int) -> Tensor:
    """The permutation in which an epoch visits the data."""
    return torch.randperm(size, generator=make_generator(seed, "order", epoch))


@dataclass(frozen=True)
class _Failure:
    """A UserError on its way out of a worker, which could not pass it on as it is."""

    message: str


Read = tuple[Tensor, Tensor, dict[str, Tensor], list[str]] | _Failure
"""A batch, and the warnings that reading it gave."""


@dataclass(frozen=True)
class BatchOfMicroStep(Dataset[Read]):
    """Item i is a process's batch of the i-th micro-step since the start of training.

    Attributes:
        split: the training split.
        seed: the run's seed.
        batch_size: images per process and micro-step.
        rank, processes: which process this is, of how many.
        features: of the training images, by encoder.
    """

    split: Split
    seed: int
    batch_size: int
    rank: int
    processes: int
    features: Mapping[str, Features] = field(default_factory=dict)

    def indices(self, micro_step: int) -> list[int]:
        """Which images the batch of a micro-step has."""
        first, size = self._first(micro_step), len(self.split)
        indices: list[int] = []
        while len(indices) < self.batch_size:  # a batch may span epochs
            epoch, begin = divmod(first + len(indices), size)
            end = begin + self.batch_size - len(indices)
            indices += epoch_order(self.seed, epoch, size)[begin:end].tolist()
        return indices

    def __getitem__(self, micro_step: int) -> Read:
        if get_worker_info() is None:
            return self._read(micro_step)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read = self._read(micro_step)
        if isinstance(read, _Failure):
            return read
        images, labels, features, _ = read
        try:
            # Here and not where the loader's own thread would do it, and nobody hear of its failing.
            images.share_memory_()
            labels.share_memory_()
            for held in features.values():
                held.share_memory_()
        except (OSError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            return _Failure(
                f"a data worker found no shared memory for a batch of {images.nbytes / 1e6:,.1f} MB "
                f"({reason}): make /dev/shm larger (docker run --shm-size 8g), or read without "
                "processes of its own (--data.workers 0)"
            )
        return images, labels, features, [str(warning.message) for warning in caught]

    def _read(self, micro_step: int) -> Read:
        first = self._first(micro_step)
        positions = range(first, first + self.batch_size)
        try:
            seeds = [derive_seed(self.seed, "augment", p) for p in positions]
            indices = self.indices(micro_step)
            images, labels = self.split.read(indices, seeds)
            held = {name: each.read(indices, seeds) for name, each in self.features.items()}
            return images, labels, held, []
        except UserError as error:
            return _Failure(str(error))

    def _first(self, micro_step: int) -> int:
        return (micro_step * self.processes + self.rank) * self.batch_size


@dataclass(frozen=True)
class _Ahead(IterableDataset[Read]):
    """The batches of micro-steps in their order, read ahead by threads."""

    batch_of: BatchOfMicroStep
    micro_steps: Iterable[int]
    threads: ThreadPoolExecutor
    most: int
    """Batches that may wait to be taken."""

    def __iter__(self) -> Iterator[Read]:
        pending: deque[Future[Read]] = deque()
        for micro_step in self.micro_steps:
            pending.append(self.threads.submit(self.batch_of.__getitem__, micro_step))
            if len(pending) > self.most:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


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
    features: Mapping[str, Features] | None = None,
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
        features: of the training images, by encoder.

    Raises:
        UserError: what reading the data raised, from whichever process; or a worker died.
    """
    micro_steps = range(first, last)
    batch_of = BatchOfMicroStep(split, seed, batch_size, rank, processes, features or {})
    in_threads = workers > 0 and split.reads_in_threads
    threads = ThreadPoolExecutor(max(1, workers), "data")  # which start with their first work
    batches = DataLoader(
        _Ahead(batch_of, micro_steps, threads, 2 * workers) if in_threads else batch_of,
        sampler=None if in_threads else micro_steps,
        batch_size=None,
        num_workers=0 if in_threads else workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_main,
        # Without one of its own, the loader would draw its workers' seeds from the global one.
        generator=torch.Generator(),
    )
    try:
        for read in _without_dead_workers(batches) if workers and not in_threads else batches:
            if isinstance(read, _Failure):
                raise UserError(read.message)
            images, labels, held, said = read
            for message in said:
                warnings.warn(message, stacklevel=2)
            yield Batch(images, labels, held)
    finally:  # and not when the loader's iterator goes, which Python 3.12.3 puts off (cpython#118272)
        threads.shutdown(cancel_futures=True)


def _leave_signals_to_main(worker: int) -> None:
    """Stop signals reach all processes of a terminal or job; the first one decides what they mean."""
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)


def _without_dead_workers(loader: DataLoader[Read]) -> Iterator[Read]:
    """The loader's items; where a worker dies, an error here.

    torch raises in the middle of whatever the main thread does when the signal of a child's death
    arrives. Without that handler the loader finds out within seconds, when it is asked for a batch.

    A process that ends with this half read, in a traceback for one, would wait for ever: workers leave
    the signal that Python ends them with to the main process. So they are killed first.
    """
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD) if in_main else None
    others = multiprocessing.active_children()
    workers: list[BaseProcess] = []
    kill_workers = functools.partial(_kill, workers)
    atexit.register(kill_workers)  # later than multiprocessing's own, so it runs before that
    try:
        iterator = iter(loader)
        workers += [child for child in multiprocessing.active_children() if child not in others]
        if handler is not None:
            signal.signal(signal.SIGCHLD, handler)
        yield from iterator
    except (MemoryError, OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"a data worker died ({reason}), perhaps for lack of memory: fewer --data.workers need "
            "less, and 0 reads without processes of its own"
        ) from error
    finally:
        atexit.unregister(kill_workers)


def _kill(processes: Iterable[BaseProcess]) -> None:
    for process in processes:
        process.kill()
