"""What an evaluation stands on: the run, the data set, the feature network, the processes."""

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from selfalign import parts
from selfalign.data.datasets import open_data, whole_fingerprint
from selfalign.data.latents.autoencoder import Decoder
from selfalign.data.source import DataSource
from selfalign.errors import UserError
from selfalign.evaluation.config import EvaluationConfig, EvaluationData, Progress
from selfalign.evaluation.features import FeatureNetwork, extract, feature_network
from selfalign.evaluation.generation import PlannedSamples, plan_samples
from selfalign.evaluation.inputs import ImageSet, open_images, open_split
from selfalign.evaluation.reference import ReferenceSource, open_reference
from selfalign.processes import main_process_first, together
from selfalign.runs.data import check_data, open_recorded
from selfalign.runs.folder import recorded_data
from selfalign.runs.load import LoadedRun, load_run
from selfalign.sampling.settings import SamplingConfig
from selfalign.sections import DataConfig


@dataclass(frozen=True)
class Setup:
    """All that is opened before anything is computed."""

    subject: Path
    config: EvaluationConfig
    run: LoadedRun | None
    """The subject, where it is a run."""
    data: DataConfig | None
    source: DataSource | None
    """The opened data set: a classifier is trained on it, a run's denoising loss measured."""
    changed: str
    """What has become of the data of a run since it was started; empty if nothing has."""
    reference: ReferenceSource
    samples: ImageSet | PlannedSamples
    """The set of samples, or what a run is to be sampled to."""
    network: FeatureNetwork
    accelerator: Accelerator
    progress: Progress

    def parts(self, images: ImageSet) -> Iterator[dict[str, Float[Tensor, "M F"]]]:
        """A set's features, a part at a time."""
        return extract(
            self.network, images, self.accelerator, self.config.batch_size, self.progress
        )

    def features(self, images: ImageSet, kinds: frozenset[str]) -> dict[str, Float[Tensor, "M F"]]:
        """A set's features of some kinds, all at once."""
        if not kinds:
            return {}
        found = list(self.parts(images))
        return {kind: torch.cat([part[kind] for part in found]) for kind in sorted(kinds)}


def open_setup(
    subject: Path,
    config: EvaluationConfig,
    sampling: SamplingConfig,
    accelerator: Accelerator,
    progress: Progress,
    run: LoadedRun | None,
) -> Setup:
    """Open everything, what is quickly opened first. Arguments as for `evaluate`.

    Raises:
        UserError: something is missing, damaged, or not named though it is needed.
    """
    if run is None and os.path.isfile(subject / "config.json"):  # noqa: PTH113 – any name will do
        moved = config.data.root if config.data.name is None else None
        run = load_run(
            subject, config.weights, accelerator.device, step=config.step, data_root=moved
        )
    elif run is None and config.step is not None:
        raise UserError(f"--step is {config.step}: {subject} is no run, which alone has steps")
    elif not os.path.exists(subject):  # noqa: PTH110
        raise UserError(
            f"{subject} does not exist: allowed are a run, a .npz or a folder of images"
        )
    data = _data_config(config, run)
    source, changed = None, ""
    if data is not None and run is not None and _given(config.data).keys() <= {"root"}:
        source, changed = _open_data_of(run, data, accelerator)
    elif data is not None:
        source = _open_data(data, accelerator)
    reference = _open_reference(config, data, source, accelerator)
    with together(accelerator):
        samples = _open_samples(subject, config, sampling, run, source)
    network = _open_network(config, data, source, accelerator)
    return Setup(
        subject,
        config,
        run,
        data,
        source,
        changed,
        reference,
        samples,
        network,
        accelerator,
        progress,
    )


def default_features(data: DataConfig | None) -> str:
    """The feature network where none is named."""
    return "classifier" if data is not None and data.source.small else "inception"


def _data_config(config: EvaluationConfig, run: LoadedRun | None) -> DataConfig | None:
    """The data set in play: given, or the run's, or the reference's."""
    given = _given(config.data)
    if run is not None and not (run.config.data.source.holds_images or "name" in given):
        return None  # of imported weights; what is missing is told where it is needed
    if run is not None:  # all of its data set, whatever share of it the run was trained on
        return dataclasses.replace(run.config.data, **{"train_fraction": 1.0, **given})
    if "name" not in given and config.reference in parts.names("source"):
        given["name"] = config.reference
    return DataConfig(**given) if "name" in given else None


def _given(data: EvaluationData) -> dict[str, Any]:
    """The settings that were not left out."""
    return {k: v for k, v in dataclasses.asdict(data).items() if v is not None and v is not False}


def _open_data(data: DataConfig, accelerator: Accelerator) -> DataSource:
    return main_process_first(accelerator, lambda: open_data(data))


def _open_data_of(
    run: LoadedRun, data: DataConfig, accelerator: Accelerator
) -> tuple[DataSource, str]:
    """A run's data set in the split of its training, and what has become of it since."""
    if run.fingerprint is None:
        return _open_data(data, accelerator), ""
    whole = whole_fingerprint(run.fingerprint, run.config.data)
    with together(accelerator):
        recorded = recorded_data(run.folder, whole)
    source = main_process_first(accelerator, lambda: open_recorded(data, recorded))
    with together(accelerator):
        remedy = "--data.name and --data.root compare the run with other data"
        return source, check_data(run.folder, recorded, source, True, remedy)


def _open_reference(
    config: EvaluationConfig,
    data: DataConfig | None,
    source: DataSource | None,
    accelerator: Accelerator,
) -> ReferenceSource:
    """The reference: a data set with its held-out images, a file, or a folder."""
    target = config.reference or (data.name if data else None)
    if target is None:
        raise UserError(
            f"--reference is left out: needed is one of {', '.join(parts.names('source'))}, a .npz or "
            "a folder"
        )
    if target not in parts.names("source"):
        return open_reference(Path(target), config.data.background or "white")
    if source is None or data is None or data.name != target:
        wanted = dataclasses.replace(data or DataConfig(), name=target)
        source = _open_data(wanted, accelerator)
    _require_images(target, source, "a reference is of")
    train = open_split(target, source, "training")
    return ReferenceSource(
        train.name, train.fingerprint, train, heldout=open_split(target, source, "held-out")
    )


def _open_samples(
    subject: Path,
    config: EvaluationConfig,
    sampling: SamplingConfig,
    run: LoadedRun | None,
    source: DataSource | None,
) -> ImageSet | PlannedSamples:
    if run is not None:
        return plan_samples(run, config, sampling, source)
    images = open_images(subject, config.data.background or "white")
    return images.first(config.num or len(images))


def _open_network(
    config: EvaluationConfig,
    data: DataConfig | None,
    source: DataSource | None,
    accelerator: Accelerator,
) -> FeatureNetwork:
    name = config.features or default_features(data)
    if name == "classifier" and data is not None and source is not None:
        _require_images(data.name, source, "--features classifier is trained on")
    data_name = data.name if data else ""
    return main_process_first(accelerator, lambda: feature_network(name, source, data_name))


def _require_images(name: str, source: DataSource, what: str) -> None:
    """Latents look like images of another number of channels, and would be compared as such."""
    if isinstance(source.decode, Decoder):
        raise UserError(
            f"{what} images, and {name} holds latents: --reference takes a .npz or a folder of the "
            "images they were made of, and --features another network than the classifier"
        )
