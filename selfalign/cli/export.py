"""`selfalign export`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from selfalign.cli.console import MovedData, console, parse


@dataclass(frozen=True)
class ExportArguments:
    """Write a run's model as other projects read it."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder; new or empty."""
    format: Literal["diffusers", "safetensors", "sit"]
    """diffusers: a folder that DiffusionPipeline opens without this package; safetensors: one that
    SiT.from_pretrained opens, for the hub; sit: weights in SiT's naming and time."""
    weights: str = "ema"
    """Which weights: ema, raw, or ema:DECAY of a run that keeps several averages."""
    step: int | None = None
    """Step of the checkpoint; left out: the last one."""
    licence: str = ""
    """Licence of the weights, for the model card; left out: that of the weights they came from."""
    vae: bool = True
    """Whether a diffusers folder of latents gets the autoencoder that decodes them."""
    data: MovedData = field(default_factory=MovedData)


def export_command(arguments: Sequence[str]) -> int:
    """`selfalign export`."""
    parsed = parse(
        ExportArguments,
        arguments,
        "selfalign export",
        "Write a run's model as other projects read it, with a model card. Example: selfalign export "
        "runs/digits exported --format diffusers",
    )
    from selfalign.interop.export import export_run
    from selfalign.runs.load import load_run

    run = load_run(parsed.run, parsed.weights, step=parsed.step, data_root=parsed.data.root)
    export_run(run, parsed.out, parsed.format, licence=parsed.licence, vae=parsed.vae)
    console.print(f"{parsed.out}: step {run.step} ({parsed.weights} weights) for {parsed.format}")
    return 0
