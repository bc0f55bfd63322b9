"""`selfalign import`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from selfalign.cli.console import console, parse


@dataclass(frozen=True)
class ImportedData:
    """The data set that the weights were trained on, where it is at hand."""

    name: str | None = None
    """latents, folder or another data set; left out: none, and samples are decoded by --vae."""
    root: str | None = None
    """Folder that holds its files."""
    image_size: int | None = None
    """Side of the square that a folder's images are cropped and resized to."""


@dataclass(frozen=True)
class ImportArguments:
    """Make a run of released weights."""

    file: Annotated[str, tyro.conf.Positional]
    """A .safetensors or .pt file, or hub:OWNER/NAME[:FILE]."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder of the run; new or empty."""
    source: Annotated[
        Literal["sit", "repa", "sra", "sra-dts-as", "self-flow", "dit"] | None,
        tyro.conf.arg(name="from"),
    ] = None
    """The project that the weights come from; left out: as their layout says, where it does."""
    heads: int | None = None
    """Attention heads, where the width is of no named size."""
    channels: int = 4
    """Channels of a Self-Flow checkpoint, whose shapes do not tell."""
    null_row: bool = True
    """Whether the last label is the null class."""
    vae: str | None = None
    """Autoencoder that turns samples into images: ema, mse, a folder, or OWNER/NAME on the hub; left out: ema
    for latents of four channels."""
    licence: str = ""
    """Licence of the weights, which is kept with them and in the model card."""
    data: ImportedData = field(default_factory=ImportedData)


def import_command(arguments: Sequence[str]) -> int:
    """`selfalign import`."""
    parsed = parse(
        ImportArguments,
        arguments,
        "selfalign import",
        "Make a run of released weights, which is sampled, evaluated, inspected and fine-tuned like any "
        "other. Examples: selfalign import SiT-XL-2-256x256.pt runs/sit-xl --from sit; selfalign import "
        "hub:OWNER/NAME runs/theirs --from repa",
    )
    from selfalign.interop.imported import import_run

    given = {k: v for k, v in dataclasses.asdict(parsed.data).items() if v is not None}
    imported = import_run(
        parsed.file,
        parsed.out,
        parsed.source,
        heads=parsed.heads,
        channels=parsed.channels,
        null_row=parsed.null_row,
        vae=parsed.vae,
        licence=parsed.licence,
        data=given,
    )
    model = imported.config.model
    sides = "×".join(map(str, model.image_size))
    console.print(
        f"{imported.folder}: {model.backbone} {model.size}, {model.channels} channels of {sides}, "
        f"{model.num_classes} classes, as a run of {imported.recipe}"
    )
    for phrase in imported.told:
        console.print(f"  {phrase}")
    console.print(f"go on: selfalign sample {imported.folder} --out {imported.folder}/generated")
    return 0
