"""What a report says beside the numbers: all that they depend on, and what to know before comparing them."""

import dataclasses
import importlib.metadata
import os
from pathlib import Path
from typing import Any

import selfalign
from selfalign.errors import UserError
from selfalign.evaluation.generation import PlannedSamples
from selfalign.evaluation.metrics import Evidence, Finding
from selfalign.evaluation.metrics.denoising import PAIRS
from selfalign.evaluation.metrics.kid import SUBSET_SIZE, SUBSETS
from selfalign.evaluation.metrics.precision_recall import NEIGHBOURS
from selfalign.evaluation.setup import Setup
from selfalign.records import read_json

PUBLISHED_SAMPLES = 50_000
SAMPLING_BYTES = 2**20
"""More than any sampling.json holds."""


def how_made(setup: Setup) -> dict[str, Any] | None:
    """How samples are made, or were made as far as a file beside them says; None where unknown.

    Raises:
        UserError: that file is damaged.
    """
    if isinstance(setup.samples, PlannedSamples):
        return setup.samples.settings
    record = setup.subject.parent / "sampling.json"
    known = setup.subject.suffix == ".npz" and os.path.isfile(record)  # noqa: PTH113
    return _read_sampling(record) if known else None


def _read_sampling(file: Path) -> dict[str, Any]:
    try:
        return read_json(file, dict[str, Any], limit=SAMPLING_BYTES)
    except UserError as error:
        raise UserError(
            f"{error}; it says how the samples were made: repair or remove it"
        ) from error


def settings(evidence: Evidence, made: dict[str, Any] | None) -> dict[str, Any]:
    """Everything that the numbers depend on.

    Args:
        evidence: what they were computed from.
        made: from `how_made`.
    """
    setup, samples, reference = evidence.setup, evidence.samples, evidence.reference
    config, network, data, source = setup.config, setup.network, setup.data, setup.source
    return {
        "samples": {
            "source": str(setup.subject),
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
        "kid_subsets": [SUBSETS, SUBSET_SIZE],
        "denoising_samples": PAIRS,
        "batch_size": config.batch_size,
        "processes": setup.accelerator.num_processes,
        "device": str(setup.accelerator.device),
        "versions": _versions(),
    }


def notes(evidence: Evidence, found: Finding) -> list[str]:
    """What to know before comparing the numbers."""
    network, reference, count = evidence.setup.network, evidence.reference, len(evidence.samples)
    said = [*network.notes, *reference.notes]
    if evidence.setup.changed:
        said.append(f"{evidence.setup.changed}; what is there was compared")
    features = evidence.features.get("features")
    dimensions = 0 if features is None else features.shape[1]
    frechet = any(name.startswith(("fid", "sfid", "fd_")) for name in found.estimates)
    if frechet and count <= dimensions:
        said.append(
            f"{count} samples do not determine a covariance of {dimensions} features: the Fréchet "
            "distance is far above that of more samples"
        )
    if network.name in ("inception", "dinov2") and count != PUBLISHED_SAMPLES:
        said.append(
            f"published numbers are of {PUBLISHED_SAMPLES:,} samples; those of {count:,} do not "
            "compare with them"
        )
    return said


def _versions() -> dict[str, str]:
    versions = {"selfalign": selfalign.__version__}
    for package in ("torch", "torch-fidelity", "timm"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
