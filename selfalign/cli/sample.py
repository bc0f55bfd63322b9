"""`selfalign sample`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator

from selfalign.cli.console import console, make_bar, parse
from selfalign.errors import UserError
from selfalign.run import class_names, load_run, sampling_record
from selfalign.sampling.generate import SamplingConfig, check_sampling, generate, to_uint8
from selfalign.sampling.pictures import MAX_COLUMNS, draw_grids


@dataclass(frozen=True)
class SampleArguments:
    """Sample from a run: writes samples.npz (arr_0 uint8 NHWC, arr_1 labels), grid.png and
    sampling.json."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    out: Path
    """Folder for the samples."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")]
    num: int = 100
    """How many samples."""
    labels: tuple[int, ...] | None = None
    """Classes, repeated in order over the samples; left out: drawn at random."""
    batch_size: int = 100
    """Samples at once; has no effect on the samples."""
    weights: Literal["ema", "raw"] = "ema"
    """Which weights to sample from."""


def sample_command(arguments: Sequence[str]) -> int:
    """`selfalign sample`."""
    parsed = parse(
        SampleArguments,
        arguments,
        "selfalign sample",
        "Sample from a run: writes samples.npz (arr_0 uint8 NHWC, arr_1 labels), grid.png and "
        "sampling.json. Example: selfalign sample runs/digits --out runs/digits/generated --num 100 "
        "--solver sde --steps 250 --guidance-scale 1.8 --guidance-interval 0 0.7",
    )
    for name, value in (("num", parsed.num), ("batch-size", parsed.batch_size)):
        if value < 1:
            raise UserError(f"--{name} is {value}: allowed is a number from 1")
    device = Accelerator().device
    run = load_run(parsed.run, parsed.weights, device)
    sampling, labels = parsed.sampling, parsed.labels
    check_sampling(run.model, sampling, run.config.views.class_dropout, labels)
    images, chosen = [], []
    bar = make_bar("sampling")
    with bar:
        task = bar.add_task("", total=parsed.num)
        batches = generate(
            run.model,
            run.config.flow.path,
            sampling,
            parsed.num,
            batch_size=parsed.batch_size,
            labels=labels,
            separate=run.config.views.attention == "separated",
        )
        for batch in batches:
            images.append(to_uint8(run.decode(batch.images)).cpu())
            chosen.append(batch.labels)
            bar.update(task, advance=len(batch.indices))
    arr_0 = np.concatenate([part.permute(0, 2, 3, 1).numpy() for part in images])
    arr_1 = np.concatenate([part.numpy() for part in chosen])
    record = sampling_record(run, sampling, weights=parsed.weights, num=parsed.num, labels=labels)
    names = class_names(parsed.run) if run.model.num_classes else ()
    try:
        parsed.out.mkdir(parents=True, exist_ok=True)
        partial = parsed.out / ".samples.partial.npz"
        np.savez(partial, arr_0=arr_0, arr_1=arr_1)
        partial.replace(parsed.out / "samples.npz")
        (parsed.out / "sampling.json").write_text(json.dumps(record, indent=2) + "\n")
        _draw_samples(parsed.out / "grid.png", arr_0, arr_1, names)
    except OSError as error:
        raise UserError(f"--out is {str(parsed.out)!r}: cannot be written ({error})") from error
    console.print(
        f"{parsed.num} samples from step {run.step} ({parsed.weights} weights): "
        f"{parsed.out / 'samples.npz'}, {parsed.out / 'grid.png'}"
    )
    return 0


def _draw_samples(path: Path, images: Any, labels: Any, names: Sequence[str]) -> None:
    """A grid of up to 100 samples: a class per column if every class that occurs fits, else as numbered."""
    tensors = torch.from_numpy(images).permute(0, 3, 1, 2)
    classes = sorted(set(labels.tolist())) if names else []
    if 1 < len(classes) <= MAX_COLUMNS:
        by_class = [np.flatnonzero(labels == k)[:MAX_COLUMNS] for k in classes]
        rows = min(map(len, by_class))
        order = [int(column[row]) for row in range(rows) for column in by_class]
        draw_grids(
            path, {"": tensors[order]}, [names[k] for k in classes], f"{len(images)} samples"
        )
    else:
        columns = min(MAX_COLUMNS, len(images))
        count = min(len(images) // columns, MAX_COLUMNS) * columns
        draw_grids(path, {"": tensors[:count]}, [""] * columns, f"{len(images)} samples")
