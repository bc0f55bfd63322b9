"""A trained run, loaded for sampling and evaluating."""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import selfalign
from selfalign.config import ResolvedConfig, override, resolve
from selfalign.data.datasets import open_data
from selfalign.data.shapes import as_pictures
from selfalign.data.source import DataSource
from selfalign.errors import UserError
from selfalign.network import Backbone
from selfalign.runs.data import check_data, open_recorded
from selfalign.runs.folder import CHECKPOINTS, read_record, recorded_data
from selfalign.sampling.settings import SamplingConfig
from selfalign.student import build_student
from selfalign.training.checkpoint import (
    choose_checkpoint,
    load_weights,
    step_of,
    weights_file,
)


@dataclass(frozen=True)
class LoadedRun:
    """A trained model and what it was trained with."""

    folder: Path
    config: ResolvedConfig
    model: Backbone
    step: int
    class_names: tuple[str, ...] = ()
    """By label; the model may have more classes than names."""
    fingerprint: str | None = None
    """Of the data that it was trained on; None where that is not checked."""

    def decode(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """From the model's space to images in [-1, 1]; only latents and their like need the data set for it.

        Raises:
            UserError: that data set is not there, or is another than that of the training.
        """
        return self.decoder(images)

    @functools.cached_property
    def decoder(self) -> Callable[[Tensor], Tensor]:
        """What `decode` calls."""
        data = self.config.data
        if not data.source.decodes:
            return lambda images: images
        return data.source.decoder(data) or self.source.decode

    @functools.cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """C, H and W of a decoded sample as a picture. Raises what `decode` raises."""
        model = self.model
        with torch.no_grad():
            latent = torch.zeros(1, model.channels, *model.image_size, device=model.device)
            channels, height, width = as_pictures(self.decode(latent)).shape[1:]
        return channels, height, width

    @functools.cached_property
    def source(self) -> DataSource:
        """The data set that it was trained on; what has changed in it is warned of.

        Raises:
            UserError: it is not there, or is another one.
        """
        if self.fingerprint is None:
            return open_data(self.config.data)
        recorded = recorded_data(self.folder, self.fingerprint)
        source = open_recorded(self.config.data, recorded)
        remedy = "--data.root names the place of that which it was trained on"
        if told := check_data(self.folder, recorded, source, True, remedy):
            warnings.warn(told, stacklevel=2)
        return source


def load_run(
    folder: Path | str,
    weights: str = "ema",
    device: torch.device | str = "cpu",
    *,
    step: int | None = None,
    data_root: str | None = None,
) -> LoadedRun:
    """The model of one of a run's checkpoints, in eval mode.

    Nothing is written, and of the checkpoint only these weights and the state are needed.

    Args:
        folder: of the run.
        weights: `ema`, the average; `ema:DECAY`, another one that the run keeps; `raw`, the trained ones.
        device: where to.
        step: of which checkpoint; None for the last one.
        data_root: where the data is now; None: where it was.

    Raises:
        UserError: there is no run, no whole checkpoint, or no such average.
    """
    folder = Path(folder)
    record = read_record(folder)
    config = record.config
    if data_root is not None:
        if not Path(data_root).exists():
            raise UserError(f"data.root is {data_root!r}: there is no such folder")
        config = override(config, {"data.root": data_root})
    resolved = resolve(config)
    file = weights_file(weights, config.training.ema_decays)
    checkpoint = choose_checkpoint(folder / CHECKPOINTS, step, [file])
    model = build_student(resolved)
    model.describe(record.class_names)
    load_weights(checkpoint, model, file)
    model.eval().requires_grad_(False)
    return LoadedRun(
        folder,
        resolved,
        model.to(device),
        step_of(checkpoint),
        record.class_names,
        record.fingerprint,
    )


def sampling_record(run: LoadedRun, sampling: SamplingConfig, **more: Any) -> dict[str, Any]:
    """Every setting that a set of samples depends on, as JSON can hold it."""
    return {
        "run": str(run.folder),
        "step": run.step,
        "selfalign_version": selfalign.__version__,
        **sampling.record(),
        **more,
    }
