"""Time and memory of the Fréchet distance and of precision and recall at the field's size.

    python benchmarks/evaluation_metrics.py [SAMPLES] [REFERENCE] [THREADS]

draws correlated, non-negative features with a decaying spectrum, as pooled Inception features have,
and prints wall time, processor time and peak memory of each part.
"""

import resource
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from selfalign.evaluation.frechet import fit, frechet_estimate
from selfalign.evaluation.neighbours import precision_recall

DIMENSIONS = 2048


def features(count: int, seed: int, spread: float) -> Tensor:
    """float32 features (count, 2048); the mixing is the same for every seed."""
    mixing = torch.randn(DIMENSIONS, DIMENSIONS, generator=torch.Generator().manual_seed(99))
    scales = torch.arange(1, DIMENSIONS + 1).float() ** -0.6
    mixing = scales[:, None] * mixing
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty(count, DIMENSIONS)
    for rows in torch.arange(count).split(5000):
        noise = torch.randn(len(rows), DIMENSIONS, generator=generator)
        drawn[rows] = (0.3 + spread * 0.2 * noise @ mixing).relu_()
    return drawn


def timed(name: str, work: Callable[[], object]) -> None:
    """Do it, and print what it took."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{name}: {wall:.1f} s, {processor:.1f} processor-s, peak {peak:.2f} GiB  {result}",
        flush=True,
    )


def main() -> None:
    """Measure."""
    given = [int(argument) for argument in sys.argv[1:]]
    samples, reference, threads = given + [50_000, 50_000, 2][len(given) :]
    torch.set_num_threads(threads)
    first, second = features(samples, 1, 1.05), features(reference, 0, 1.0)
    print(
        f"{samples} samples, {reference} reference images, {DIMENSIONS} features, {threads} threads"
    )
    start = time.perf_counter()
    timed("Fréchet distance with standard error", lambda: frechet_estimate(first, fit(second)))
    timed("precision and recall", lambda: precision_recall(first, second))
    print(f"together {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
