"""The stream of batches: a function of (seed, step), whoever reads it and wherever it starts."""

import contextlib
import gc
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfalign import UserError
from selfalign.data.source import MemorySplit
from selfalign.data.stream import epoch_order, training_batches
from selfalign.signals import stop_signals


def pairs(*arguments, **settings):
    """The batches' images and labels."""
    with contextlib.closing(training_batches(*arguments, **settings)) as batches:
        for batch in batches:
            yield batch.images, batch.labels


class ThreadedSplit(MemorySplit):
    """Read ahead by threads."""

    reads_in_threads = True


def numbered_split(size, flip=False, kind=MemorySplit):
    """Images whose left pixel is their index, so that a batch shows what it was made from."""
    images = torch.zeros(size, 1, 1, 2)
    images[:, 0, 0, 0] = torch.arange(size)
    images[:, 0, 0, 1] = -1
    return kind(images, torch.arange(size), flip)


class BrokenSplit:
    """Cannot read image 3."""

    def __init__(self, reads_in_threads=False):
        self.reads_in_threads = reads_in_threads

    def __len__(self):
        return 8

    def read(self, indices, seeds=None):
        if 3 in indices:
            raise UserError("images/3.png is not a readable image: cannot identify image file")
        return torch.zeros(len(indices), 1, 1, 1), torch.tensor(indices)


def labels_of(split, **settings):
    return [labels.tolist() for _, labels in pairs(split, **settings)]


class TestOrder:
    @given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10**6), size=st.integers(1, 50))
    @settings(max_examples=40)
    def test_is_a_permutation_and_a_function_of_seed_and_epoch(self, seed, epoch, size):
        order = epoch_order(seed, epoch, size)
        assert sorted(order.tolist()) == list(range(size))
        epoch_order.cache_clear()
        torch.manual_seed(epoch)
        assert torch.equal(epoch_order(seed, epoch, size), order)

    def test_differs_between_epochs_and_seeds(self):
        orders = [
            tuple(epoch_order(seed, epoch, 30).tolist())
            for seed, epoch in itertools.product(range(4), range(5))
        ]
        assert len(set(orders)) == 20


class TestBatches:
    @given(
        size=st.integers(1, 20),
        batch_size=st.integers(1, 9),
        processes=st.integers(1, 3),
        epochs=st.integers(1, 3),
        seed=st.integers(0, 99),
    )
    @settings(max_examples=40, deadline=None)
    def test_every_epoch_visits_every_image_once(self, size, batch_size, processes, epochs, seed):
        split = numbered_split(size)
        last = -(-size * epochs // (batch_size * processes))
        by_rank = [
            labels_of(
                split,
                seed=seed,
                batch_size=batch_size,
                first=0,
                last=last,
                rank=rank,
                processes=processes,
            )
            for rank in range(processes)
        ]
        visited = [label for step in zip(*by_rank, strict=True) for part in step for label in part]
        for epoch in range(epochs):
            part = visited[epoch * size : (epoch + 1) * size]
            assert sorted(part) == list(range(size))
            assert part == epoch_order(seed, epoch, size).tolist()

    @pytest.mark.parametrize("batch_size", [1, 4, 12])
    def test_ranks_partition_the_batch_of_one_process(self, batch_size):
        split = numbered_split(17, flip=True)
        common = {"seed": 3, "first": 2, "last": 7}
        one = list(pairs(split, batch_size=3 * batch_size, **common))
        ranks = [
            list(pairs(split, batch_size=batch_size, rank=r, processes=3, **common))
            for r in range(3)
        ]
        for step, (images, labels) in enumerate(one):
            assert torch.equal(torch.cat([rank[step][0] for rank in ranks]), images)
            assert torch.equal(torch.cat([rank[step][1] for rank in ranks]), labels)

    def test_micro_batches_partition_the_batch_of_one_step(self):
        split = numbered_split(17, flip=True)
        whole = list(pairs(split, seed=3, batch_size=8, first=0, last=5))
        parts = list(pairs(split, seed=3, batch_size=2, first=0, last=20))
        images = torch.cat([images for images, _ in parts])
        assert torch.equal(images, torch.cat([images for images, _ in whole]))

    @pytest.mark.parametrize("first", range(12))
    def test_resuming_anywhere_gives_the_same_batches(self, first):
        split = numbered_split(7, flip=True)
        common = {"seed": 5, "batch_size": 3, "last": 12, "rank": 1, "processes": 2}
        whole = list(pairs(split, first=0, **common))
        resumed = list(pairs(split, first=first, **common))
        assert len(resumed) == 12 - first
        for (a, b), (c, d) in zip(whole[first:], resumed, strict=True):
            assert torch.equal(a, c) and torch.equal(b, d)

    @pytest.mark.parametrize("workers", [1, 2])
    @pytest.mark.parametrize("kind", [MemorySplit, ThreadedSplit])
    def test_workers_change_nothing(self, workers, kind):
        split = numbered_split(7, flip=True, kind=kind)
        common = {"seed": 5, "batch_size": 3, "first": 1, "last": 9}
        alone = list(pairs(split, **common))
        helped = list(pairs(split, workers=workers, **common))
        assert len(helped) == len(alone) == 8
        for (a, b), (c, d) in zip(alone, helped, strict=True):
            assert torch.equal(a, c) and torch.equal(b, d)

    def test_threads_read_ahead_and_no_further_than_asked(self):
        read, before = [], set(threading.enumerate())

        class Noting(ThreadedSplit):
            def read(self, indices, seeds=None):
                read.append(threading.current_thread().name)
                return super().read(indices, seeds)

        split = numbered_split(7, kind=Noting)
        common = {"seed": 0, "batch_size": 2, "first": 0}
        batches = pairs(split, workers=2, last=1000, **common)
        next(batches)
        batches.close()
        count = len(read)
        assert 1 <= count <= 5 and all(name.startswith("data") for name in read)
        names = {thread.name for thread in set(threading.enumerate()) - before}
        assert not any(name.startswith("data") for name in names)
        list(pairs(split, workers=2, last=3, **common))
        assert len(read) == count + 3

    @pytest.mark.parametrize("workers", [0, 2])
    def test_threads_belong_to_splits_that_ask_for_them(self, workers):
        """Decoding stays in processes, where Python does not take turns."""

        class Telling(MemorySplit):
            def read(self, indices, seeds=None):
                return torch.tensor([os.getpid()]), torch.tensor(indices)

        class TellingInThreads(Telling):
            reads_in_threads = True

        for kind, inside in ((Telling, workers == 0), (TellingInThreads, True)):
            batches = pairs(
                numbered_split(5, kind=kind),
                seed=0,
                batch_size=2,
                first=0,
                last=3,
                workers=workers,
            )
            assert all((int(pid) == os.getpid()) == inside for pid, _ in batches)

    def test_nothing_is_left_to_do_at_the_end(self):
        assert labels_of(numbered_split(5), seed=0, batch_size=2, first=4, last=4) == []

    def test_seeds_change_order_and_flips(self):
        split = numbered_split(64, flip=True)
        a, b = (
            next(iter(pairs(split, seed=seed, batch_size=64, first=0, last=1))) for seed in (0, 1)
        )
        assert a[1].tolist() != b[1].tolist()

        def mirrored(images, labels):
            return images[labels.argsort(), 0, 0, 0] == -1

        assert mirrored(*a).tolist() != mirrored(*b).tolist()

    def test_an_image_is_mirrored_in_some_epochs_only(self):
        split = numbered_split(4, flip=True)
        batches = list(pairs(split, seed=0, batch_size=4, first=0, last=40))
        mirrored = torch.stack([(x[y.argsort(), 0, 0, 0] == -1) for x, y in batches]).float()
        assert (mirrored.mean(dim=0) - 0.5).abs().max() < 4 * 0.5 / 40**0.5
        # and neither is it the same places of every epoch that are
        places = torch.stack([x[:, 0, 0, 0] == -1 for x, _ in batches]).float()
        assert (places.mean(dim=0) - 0.5).abs().max() < 4 * 0.5 / 40**0.5

    def test_the_global_generator_has_no_say_and_is_left_alone(self):
        split = numbered_split(20, flip=True)
        common = {"seed": 1, "batch_size": 4, "first": 0, "last": 6}
        torch.manual_seed(0)
        before = list(pairs(split, **common))
        torch.manual_seed(1)
        state = torch.get_rng_state()
        after = list(pairs(split, **common))
        assert torch.equal(torch.get_rng_state(), state)
        for (a, _), (b, _) in zip(before, after, strict=True):
            assert torch.equal(a, b)


class TestErrors:
    @pytest.mark.parametrize(("workers", "threads"), [(0, False), (2, False), (2, True)])
    def test_cross_worker_boundaries_as_the_one_line_they_were(self, workers, threads):
        batches = pairs(
            BrokenSplit(threads), seed=0, batch_size=2, first=0, last=4, workers=workers
        )
        with pytest.raises(UserError) as error:
            list(batches)
        expected = "images/3.png is not a readable image: cannot identify image file"
        assert str(error.value) == expected

    @pytest.mark.parametrize(("workers", "threads"), [(0, False), (1, False), (1, True)])
    def test_batches_before_the_broken_one_arrive(self, workers, threads):
        order = epoch_order(0, 0, 8).tolist()
        whole = order.index(3) // 2
        batches = pairs(
            BrokenSplit(threads), seed=0, batch_size=2, first=0, last=4, workers=workers
        )
        for number in range(whole):
            assert next(batches)[1].tolist() == order[2 * number : 2 * number + 2]
        with pytest.raises(UserError):
            next(batches)


class Sleeper(MemorySplit):
    """Takes its time, in the worker's process only."""

    def read(self, indices, seeds=None):
        time.sleep(0.05)
        return super().read(indices, seeds)


def batches_of(split, workers=1):
    return pairs(split, seed=0, batch_size=4, first=0, last=10_000, workers=workers)


class TestWorkers:
    def test_one_that_dies_ends_the_run_in_one_line_and_not_before(self):
        batches = batches_of(numbered_split(8))
        next(batches)
        worker = multiprocessing.active_children()[0]
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        total = sum(range(10**6))  # torch's own handler would raise here
        assert total > 0
        with pytest.raises(UserError, match=r"a data worker died .* fewer --data\.workers[^\n]*$"):
            list(batches)

    def test_without_shared_memory_the_remedy_is_named(self, monkeypatch):
        def refuse(tensor):
            raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: full")

        monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)  # in the worker, which is forked
        with pytest.raises(
            UserError, match=r"no shared memory .*/dev/shm larger .*workers 0[^\n]*$"
        ):
            next(batches_of(numbered_split(8)))

    @pytest.mark.parametrize("number", stop_signals())
    def test_stop_signals_are_left_to_the_first_process(self, number):
        batches = batches_of(Sleeper(torch.zeros(8, 1, 1, 1), torch.zeros(8, dtype=torch.int64)))
        next(batches)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, number)
        for _ in range(5):
            next(batches)

    def test_none_is_left_behind(self):
        batches = batches_of(numbered_split(8), workers=2)
        next(batches)
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        batches.close()
        del batches
        gc.collect()
        for worker in workers:
            worker.join(10)
            assert worker.exitcode is not None


def test_a_process_that_ends_in_the_middle_does_not_wait_for_its_workers() -> None:
    script = """
import multiprocessing
import torch
from selfalign.data.source import MemorySplit
from selfalign.data.stream import training_batches

split = MemorySplit(torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64), flip=False)
batches = training_batches(split, seed=0, batch_size=2, first=0, last=50, workers=2)
next(batches)
print(len(multiprocessing.active_children()))
ring = [batches]
ring.append(ring)  # as a traceback makes one: nothing closes the batches
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=90, check=True
    )
    assert done.stdout == "2\n"
