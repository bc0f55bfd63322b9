"""What it costs to compare each record of a stored set with its checksum as it is read.

    python benchmarks/verification.py FOLDER [--items N]

FOLDER gets a set of moments (8×32×32 float16, 16 KB each), made once and kept. The same random batches of
256 are read with the comparison and without it, in turn; given are medians of the processor time of single
batches, and the median of the pairs' differences.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
from data import BATCH, write_shards

from selfalign.data.latents.reader import Records
from selfalign.data.latents.store import read_manifest

PAIRS = 400


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--items", type=int, default=20_000)
    options = parser.parse_args()
    root = options.folder / "moments"
    if not root.exists():
        write_shards(root, options.items)
    manifest = read_manifest(root)
    compared, plain = Records(root, manifest), Records(root, manifest)
    plain.has_checksums = False
    generator = np.random.default_rng(0)
    taken: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(PAIRS):
        batch = generator.integers(0, manifest.records, BATCH).tolist()
        for which in generator.permutation([True, False]):
            begun = time.process_time()
            (compared if which else plain).read(batch, [0] * BATCH)
            taken[bool(which)].append(time.process_time() - begun)
    each = {which: 1e6 * statistics.median(times) / BATCH for which, times in taken.items()}
    more = [1e6 * (a - b) / BATCH for a, b in zip(taken[True], taken[False], strict=True)]
    rate = manifest.layout.record_bytes / each[True] / 1e3
    print(
        f"{each[True]:.2f} µs per record compared, {each[False]:.2f} µs not "
        f"({statistics.median(more):.2f} µs more); {rate:.1f} GB/s with the comparison"
    )


if __name__ == "__main__":
    main()
