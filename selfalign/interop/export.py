"""Runs as other projects read them: a diffusers folder, a folder of the hub, weights in SiT's own form."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from selfalign.backbones.diffusers.model import Adapter, save_folder
from selfalign.backbones.sit.model import SiT
from selfalign.card import model_card
from selfalign.data.latents.autoencoder import Decoder, store_autoencoder
from selfalign.disk import require_writable, write_whole
from selfalign.errors import UserError
from selfalign.interop import portable
from selfalign.interop.card import card_facts
from selfalign.interop.released import LAST_LAYER, turn_around
from selfalign.records import write_json
from selfalign.runs.load import LoadedRun
from selfalign.weights import write_safetensors

Format = Literal["diffusers", "safetensors", "sit"]
PIPELINE, TRANSFORMER = "pipeline_selfalign", "transformer_selfalign"
DIFFUSERS_FORMAT = "0.31.0"
"""The oldest version of diffusers that the files are written for."""


def export_run(
    run: LoadedRun, folder: Path, format: Format, *, licence: str = "", vae: bool = True
) -> Path:
    """Write a run's model as a folder that needs nothing of this package's files.

    Args:
        run: from `load_run`.
        folder: new or empty.
        format: `diffusers`, a pipeline of its own, or of a transformer of diffusers the folder that it
            came from, with new weights; `safetensors`, which `SiT.from_pretrained` opens; `sit`, weights in
            SiT's naming, time and sign.
        licence: of the weights; left out: that of the weights they came from.
        vae: whether a diffusers folder of latents gets the autoencoder.

    Raises:
        UserError: the folder is in use, or the form cannot hold this model.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: allowed is a new or an empty folder")
    require_writable(folder.parent)
    write = _writer(run, format, licence, vae)
    if folder.exists():
        folder.rmdir()
    write_whole(folder, write)
    return folder


def _writer(run: LoadedRun, format: Format, licence: str, vae: bool) -> Callable[[Path], None]:
    """What writes the folder. Arguments and errors as of `export_run`."""
    model = run.model
    if isinstance(model, Adapter) and format == "diffusers":
        return lambda place: save_folder(model, place)
    if not isinstance(model, SiT) or model.predicts != "velocity" or len(model.image_size) != 2:
        raise UserError(
            f"{run.folder} has the backbone {run.config.model.backbone!r} for samples of "
            f"{len(model.image_size)} axes: exported are SiTs of images, and transformers of diffusers to "
            "the format diffusers"
        )
    if model.condition.attends:
        raise UserError(
            f"{run.folder} reads texts: no format of export holds its encoder; load_run opens it"
        )
    facts = card_facts(run, licence)
    writers: dict[Format, Callable[[], Callable[[Path], None]]] = {
        "diffusers": lambda: _diffusers(run, model, facts, vae),
        "safetensors": lambda: _safetensors(model, facts),
        "sit": lambda: _sit(model, facts),
    }
    return writers[format]()


def sit_weights(model: SiT) -> dict[str, Tensor]:
    """The weights under SiT's names, at its time and sign, with rows of zeros for the sigma it learns.

    Raises:
        UserError: SiT's code has no such model.
    """
    sides, arguments = model.image_size, model.hub_config()
    if model.num_classes == 0 or sides[0] != sides[1] or arguments["qk_norm"]:
        raise UserError(
            "SiT's code has classes, square images and no normalised queries: allowed are the formats "
            "diffusers and safetensors"
        )
    weights = turn_around(model.plain_state(), model.t_embedder.frequencies)
    for name in LAST_LAYER:
        per_position = weights[name].unflatten(0, (-1, model.channels))
        padded = torch.cat([per_position, torch.zeros_like(per_position)], dim=1)
        weights[name] = padded.flatten(0, 1)
    return weights


def _safetensors(model: SiT, facts: dict[str, Any]) -> Callable[[Path], None]:
    def write(place: Path) -> None:
        model.save_pretrained(place, model_card_kwargs=facts)

    return write


def _sit(model: SiT, facts: dict[str, Any]) -> Callable[[Path], None]:
    weights = sit_weights(model)
    card = model_card(
        "sit",
        side=model.image_size[0],
        classes=model.num_classes,
        size=f"{len(model.blocks)} blocks of width {model.hidden_size}, patch {model.patch_size}",
        **facts,
    )

    def write(place: Path) -> None:
        place.mkdir()
        write_safetensors(place / "model.safetensors", weights, {"format": "pt", "from": "sit"})
        (place / "README.md").write_text(card)

    return write


def _diffusers(
    run: LoadedRun, model: SiT, facts: dict[str, Any], vae: bool
) -> Callable[[Path], None]:
    decoder = run.decoder if vae and run.config.data.source.decodes else None
    autoencoder = decoder.autoencoder if isinstance(decoder, Decoder) else None
    arguments = model.hub_config()
    del arguments["out_channels"]  # those of the input
    index: dict[str, Any] = {
        "_class_name": [PIPELINE, "SelfAlignPipeline"],
        "_diffusers_version": DIFFUSERS_FORMAT,
        "transformer": [TRANSFORMER, "SelfAlignTransformer"],
        "vae": ["diffusers", type(autoencoder).__name__] if autoencoder else [None, None],
        "path": run.config.flow.path,
        "class_names": {str(label): name for label, name in enumerate(run.class_names)},
    }
    if isinstance(decoder, Decoder):
        index |= {"latent_scale": decoder.scale, "latent_shift": decoder.shift}
    example = "class_labels=[0, 1, 2], " if model.num_classes else "num_images=3, "
    card = model_card("diffusers", example=example, **facts)

    def write(place: Path) -> None:
        inner = place / "transformer"
        inner.mkdir(parents=True)
        own = Path(portable.__file__).parent
        shutil.copyfile(own / f"{PIPELINE}.py", place / f"{PIPELINE}.py")
        shutil.copyfile(own / f"{TRANSFORMER}.py", inner / f"{TRANSFORMER}.py")
        write_safetensors(
            inner / "diffusion_pytorch_model.safetensors", model.plain_state(), {"format": "pt"}
        )
        own_config = {"_class_name": "SelfAlignTransformer", "_diffusers_version": DIFFUSERS_FORMAT}
        write_json(inner / "config.json", own_config | arguments)
        write_json(place / "model_index.json", index)
        (place / "README.md").write_text(card)
        if autoencoder is not None:
            store_autoencoder(autoencoder, place / "vae")

    return write
