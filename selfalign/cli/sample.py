"""`selfalign sample`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from selfalign.cli.console import MovedData, console, make_bar, parse
from selfalign.cli.tree import options_of, restore
from selfalign.errors import UserError
from selfalign.sampling.settings import SamplingConfig
from selfalign.sections import MAX_BATCH, MAX_SAMPLES

SAMPLES, SETTINGS, GRID = "samples.npz", "sampling.json", "grid.png"


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
    """How many samples."""
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


def _sample(parsed: SampleArguments, sampling: SamplingConfig) -> int:
    """Imports what takes time once the options have been read."""
    import math

    import numpy as np

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
    check_sampling(run.model, sampling, run.config.views.class_dropout, labels)
    if parsed.prompts:
        labels = _told(run, parsed)
    longest = run.model.image_size[0]
    if parsed.lengths and not (
        run.config.data.source.padded
        and not sampling.mask_ratio
        and all(1 <= length <= longest for length in parsed.lengths)
    ):
        raise UserError(
            f"--lengths are {parsed.lengths}: allowed are numbers from 1 to {longest}, for a model of "
            "samples of unequal lengths, without --mask-ratio"
        )
    size = parsed.num * (math.prod(run.image_shape) + LABEL_BYTES)
    require_writable(parsed.out)
    require_no_folder(*(parsed.out / name for name in (SAMPLES, SETTINGS, GRID)))
    require_room(parsed.out, size, f"{parsed.num:,} samples")
    require_memory(2 * size, f"{parsed.num:,} samples")  # in parts, and joined
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
            lengths=parsed.lengths or None,
        )
        for batch in batches:
            images.append(as_array(run.decode(batch.images)))
            chosen.append(batch.labels)
            bar.update(task, advance=len(batch.indices))
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
    console.print(
        f"{parsed.num} samples from step {run.step} ({parsed.weights} weights): "
        f"{parsed.out / 'samples.npz'}, {parsed.out / 'grid.png'}"
    )
    return 0
