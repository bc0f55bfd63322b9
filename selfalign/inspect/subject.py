"""What is looked into: a run or a released checkpoint, with data to show it, and its settings."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from selfalign.backbones.sit.sizes import Size, size_name
from selfalign.config import ResolvedConfig, override, resolve
from selfalign.data.datasets import open_data
from selfalign.data.source import DataSource
from selfalign.errors import UserError
from selfalign.evaluation.features import FeatureNetwork, feature_network
from selfalign.interop.released import Source, load_released
from selfalign.network import Backbone, Tap
from selfalign.recipes import recipe
from selfalign.runs.folder import CHECKPOINTS, read_record
from selfalign.runs.load import LoadedRun, load_run
from selfalign.training.checkpoint import checkpoints, step_of
from selfalign.training.tracking import FOR_CURVES, read_metrics

RECIPE_OF: dict[Source, str] = {"self-flow": "self-flow", "sra": "sra"}
"""The recipe that released checkpoints stand for where none is named; `sit` for all others."""
ENCODED_AT_ONCE = 64

Models = Callable[[], tuple[Backbone, Backbone]]
"""Loads student and teacher of a checkpoint."""


@dataclass(frozen=True)
class Subject:
    """A model, its data and its settings."""

    name: str
    """What pages call it."""
    folder: Path
    """Where its report goes, in a folder `inspect`."""
    model: Backbone
    """What is looked into, in eval mode: the average of the weights, or the trained ones if asked for."""
    student: Backbone
    """The trained weights, with the heads of the terms."""
    teacher: Backbone
    """Their average. A release has one set of weights, which is all three."""
    config: ResolvedConfig
    source: DataSource
    step: int | None = None
    """None for a release, which does not say."""
    metrics: Sequence[Mapping[str, Any]] = ()
    """The lines of a run's metrics.jsonl."""
    twin: Backbone | None = None
    """Another seed of the same training."""
    find_encoder: Callable[[], FeatureNetwork | None] = lambda: None
    """Makes `encoder`: a classifier is trained, and only if something is compared with it."""
    load: Mapping[int, Models] = field(default_factory=dict)
    """The other checkpoints of a run, by step."""

    @functools.cached_property
    def encoder(self) -> FeatureNetwork | None:
        """For Fréchet distances, and to compare features with."""
        return self.find_encoder()

    @property
    def aligned(self) -> tuple[Tap, Tap] | None:
        """The blocks that the recipe aligns, student's and teacher's; None if not with the EMA teacher."""
        terms, targets = self.config.used_terms(), self.config.used_targets()
        if "alignment" not in terms or "ema" not in targets:
            return None
        student: Tap = getattr(terms["alignment"], "tap")(self.config)  # noqa: B009 – of this term only
        teacher: Tap = getattr(targets["ema"], "tap")(self.config)  # noqa: B009
        return student, teacher

    def checkpoints(self, most: int) -> Iterator[tuple[int, Models]]:
        """At most so many of a run's checkpoints, evenly spread, the one that is looked into the last."""
        steps = sorted(self.load)
        earlier = steps[:: max(1, -(-len(steps) // max(1, most - 1)))]
        yield from ((step, self.load[step]) for step in earlier)
        yield self.step or 0, lambda: (self.student, self.teacher)

    def decode(self, samples: Float[Tensor, "B C *sides"]) -> Float[Tensor, "B C H W"]:
        """From the model's space to images in [-1, 1].

        Raises:
            UserError: latents whose decoder is not here.
        """
        return self.source.decode(samples.float())

    @torch.no_grad()
    def encode(self, images: UInt8[Tensor, "M C H W"]) -> Float[Tensor, "M F"]:
        """The encoder's features of images."""
        assert self.encoder is not None
        module = self.encoder.module.to(self.model.device).eval()
        parts = images.to(self.model.device).split(ENCODED_AT_ONCE)
        return torch.cat([module(part)["features"].float().cpu() for part in parts])


@dataclass(frozen=True)
class Release:
    """What a released checkpoint does not say of itself."""

    source: Source | None = None
    """The project that it comes from, where its layout fits several: sit, repa, self-flow or sra."""
    recipe: str | None = None
    """The recipe whose views and terms it is looked at with; left out: that of its project."""
    heads: int | None = None
    """Attention heads, where its width is of no named size."""
    channels: int = 4
    """Channels of a Self-Flow checkpoint."""
    null_row: bool = True
    """Whether its last label is the null class."""


def open_subject(
    path: Path,
    *,
    weights: Literal["ema", "raw"] = "ema",
    step: int | None = None,
    data: Mapping[str, Any] | None = None,
    beside: Path | None = None,
    features: str | None = None,
    release: Release | None = None,
    device: torch.device | str = "cpu",
) -> Subject:
    """Open a run, or a released checkpoint with a data set of its images.

    Args:
        path: a run's folder, or a .safetensors or .pt file.
        weights: which of a run's are looked into.
        step: of which of a run's checkpoints; None for the last one.
        data: fields of the section `data`; of a run only `root`, which may have moved.
        beside: another seed of the same training: a run, or a file of the same release.
        features: the encoder's name; None for the data set's classifier where it has small images.
        release: what a released checkpoint does not say.
        device: where to.

    Raises:
        UserError: something is missing, damaged, or does not fit.
    """
    given, release = dict(data or {}), release or Release()
    if path.is_file():
        subject = _of_release(path, given, release, device)
        twin = None if beside is None else _release(beside, release).to(device)
    else:
        extra = sorted(set(given) - {"root"})
        own = read_record(path).config.data.source.holds_images
        if extra and own:
            raise UserError(
                f"data.{extra[0]} is {given[extra[0]]!r}: a run knows its data; allowed is data.root"
            )
        subject = _of_run(path, weights, step, given if not own else given.get("root"), device)
        twin = None if beside is None else load_run(beside, weights, device).model
    if subject.model.predicts != "velocity":
        raise UserError(
            f"{path} predicts {subject.model.predicts} at diffusion steps of its own, and what is looked "
            "into predicts velocities (Eq. 2): it can be sampled and evaluated"
        )
    if twin is not None:
        _require_alike(beside, subject.model, twin)
    find_encoder = _encoder(features, subject.config, subject.source)
    return replace(subject, twin=twin, find_encoder=find_encoder)


def _of_run(
    folder: Path,
    weights: Literal["ema", "raw"],
    step: int | None,
    data: str | Mapping[str, Any] | None,
    device: torch.device | str,
) -> Subject:
    """A run with its data, whose root may have moved; or imported weights with fields of the section."""
    root = None if isinstance(data, Mapping) else data
    run = load_run(folder, "ema", device, step=step, data_root=root)
    config, source = _shown(run, data) if isinstance(data, Mapping) else (run.config, run.source)
    student = load_run(folder, "raw", device, step=run.step).model

    def models(step: int) -> tuple[Backbone, Backbone]:
        return (
            load_run(folder, "raw", device, step=step).model,
            load_run(folder, "ema", device, step=step).model,
        )

    steps = [step_of(path) for path in checkpoints(folder / CHECKPOINTS)]
    return Subject(
        name=folder.resolve().name,
        folder=folder,
        model=run.model if weights == "ema" else student,
        student=student,
        teacher=run.model,
        config=config,
        source=source,
        step=run.step,
        metrics=read_metrics(folder, FOR_CURVES),
        load={s: functools.partial(models, s) for s in steps if s < run.step},
    )


def _shown(run: LoadedRun, data: Mapping[str, Any]) -> tuple[ResolvedConfig, DataSource]:
    """What imported weights are shown that came without images."""
    if "name" not in data:
        raise UserError(
            f"{run.folder} was imported without images: --data.name names a data set to show it"
        )
    config = override(run.config, {f"data.{field}": value for field, value in data.items()})
    source = open_data(config.data)
    return resolve(config, source.channels, source.image_size, source.num_classes), source


def _of_release(
    path: Path, data: Mapping[str, Any], release: Release, device: torch.device | str
) -> Subject:
    if "name" not in data:
        raise UserError(
            f"{path} is a released checkpoint, which brings no images: --data.name names a data set, as in "
            "--data.name latents --data.root FOLDER"
        )
    model = _release(path, release).eval().requires_grad_(False).to(device)
    block: Any = model.blocks[0]
    size = Size(model.hidden_size, len(model.blocks), block.attn.heads)
    name = release.recipe or RECIPE_OF.get(release.source or "sit", "sit")
    config = recipe(
        name,
        {
            "model.size": size_name(size, model.patch_size),
            "model.num_classes": model.num_classes,
            **{f"data.{field}": value for field, value in data.items()},
        },
    )
    source = open_data(config.data)
    shapes = [(of.channels, *of.image_size) for of in (model, source)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"{path} is a model of samples of the shape {shapes[0]}, and data.name {config.data.name} has "
            f"{shapes[1]} (channels, height, width): both must be the same"
        )
    config = resolve(config, source.channels, source.image_size, source.num_classes)
    return Subject(
        name=path.name,
        folder=path.with_suffix(""),
        model=model,
        student=model,
        teacher=model,
        config=config,
        source=source,
    )


def _release(path: Path, release: Release) -> Backbone:
    return load_released(
        path,
        release.source,
        heads=release.heads,
        channels=release.channels,
        null_row=release.null_row,
    )


def _require_alike(path: Path | None, model: Backbone, twin: Backbone) -> None:
    """Another seed has the same shape."""
    shapes = [
        (len(of.blocks), of.hidden_size, of.channels, *of.image_size, of.num_classes)
        for of in (model, twin)
    ]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"--beside is {str(path)!r}: another seed has the same model and data (blocks, width, channels, "
            f"sides, classes {shapes[0]}), this one has {shapes[1]}"
        )


def _encoder(
    features: str | None, config: ResolvedConfig, source: DataSource
) -> Callable[[], FeatureNetwork | None]:
    """The named network, loaded; the classifier of small images, once it is asked for; else none."""
    chosen = config.data.source
    if features is None and (not chosen.small or chosen.decodes or source.num_classes < 2):
        return lambda: None
    if chosen.decodes:  # what cannot be decoded is told before anything is computed
        source.decode(torch.zeros(1, source.channels, *source.image_size))
    if features in (None, "classifier"):
        return lambda: feature_network("classifier", source, config.data.name)
    network = feature_network(features, source, config.data.name)
    return lambda: network
