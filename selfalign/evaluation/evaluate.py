"""From a run or a set of samples to a table of metrics, `evaluation.json` and a picture."""

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

import selfalign
from selfalign.config import DataConfig
from selfalign.data import DataSource, open_data
from selfalign.disk import write_whole
from selfalign.errors import UserError
from selfalign.evaluation.estimate import GROUPS, Estimate
from selfalign.evaluation.features import FeatureNetwork, extract, feature_network
from selfalign.evaluation.frechet import frechet_estimate
from selfalign.evaluation.generation import generate_samples, samples_folder
from selfalign.evaluation.inputs import ImageSet, open_images, open_split
from selfalign.evaluation.metrics import (
    KID_SUBSET_SIZE,
    KID_SUBSETS,
    class_consistency,
    draw_subsets,
    inception_score,
    kernel_distance,
    memorisation,
)
from selfalign.evaluation.neighbours import NEIGHBOURS, nearest, precision_recall
from selfalign.evaluation.reference import (
    Reference,
    measure,
    neighbour_images,
    open_reference,
    write_reference,
)
from selfalign.evaluation.report import Evaluation, NeighbourRow, draw_evaluation
from selfalign.processes import main_process_first, together
from selfalign.run import LoadedRun, load_run, sampling_record
from selfalign.sampling.generate import SamplingConfig
from selfalign.training.heldout import HeldOutLoss, heldout_loss

MetricName = Literal[
    "fid",
    "sfid",
    "is",
    "kid",
    "fd",
    "precision-recall",
    "consistency",
    "memorisation",
    "denoising",
]
DATA_SETS: tuple[str, ...] = get_args(DataConfig.__annotations__["name"])
SMALL_DATA = ("digits", "mnist", "fashion-mnist")
"""Data sets on which Inception makes no sense; their own classifier is the default there."""
RUN_SAMPLES = 1000
"""Samples of a run where --num is left out."""
PUBLISHED_SAMPLES = 50_000
DENOISING_SAMPLES = 4000
"""Pairs of a held-out image and a timestep, the same for all runs on a data set."""
SHOWN = 10
"""Samples in a row of the picture."""

COMPARED: frozenset[MetricName] = frozenset({"fid", "sfid", "fd", "precision-recall"})
"""Metrics that are measured of held-out images too."""

Progress = Callable[[str, int, int], None]
"""Told what is being done, and how much of how much."""


@dataclass(frozen=True)
class EvaluationData:
    """The data set that a classifier is trained on, and that a run's held-out images come from. What
    is left out comes from the run, or else from --reference."""

    name: str | None = None
    """digits, mnist, fashion-mnist, cifar10 or folder."""
    root: str | None = None
    """Folder that holds its files."""
    image_size: int | None = None
    """Side of the square that a folder's images are cropped and resized to."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What is compared with what, and how."""

    reference: str | None = None
    """A data set (its training split), a .npz (ADM reference batch or samples) or a folder of images;
    left out: the data set."""
    features: str | None = None
    """inception, dinov2, classifier or timm:NAME; left out: classifier for digits, mnist and
    fashion-mnist, else inception."""
    metrics: tuple[MetricName, ...] = ()
    """Which metrics; left out: all that inputs and features allow."""
    num: int | None = None
    """How many samples; left out: 1000 of a run, all of a file or folder."""
    out: Path | None = None
    """Folder for evaluation.json and evaluation.png; left out: beside the samples."""
    weights: Literal["ema", "raw"] = "ema"
    """Which weights of a run are sampled from."""
    batch_size: int = 64
    """Images at once in each process."""
    inception_splits: int = GROUPS
    """Splits of the Inception Score; ADM's are of 5,000 samples each: 10 for 50,000, 2 for 10,000."""
    write_reference: Path | None = None
    """Also write the reference in ADM's format, to this .npz."""
    data: EvaluationData = field(default_factory=EvaluationData)

    def __post_init__(self) -> None:
        for name in ("num", "batch_size", "inception_splits"):
            value = getattr(self, name)
            if value is not None and value < 1:
                option = name.replace("_", "-")
                raise UserError(f"--{option} is {value}: allowed is a number from 1")


@dataclass(frozen=True)
class _Setting:
    """What an evaluation stands on."""

    subject: Path
    config: EvaluationConfig
    run: LoadedRun | None
    """The subject, where it is a run."""
    data: DataConfig | None
    source: DataSource | None
    """The opened data set, on which a classifier is trained."""
    network: FeatureNetwork
    accelerator: Accelerator
    progress: Progress

    def parts(self, images: ImageSet) -> Iterator[dict[str, Float[Tensor, "M F"]]]:
        """A set's features, a part at a time."""
        return extract(
            self.network, images, self.accelerator, self.config.batch_size, self.progress
        )

    def features(self, images: ImageSet) -> dict[str, Float[Tensor, "M F"]]:
        """A set's features, all at once."""
        found = list(self.parts(images))
        return {kind: torch.cat([part[kind] for part in found]) for kind in found[0]}


def evaluate(
    subject: Path,
    config: EvaluationConfig,
    sampling: SamplingConfig,
    accelerator: Accelerator,
    progress: Progress = lambda what, done, total: None,
    run: LoadedRun | None = None,
) -> Evaluation | None:
    """Evaluate a run, or a set of samples; writes evaluation.json and evaluation.png.

    Args:
        subject: a run's folder, a .npz of samples, or a folder of images.
        config: what to compare with, and how.
        sampling: how a run is sampled.
        accelerator: processes and device.
        progress: told of long work.
        run: the subject, where it is a run that is loaded already.

    Returns:
        What was measured, in the main process; None in the others, which only share the work.

    Raises:
        UserError: inputs that are missing, damaged, or do not fit together or the metrics.
    """
    setting = _open(subject, config, accelerator, progress, run)
    reference, heldout = _reference(setting)
    samples, folder, made = _samples(setting, sampling, reference)
    chosen = _choose_metrics(setting, samples, reference, heldout)

    features = setting.features(samples) if set(chosen) - {"denoising", "memorisation"} else {}
    heldout_features: dict[str, Tensor] = {}
    if heldout is not None and COMPARED & set(chosen):
        # As many as samples, where there are: the bias of a Fréchet distance goes with the number.
        heldout_features = setting.features(heldout.first(min(len(heldout), len(samples))))

    evaluation = None
    with together(accelerator):
        if accelerator.is_main_process:
            progress("metrics", 0, 1)
            metrics = _compare(chosen, features, reference, setting)
            if "consistency" in chosen:
                assert samples.labels is not None
                metrics["class_consistency"] = class_consistency(features["logits"], samples.labels)
            rows: list[NeighbourRow] = []
            if "memorisation" in chosen:
                assert heldout is not None and reference.images is not None
                found, rows = _memorisation(samples, heldout, reference.images)
                metrics.update(found)
            elif reference.images is not None and reference.features is not None and features:
                rows = _nearest_in_features(samples, features["features"], reference)
            baseline: dict[str, Estimate] = {}
            if heldout_features and len(heldout_features["features"]) >= 2 * GROUPS:
                baseline = _compare(
                    sorted(COMPARED & set(chosen)), heldout_features, reference, setting
                )
            progress("metrics", 1, 1)
            evaluation = Evaluation(
                folder,
                metrics,
                baseline,
                _denoising(setting) if "denoising" in chosen else {},
                _settings(setting, samples, made, reference),
                _notes(setting.network, features, metrics, len(samples)),
            )
            _write(evaluation, setting, samples, rows)
    return evaluation


def default_features(data: DataConfig | None) -> str:
    """The feature network where none is named."""
    return "classifier" if data is not None and data.name in SMALL_DATA else "inception"


def _open(
    subject: Path,
    config: EvaluationConfig,
    accelerator: Accelerator,
    progress: Progress,
    run: LoadedRun | None,
) -> _Setting:
    if run is None and (subject / "config.json").is_file():
        run = load_run(subject, config.weights, accelerator.device)
    elif not subject.exists():
        raise UserError(
            f"{subject} does not exist: allowed are a run, a .npz or a folder of images"
        )
    data = _data_config(config, run)
    if config.reference is None and data is None:
        raise UserError(
            f"--reference is left out: needed is one of {', '.join(DATA_SETS)}, a .npz or a folder"
        )
    name = config.features or default_features(data)

    def get_ready() -> tuple[DataSource | None, FeatureNetwork]:
        source = None if data is None else open_data(data)
        return source, feature_network(name, source, data.name if data else "")

    source, network = main_process_first(accelerator, get_ready)
    return _Setting(subject, config, run, data, source, network, accelerator, progress)


def _data_config(config: EvaluationConfig, run: LoadedRun | None) -> DataConfig | None:
    """The data set in play: given, or the run's, or the reference's."""
    given = {k: v for k, v in dataclasses.asdict(config.data).items() if v is not None}
    if run is not None:  # all of its data set, whatever share of it the run was trained on
        return dataclasses.replace(run.config.data, **{"train_fraction": 1.0, **given})
    if "name" not in given and config.reference in DATA_SETS:
        given["name"] = config.reference
    return DataConfig(**given) if "name" in given else None


def _reference(setting: _Setting) -> tuple[Reference, ImageSet | None]:
    """The reference, and where it is a data set, its held-out images."""
    config, data, source = setting.config, setting.data, setting.source
    target = config.reference or (data.name if data else "")
    heldout = None
    if target in DATA_SETS:
        if source is None or data is None or data.name != target:
            wanted = dataclasses.replace(data or DataConfig(), name=target)  # type: ignore[arg-type]
            source = main_process_first(setting.accelerator, lambda: open_data(wanted))
        heldout = open_split(target, source, "held-out")
        train = open_split(target, source, "training")
        _require_classifier_size(setting, train)
        reference = measure(train, setting.network, setting.parts, setting.accelerator)
    else:
        reference = open_reference(
            Path(target),
            setting.network,
            setting.parts,
            setting.accelerator,
            check=lambda images: _require_classifier_size(setting, images),
        )
    with together(setting.accelerator):
        if config.write_reference is not None and setting.accelerator.is_main_process:
            write_reference(config.write_reference, reference, setting.network)
    return reference, heldout


def _require_classifier_size(setting: _Setting, images: ImageSet) -> None:
    source = setting.source
    if setting.network.name != "classifier" or source is None:
        return
    shape = (source.channels, *source.image_size)
    if images.shape != shape:
        raise UserError(
            f"{images.name} holds images of the shape {images.shape}, and the classifier was trained "
            f"on {shape} (channels, height, width): --data.name must fit the images"
        )


def _samples(
    setting: _Setting, sampling: SamplingConfig, reference: Reference
) -> tuple[ImageSet, Path, dict[str, Any] | None]:
    """The samples, where their evaluation goes, and what is known of how they were made."""
    subject, config, run = setting.subject, setting.config, setting.run
    if run is not None:
        shape = (run.model.channels, *run.model.image_size)
        if reference.images is not None and reference.images.shape != shape:
            raise UserError(
                f"{subject} makes images of the shape {shape}, and {reference.name} holds "
                f"{reference.images.shape} (channels, height, width): both must be the same"
            )
        folder = samples_folder(run, config.weights, sampling)
        made = sampling_record(run, sampling, weights=config.weights)
        images = generate_samples(
            run,
            sampling,
            config.num or RUN_SAMPLES,
            folder,
            made,
            setting.accelerator,
            config.batch_size,
            setting.progress,
        )
        return images, config.out or folder, made
    images = open_images(subject)
    images = images.first(config.num or len(images))
    _require_classifier_size(setting, images)
    if reference.images is not None:
        images.require_like(reference.images)
    record = subject.parent / "sampling.json"
    known = subject.suffix == ".npz" and record.is_file()
    return (
        images,
        config.out or subject.with_name(f"{subject.stem}-evaluation"),
        json.loads(record.read_text()) if known else None,
    )


def _choose_metrics(
    setting: _Setting, samples: ImageSet, reference: Reference, heldout: ImageSet | None
) -> list[MetricName]:
    """The metrics asked for, or all that are possible.

    Raises:
        UserError: one that was asked for is not possible.
    """
    config, network, run = setting.config, setting.network, setting.run
    inception = network.name == "inception"
    enough = len(samples) >= KID_SUBSET_SIZE and (
        reference.features is None or len(reference.features) >= KID_SUBSET_SIZE
    )
    needs_images = None if reference.features is not None else "a reference with images"
    # What a metric lacks: nothing, something it cannot do without, or a reason to be asked for.
    lacks: dict[MetricName, str | None] = {
        "fid": None if inception else "--features inception",
        "sfid": None
        if inception and "spatial" in reference.gaussians
        else "--features inception, and a reference with images or mu_s and sigma_s",
        "is": None if inception else "--features inception",
        "kid": "--features inception" if not inception else needs_images,
        "fd": "other --features than inception" if inception else None,
        "precision-recall": needs_images,
        "consistency": None
        if network.name == "classifier" and samples.labels is not None
        else "--features classifier, and samples with labels (arr_1)",
        "memorisation": None
        if heldout is not None
        else "a data set as --reference, for its held-out images",
        "denoising": None if run is not None else "a run, not samples",
    }
    if "features" not in reference.gaussians:
        lacks["fid"] = lacks["fid"] or "a reference with images, or with mu and sigma"
        lacks["fd"] = lacks["fd"] or "a reference with images, or with mu and sigma"
    possible = [name for name, lack in lacks.items() if lack is None]
    for wanted in config.metrics:
        if wanted not in possible:
            raise UserError(
                f"--metrics {wanted} needs {lacks[wanted]}; possible here are {', '.join(possible)}"
            )
    if config.metrics:
        return list(dict.fromkeys(config.metrics))
    left_out = set() if enough else {"kid"}
    if network.name != "classifier":
        left_out.add("memorisation")  # the pixels of a large data set take long to compare
    return [name for name in possible if name not in left_out]


def _compare(
    chosen: Sequence[str],
    features: Mapping[str, Tensor],
    reference: Reference,
    setting: _Setting,
) -> dict[str, Estimate]:
    """The metrics that stand on features."""
    found = {}
    if "fid" in chosen:
        found["fid"] = frechet_estimate(features["features"], reference.gaussians["features"])
    if "sfid" in chosen:
        found["sfid"] = frechet_estimate(features["spatial"], reference.gaussians["spatial"])
    if "fd" in chosen:  # of other features than Inception's, and never called FID
        found[f"fd_{setting.network.name}"] = frechet_estimate(
            features["features"], reference.gaussians["features"]
        )
    if "is" in chosen:
        found["inception_score"] = inception_score(
            features["logits"], setting.config.inception_splits
        )
    if "kid" in chosen:
        assert reference.features is not None
        subsets = draw_subsets(len(features["features"]), len(reference.features))
        found["kid"] = kernel_distance(features["features"], reference.features, subsets)
    if "precision-recall" in chosen:
        assert reference.features is not None
        precision, recall = precision_recall(features["features"], reference.features)
        found["precision"], found["recall"] = precision, recall
    return found


def _memorisation(
    samples: ImageSet, heldout: ImageSet, train: ImageSet
) -> tuple[dict[str, Estimate], list[NeighbourRow]]:
    """Distances to the nearest training images in pixels, where no network blurs what a copy is."""

    def pixels(images: ImageSet, numbers: Sequence[int]) -> Float[Tensor, "B P"]:
        return images.read(numbers).flatten(1).float() / 255

    def parts(images: ImageSet) -> Iterator[Tensor]:
        for first in range(0, len(images), 4096):
            yield pixels(images, range(first, min(first + 4096, len(images))))

    fresh = heldout.first(min(len(heldout), 10_000))
    queries = torch.cat([*parts(samples), *parts(fresh)])
    distances, indices = nearest(queries, parts(train))
    share, chance = memorisation(distances[: len(samples)], distances[len(samples) :])
    found = {"memorised_share": share, "nearer_than_heldout": chance}
    closest = distances[: len(samples)].argsort()[:SHOWN]
    rows = []
    for title, numbers in (
        ("first samples", torch.arange(min(SHOWN, len(samples)))),
        ("samples nearest to a training image", closest),
    ):
        rows.append(
            NeighbourRow(
                title,
                samples.read(numbers.tolist()),
                train.read(indices[numbers].tolist()),
            )
        )
    return found, rows


def _nearest_in_features(
    samples: ImageSet, features: Float[Tensor, "M D"], reference: Reference
) -> list[NeighbourRow]:
    """For the picture, where pixels are too many to compare with all of a large reference."""
    assert reference.images is not None and reference.features is not None
    shown = range(min(SHOWN, len(samples)))
    _, indices = nearest(features[: len(shown)], [reference.features])
    numbers = neighbour_images(len(reference.images))[indices]
    title = "first samples, by features"
    return [NeighbourRow(title, samples.read(shown), reference.images.read(numbers.tolist()))]


def _denoising(setting: _Setting) -> dict[str, HeldOutLoss]:
    """Held-out denoising loss of a run, of both kinds of weights."""
    run, source = setting.run, setting.source
    assert run is not None and source is not None
    losses: dict[str, HeldOutLoss] = {}
    kinds: tuple[Literal["ema", "raw"], ...] = ("ema", "raw")
    for done, weights in enumerate(kinds):
        setting.progress("denoising loss", done, len(kinds))
        model = load_run(run.folder, weights, setting.accelerator.device).model
        losses[weights] = heldout_loss(
            model, source.heldout, run.config.flow.path, DENOISING_SAMPLES
        )
    setting.progress("denoising loss", len(kinds), len(kinds))
    return losses


def _settings(
    setting: _Setting, samples: ImageSet, made: dict[str, Any] | None, reference: Reference
) -> dict[str, Any]:
    """Everything that the numbers depend on."""
    config, network, data, source = setting.config, setting.network, setting.data, setting.source
    return {
        "samples": {
            "source": str(setting.subject),
            "count": len(samples),
            "shape": samples.shape,
            "fingerprint": samples.fingerprint,
            "sampling": made,
        },
        "features": {
            "network": network.name,
            "weight_hash": network.weight_hash,
            **network.facts,
        },
        "reference": {
            "name": reference.name,
            "fingerprint": reference.fingerprint,
            "count": reference.count,
        },
        "data": None if data is None else dataclasses.asdict(data),
        "data_fingerprint": None if source is None else source.fingerprint,
        "neighbours": NEIGHBOURS,
        "inception_splits": config.inception_splits,
        "kid_subsets": [KID_SUBSETS, KID_SUBSET_SIZE],
        "denoising_samples": DENOISING_SAMPLES,
        "batch_size": config.batch_size,
        "processes": setting.accelerator.num_processes,
        "device": str(setting.accelerator.device),
        "versions": _versions(),
    }


def _notes(
    network: FeatureNetwork,
    features: Mapping[str, Tensor],
    metrics: Mapping[str, Estimate],
    count: int,
) -> list[str]:
    notes = list(network.notes)
    dimensions = features["features"].shape[1] if "features" in features else 0
    frechet = any(name.startswith(("fid", "sfid", "fd_")) for name in metrics)
    if frechet and count <= dimensions:
        notes.append(
            f"{count} samples do not determine a covariance of {dimensions} features: the Fréchet "
            "distance is far above that of more samples"
        )
    if network.name in ("inception", "dinov2") and count != PUBLISHED_SAMPLES:
        notes.append(
            f"published numbers are of {PUBLISHED_SAMPLES:,} samples; those of {count:,} do not "
            "compare with them"
        )
    return notes


def _write(
    evaluation: Evaluation, setting: _Setting, samples: ImageSet, rows: Sequence[NeighbourRow]
) -> None:
    text = json.dumps(evaluation.as_json(), indent=2) + "\n"
    write_whole(evaluation.folder / "evaluation.json", lambda path: path.write_text(text))
    shown = samples.read(range(min(len(samples), SHOWN * 6)))
    title = f"{len(samples)} samples of {setting.subject}"
    write_whole(
        evaluation.folder / "evaluation.png",
        lambda path: draw_evaluation(path, shown, rows, evaluation, title),
    )


def _versions() -> dict[str, str]:
    versions = {"selfalign": selfalign.__version__}
    for package in ("torch", "torch-fidelity", "timm"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
