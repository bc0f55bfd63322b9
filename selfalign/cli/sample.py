"""`selfalign sample`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from selfalign.cli.console import MovedData, console, importing, make_bar, parse
from selfalign.cli.tree import options_of, restore
from selfalign.errors import UserError
from selfalign.sampling.settings import SamplingConfig
from selfalign.sections import MAX_BATCH, MAX_SAMPLES

SAMPLES, SETTINGS, GRID = "samples.npz", "sampling.json", "grid.png"
PNGS, TRAJECTORY, INTERPOLATION = "images", "trajectory", "interpolation.png"
ANIMATED, FRAMES = 16, 48
"""Samples and states that a trajectory shows."""
PAIRS, MAX_INTERPOLATED = 6, 64
"""Rows of an interpolation, and images in a row."""


@dataclass(frozen=True)
class SampleArguments:
    """Sample from a run: writes samples.npz (arr_0 uint8 NHWC, arr_1 labels), grid.png and
    sampling.json. Signals are floats (M, L, C), videos bytes (M, T, H, W, C) with grid.gif."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    out: Path
    """Folder for the samples."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: options_of(SamplingConfig())
    )
    num: int = 100
    """How many samples (under torchrun: --num-samples)."""
    labels: Literal["random", "balanced"] | tuple[int, ...] = "random"
    """Classes: drawn at random, balanced (sample i has class i modulo their number), or given ones,
    repeated in order over the samples."""
    lengths: tuple[int, ...] = ()
    """Lengths along the first side, repeated in order over the samples; signals are NaN beyond them. Left
    out: as long as the model's samples are."""
    prompts: tuple[str, ...] = ()
    """Texts in the place of labels, repeated in order over the samples, for a model that reads texts."""
    batch_size: int = 100
    """Samples at once; has no effect on the samples."""
    weights: str = "ema"
    """Which weights to sample from: ema, raw, or ema:DECAY of a run that keeps several averages."""
    step: int | None = None
    """Step of the checkpoint; left out: the last one."""
    png: bool = False
    """Also write every sample as a file, images/000000.png …"""
    trajectory: Literal["none", "gif", "webp"] = "none"
    """Also write the way of the first 16 samples from noise to images."""
    interpolate: int = 0
    """Also write interpolation.png: so many images from one sample to the next, a pair in a row, between
    their noises; 0: none."""
    data: MovedData = field(default_factory=MovedData)


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
    for name, value, most in (
        ("num", parsed.num, MAX_SAMPLES),
        ("batch-size", parsed.batch_size, MAX_BATCH),
    ):
        if not 1 <= value <= most:
            raise UserError(f"--{name} is {value}: allowed is a number from 1 to {most:,}")
    if parsed.interpolate and not 2 <= parsed.interpolate <= MAX_INTERPOLATED:
        raise UserError(
            f"--interpolate is {parsed.interpolate}: allowed are 0 (none), or 2 to {MAX_INTERPOLATED} images"
        )
    if parsed.interpolate and parsed.num < 2:
        raise UserError("--interpolate needs two samples: --num is 1")
    return _sample(parsed, restore(parsed.sampling, SamplingConfig()))


def _told(run: Any, parsed: SampleArguments) -> tuple[int, ...]:
    """Tell a model what it is to draw, and return the numbers that stand for it.

    Args:
        run: a `LoadedRun`.
        parsed: the options.
    """
    if not run.model.condition.attends:
        raise UserError(f"--prompts: the model of {parsed.run} reads no texts; --labels it knows")
    if parsed.labels != "random":
        raise UserError("--prompts and --labels: allowed is one of them")
    run.model.describe(run.class_names, parsed.prompts)
    first = run.model.num_classes + 1
    return tuple(range(first, first + len(parsed.prompts)))


def _draw_more(
    parsed: SampleArguments,
    sampling: SamplingConfig,
    run: Any,
    images: Any,
    labels: Any,
    frames: Any,
) -> list[str]:
    """The pictures that were asked for, and their names.

    Args:
        parsed: the options.
        sampling: how samples were made.
        run: a `LoadedRun`.
        images: bytes (M, H, W, C).
        labels: one per image.
        frames: states of the first ones, as `images`.
    """
    from selfalign.sampling.pictures import draw_rows, write_animation, write_pngs

    written = []
    if parsed.png:
        write_pngs(parsed.out / PNGS, images)
        written.append(PNGS)
    if parsed.trajectory != "none":
        file = f"{TRAJECTORY}.{parsed.trajectory}"
        write_animation(parsed.out / file, [*frames, images[: len(frames[0])]])
        written.append(file)
    if parsed.interpolate:
        import torch

        from selfalign.sampling.generate import interpolate
        from selfalign.sampling.output import as_array

        pairs = min(PAIRS, parsed.num // 2)
        between = interpolate(
            run.model,
            run.config.flow.path,
            sampling,
            [(2 * pair, 2 * pair + 1, int(labels[2 * pair])) for pair in range(pairs)],
            parsed.interpolate,
            run.config.views.attention == "separated",
        )
        rows = torch.cat([run.decode(row) for row in between])
        draw_rows(parsed.out / INTERPOLATION, as_array(rows), parsed.interpolate)
        written.append(INTERPOLATION)
    return written


def _sample(parsed: SampleArguments, sampling: SamplingConfig) -> int:
    """Imports what takes time once the options have been read."""
    import math

    with importing():
        import numpy as np
        from torch import Tensor

        from selfalign.disk import require_no_folder, require_room, require_writable, write_arrays
        from selfalign.memory import require_memory
        from selfalign.processes import open_accelerator
        from selfalign.records import write_json
        from selfalign.runs.load import load_run, sampling_record
        from selfalign.sampling.generate import LABEL_BYTES, check_sampling, generate
        from selfalign.sampling.output import as_array, draw_set

    labels: Any = parsed.labels
    device = open_accelerator().device
    run = load_run(parsed.run, parsed.weights, device, step=parsed.step, data_root=parsed.data.root)
    separate = run.config.views.attention == "separated"
    check_sampling(run.model, sampling, run.config.views.class_dropout, labels)
    if parsed.prompts:
        labels = _told(run, parsed)
    longest = run.model.image_size[0]
    if parsed.lengths and not (
        run.config.padded
        and not sampling.mask_ratio
        and all(1 <= length <= longest for length in parsed.lengths)
    ):
        raise UserError(
            f"--lengths are {parsed.lengths}: allowed are numbers from 1 to {longest}, for a model of "
            "samples of unequal lengths, without --mask-ratio"
        )
    asked = parsed.png or parsed.trajectory != "none" or parsed.interpolate
    if asked and (len(run.model.image_size) != 2 or parsed.prompts):
        raise UserError(
            "--png, --trajectory and --interpolate are for samples of classes that are images"
        )
    size = parsed.num * (math.prod(run.image_shape) + LABEL_BYTES)
    require_writable(parsed.out)
    require_no_folder(
        *(parsed.out / name for name in (SAMPLES, SETTINGS, GRID, *([PNGS] if parsed.png else [])))
    )
    require_room(parsed.out, size, f"{parsed.num:,} samples")
    require_memory(2 * size, f"{parsed.num:,} samples")  # in parts, and joined
    images, chosen = [], []
    frames: list[np.ndarray[Any, Any]] = []
    bar = make_bar("sampling")
    every = -(-sampling.steps // FRAMES)

    def watch(indices: range, step: int, state: Tensor) -> None:
        share = min(1, step / sampling.steps)
        bar.update(task, completed=indices.start + int(share * len(indices)))
        if parsed.trajectory != "none" and indices.start == 0 and step % every == 0:
            frames.append(as_array(run.decode(state[:ANIMATED].float())))

    with bar:
        task = bar.add_task("", total=parsed.num)
        batches = generate(
            run.model,
            run.config.flow.path,
            sampling,
            parsed.num,
            batch_size=parsed.batch_size,
            labels=labels,
            separate=separate,
            lengths=parsed.lengths or None,
            watch=watch,
        )
        for batch in batches:
            images.append(as_array(run.decode(batch.images)))
            chosen.append(batch.labels)
            bar.update(task, completed=batch.indices.stop)
    arr_0 = np.concatenate(images)
    arr_1 = np.concatenate([part.numpy() for part in chosen])
    told: dict[str, Any] = {"prompts": parsed.prompts} if parsed.prompts else {"labels": labels}
    told |= {"lengths": parsed.lengths} if parsed.lengths else {}
    record = sampling_record(run, sampling, weights=parsed.weights, num=parsed.num, **told)
    names = run.class_names if run.model.num_classes else ()
    if parsed.prompts:
        names, arr_1 = parsed.prompts, arr_1 - run.model.num_classes - 1
    write_arrays(parsed.out / SAMPLES, {"arr_0": arr_0, "arr_1": arr_1})
    write_json(parsed.out / SETTINGS, record)
    draw_set(parsed.out / GRID, arr_0, arr_1, names, run.model.condition.attends)
    more = _draw_more(parsed, sampling, run, arr_0, arr_1, frames)
    written = [SAMPLES, GRID, *more]
    console.print(
        f"{parsed.num} samples from step {run.step} ({parsed.weights} weights): "
        + ", ".join(str(parsed.out / name) for name in written)
    )
    return 0
