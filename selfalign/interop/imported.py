"""Released weights as a run: config.json and a checkpoint of step 0, which every command takes."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import selfalign
from selfalign.backbones.sit.sizes import Size, size_name
from selfalign.config import ResolvedConfig, resolve
from selfalign.data.datasets import open_data
from selfalign.disk import locked
from selfalign.errors import UserError
from selfalign.hub import fetch_weights
from selfalign.interop.files import read_weights, stated_project
from selfalign.interop.released import Dimensions, Source, recognise, translate
from selfalign.recipes import recipe
from selfalign.records import write_json
from selfalign.runs.folder import (
    CHECKPOINTS,
    ORIGIN,
    empty,
    missing_folders,
    refuse_used,
    remove_empty,
    write_config,
    write_record,
)
from selfalign.student import build_student
from selfalign.training.checkpoint import CheckpointState, save_checkpoint
from selfalign.training.starting import Start, load_start
from selfalign.training.step import make_optimizer
from selfalign.weights import Weights

PROJECTS: Mapping[str, Source] = {
    "sit": "sit",
    "repa": "repa",
    "sra": "sra",
    "sra-dts-as": "sra",
    "self-flow": "self-flow",
    "dit": "dit",
}
"""What `--from` takes, and whose layout that is; each is also a recipe, but for `dit`."""
LATENT_CHANNELS = 4
"""Of Stable Diffusion's autoencoder, which all projects use."""


@dataclass(frozen=True)
class Imported:
    """A run that was made of a file."""

    folder: Path
    config: ResolvedConfig
    recipe: str
    told: tuple[str, ...]
    """What the weights lacked, or had too much, a phrase each."""


def import_run(
    file: str,
    folder: Path,
    project: str | None = None,
    *,
    heads: int | None = None,
    channels: int = 4,
    null_row: bool = True,
    vae: str | None = None,
    licence: str = "",
    data: Mapping[str, Any] | None = None,
) -> Imported:
    """Make a run of a released checkpoint. Nothing is written unless everything fits.

    Args:
        file: a .safetensors or .pt file, or `hub:OWNER/NAME[:FILE]`.
        folder: of the run; new or empty.
        project: a key of `PROJECTS`; None recognises it.
        heads, channels, null_row: as for `load_released`.
        vae: autoencoder that turns samples into images where no data set is given; None: `ema` for latents
            of four channels.
        licence: of the weights, to be kept with them.
        data: fields of the section `data`, where the data set is at hand.

    Raises:
        UserError: the file cannot be read, is of no known layout, or fits the data set or folder not.
    """
    refuse_used(folder)
    path = fetch_weights(file)
    weights = read_weights(path)
    fitting = recognise(weights)
    stated = stated_project(path)
    project = project or (stated if stated in PROJECTS else None)
    project = project or (fitting[0] if len(fitting) == 1 else None)
    if project is None:
        raise UserError(
            f"{file} has the layout of {' and '.join(fitting)}, which mean different things by it: "
            "--from says which"
        )
    if PROJECTS[project] == "sra" and fitting == ("dit",):
        project = "dit"  # SRA trains DiTs too
    options = (PROJECTS[project], heads, channels, null_row)
    trained = read_weights(path, "raw")
    ema, dimensions = translate(weights, *options)
    raw, _ = translate(trained, *options)
    ema, raw = (
        ours | {name: value for name, value in theirs.items() if name.startswith("projectors.")}
        for ours, theirs in ((ema, weights), (raw, trained))
    )
    name, settings = _settings(project, dimensions, ema, null_row)
    own = dict(data or {})
    if "name" not in own:
        latents = dimensions.channels == LATENT_CHANNELS
        own = {"name": "none", **own}
        settings["data.sources.none.vae"] = ("ema" if latents else "") if vae is None else vae
    config = recipe(name, settings | {f"data.{field}": value for field, value in own.items()})
    source = open_data(config.data) if config.data.source.holds_images else None
    resolved = (
        resolve(config)
        if source is None
        else resolve(config, source.channels, source.image_size, source.num_classes)
    )
    student = build_student(resolved)
    told = load_start(Start(raw, ema), student, ())
    average = build_student(resolved)
    load_start(Start(ema, ema), average, ())
    made = missing_folders(folder)
    try:
        with locked(folder, "is in use: another process writes it"), _emptied_if_it_fails(folder):
            optimizer = make_optimizer(resolved, student)
            state = CheckpointState(0, optimizer=resolved.training.optimizer)
            save_checkpoint(folder / CHECKPOINTS, student, average, optimizer, state, keep=1)
            write_json(folder / ORIGIN, _origin(file, path, project, licence))
            if source is None:
                write_record(folder, resolved, "none", ())
            else:
                write_config(folder, resolved, source)
    finally:
        remove_empty(made)
    return Imported(folder, resolved, name, tuple(told))


@contextmanager
def _emptied_if_it_fails(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        empty(folder)
        raise


def _settings(
    project: str, dimensions: Dimensions, weights: Weights, null_row: bool
) -> tuple[str, dict[str, Any]]:
    """The recipe that weights are a point of, and its settings."""
    size = Size(dimensions.hidden_size, dimensions.depth, dimensions.heads)
    settings: dict[str, Any] = {
        "model.size": size_name(size, dimensions.patch_size),
        "model.channels": dimensions.channels,
        "model.image_size": dimensions.image_size,
        "model.num_classes": dimensions.num_classes,
        "model.qk_norm": dimensions.qk_norm,
    }
    if not null_row:
        settings["views.class_dropout"] = 0.0
    if project == "dit":
        settings["model.backbone"] = "dit"
        settings["backbones.dit.learned_sigma"] = dimensions.out_channels > dimensions.channels
        return "sit", settings
    if project == "repa":
        return _repa(weights, settings)
    return project, settings


def _repa(weights: Weights, settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """REPA with its projector, where there is one; of several, the encoders' names are not known."""
    last = {
        match[1]: tensor
        for name, tensor in weights.items()
        if (match := _LAST_LAYER.fullmatch(name))
    }
    if set(last) != {"0"}:
        return "sit", settings
    width, inner = last["0"].shape
    settings["targets.frozen-encoder.widths"] = (width,)
    settings["projectors.mlp3.width"] = inner
    return "repa", settings


_LAST_LAYER = re.compile(r"projectors\.(\d+)\.4\.weight")


def _origin(file: str, path: Path, project: str, licence: str) -> dict[str, Any]:
    with path.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {
        "file": file if file.startswith("hub:") else path.name,
        "sha256": digest,
        "from": project,
        "licence": licence,
        "selfalign_version": selfalign.__version__,
    }
