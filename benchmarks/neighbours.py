"""What a step of each recipe costs relative to `sit`, counted and measured; how fast features are read.

    python benchmarks/neighbours.py [counted|measured|features …]

Recipes and `sit` alternate in one run; figures are medians of the pairs' ratios with their range. Features
are taken to be stored, DINOv2-B's 768 over 16×16 tokens. Prints the tables of benchmarks/neighbours.md.
"""

import argparse
import functools
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from data import forget, write_shards
from sides import alternate, make_config, spread

from selfalign import RECIPES, ResolvedConfig
from selfalign.benchmark.cost import step_cost
from selfalign.benchmark.measure import StepBenchmark
from selfalign.data.datasets import open_data
from selfalign.data.latents import store
from selfalign.data.latents.reader import open_features
from selfalign.data.source import Features, Split
from selfalign.data.stream import training_batches
from selfalign.recipes import COSTS
from selfalign.records import write_json
from selfalign.sections import DataConfig

ENCODER = "repa:dinov2-vit-b"
SHAPE = (1, 16, 16, 768)
"""Views, rows, columns and features of a record."""
IMAGES = 1_000
BATCH = 8
PAIRS = 7
NARROW = {"projectors.mlp3.width": 384}
"""REPA's projector as wide as the S model, where 2,048 wide costs more than the model's own blocks."""
COUNTED = tuple(name for name in RECIPES if not name.startswith(("imagenet", "haste")))
"""HASTE's encoder runs along: tests/test_recipes.py counts it with the encoder's own operations."""
MEASURED = ("sra", "sra-dts-as", "layersync", "sra2", "irepa", "repa", "repa-dts-as")


def config_of(name: str, **more: Any) -> ResolvedConfig:
    """A recipe of SiT-S/2 on latents of 4×32×32 with features that come with the batch."""
    stored = {"targets.frozen-encoder.when": "once", "targets.frozen-encoder.widths": (768,)}
    return make_config(name, "S/2", 4, 32, BATCH, **stored, **more)


def counted() -> None:
    """Operations relative to those of `sit`: at S/2, and at XL/2 as `selfalign recipes` has them."""
    print("| recipe | S/2 | XL/2 |\n| --- | --- | --- |")
    plain = step_cost(config_of("sit"), 1).flops
    variants: list[tuple[str, str, dict[str, Any]]] = [(name, name, {}) for name in COUNTED]
    variants += [(f"{name}, projector 384 wide", name, NARROW) for name in ("repa", "sra2")]
    for label, name, more in variants:
        ratio = step_cost(config_of(name, **more), 1).flops / plain
        known = "–" if more else f"{COSTS[name]:.3f}"
        print(f"| {label} | {ratio:.3f} | {known} |", flush=True)


def measured() -> None:
    """Seconds of a step relative to `sit`'s: SiT-S/2, 256 tokens."""
    print("| recipe | time relative to `sit` | counted |\n| --- | --- | --- |")
    plain = StepBenchmark(config_of("sit"))
    operations = step_cost(plain.config, 1).flops
    for label, name, more in (
        *((name, name, {}) for name in MEASURED),
        ("repa, projector 384 wide", "repa", NARROW),
    ):
        step = StepBenchmark(config_of(name, **more))
        own, other = alternate(step, plain, PAIRS, warmup=1)
        ratios = [a / b for a, b in zip(own, other, strict=True)]
        count = step_cost(step.config, 1).flops / operations
        print(f"| {label} | {spread(ratios)} | {count:.3f} |", flush=True)


def write_features(root: Path, images: int) -> None:
    """Random features of the images of a stored set, in one shard."""
    folder = store.features_folder(root, ENCODER)
    folder.mkdir(parents=True)
    of_images = store.read_manifest(root)
    generator, sums = np.random.default_rng(0), []
    with (folder / "shard-00000.bin").open("wb") as file:
        for _ in range(images):
            record = generator.standard_normal(SHAPE, np.float32).astype(np.float16)
            sums.append(xxhash.xxh3_64_intdigest(record.tobytes()))
            file.write(record.tobytes())
    shard = store.Shard("shard-00000.bin", images, "0" * 64)
    np.array(sums, "<u8").tofile(folder / shard.checksums)
    layout = store.Layout(
        kind="features",
        image_size=256,
        dtype="float16",
        shape=SHAPE,
        scale=1.0,
        shift=0.0,
        autoencoder="",
        autoencoder_sha256="",
        class_names=(),
        source="benchmark",
        fingerprint=of_images.fingerprint,
        images=images,
        shard_images=images,
        encoder=ENCODER,
        encoder_sha256="0" * 64,
    )
    write_json(folder / store.MANIFEST, store.Manifest(layout, (shard,), "", (), {}, "xxh3_64"))


def read_batches(split: Split, features: dict[str, Features], batches: int, workers: int) -> float:
    """Seconds of so many batches of latents and features through the loader that training uses."""
    given = training_batches(
        split,
        seed=0,
        batch_size=BATCH,
        first=0,
        last=batches,
        workers=workers,
        features=features,
    )
    begun = time.perf_counter()
    for _ in given:
        pass
    return time.perf_counter() - begun


def features() -> None:
    """Images per second with stored features, beside what steps of S/2 consume."""
    step, batches = StepBenchmark(config_of("repa")), 50
    print("| cache | workers | read, images/s | step, images/s | ratio |\n|" + " --- |" * 5)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "set"
        write_shards(root, IMAGES)
        write_features(root, IMAGES)
        os.sync()
        source = open_data(DataConfig(name="latents", root=str(root)))
        place = store.features_folder(root, ENCODER)
        fingerprint = store.read_manifest(root).fingerprint
        chosen = getattr(source.train, "positions")  # noqa: B009 – of stored splits
        stored = {ENCODER: open_features(place, chosen, False, fingerprint)}
        for cache in ("warm", "cold"):
            for workers in (0, 2):
                read = functools.partial(read_batches, source.train, stored, batches, workers)

                def once(
                    read: functools.partial[float] = read, cold: bool = cache == "cold"
                ) -> float:
                    if cold:
                        forget(root, "*.bin")
                    return read()

                given, taken = alternate(once, step, PAIRS, warmup=1)
                ratios = [batches * b / a for a, b in zip(given, taken, strict=True)]
                rates = [batches * BATCH / s for s in given], [BATCH / s for s in taken]
                print(
                    f"| {cache} | {workers} | {statistics.median(rates[0]):,.0f} | "
                    f"{statistics.median(rates[1]):.1f} | {spread(ratios)} |",
                    flush=True,
                )


PARTS = {"counted": counted, "measured": measured, "features": features}


def main() -> None:
    """Run the named parts, or all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in parser.parse_args().parts:
        print(f"\n{PARTS[name].__doc__}\n")
        PARTS[name]()


if __name__ == "__main__":
    main()
