"""Reference statistics: computed once, kept by fingerprint, in the ADM suite's format."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor

from selfalign.disk import cache_folder, write_arrays
from selfalign.errors import UserError
from selfalign.evaluation.features import FeatureNetwork
from selfalign.evaluation.frechet import Gaussian, Moments, require_finite
from selfalign.evaluation.inputs import Array, ImageSet, hash_file, images_of, open_images, open_npz
from selfalign.processes import together
from selfalign.randomness import make_generator

NEIGHBOUR_IMAGES = 10_000
"""Reference images for precision, recall and KID, as many as ADM's reference files hold."""

Extract = Callable[[ImageSet], Iterable[dict[str, Float[Tensor, "M F"]]]]
"""Yields the features of a set, in order, a part at a time."""

_NAMES = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
"""What ADM's files call mean and covariance of each kind of features."""


@dataclass(frozen=True)
class Reference:
    """What samples are compared with."""

    name: str
    fingerprint: str
    images: ImageSet | None
    """All of its images; None where a file holds statistics only."""
    gaussians: Mapping[str, Gaussian]
    """Fits of `features` and perhaps `spatial`, over all images."""
    features: Float[Tensor, "R D"] | None
    """Of at most 10,000 images, drawn without repetition."""

    @property
    def count(self) -> int | None:
        """Images behind the statistics, where known."""
        return None if self.images is None else len(self.images)


def measure(
    images: ImageSet, network: FeatureNetwork, extract: Extract, accelerator: Accelerator
) -> Reference:
    """A set's statistics, from the cache or computed now.

    Args:
        images: the set.
        network: whose features they are.
        extract: extracts them.
        accelerator: the main process writes the cache.
    """
    key = hashlib.sha256(
        f"{images.fingerprint} {images.shape} {network.name} {network.weight_hash}".encode()
    ).hexdigest()[:16]
    file = cache_folder("references") / f"{key}.npz"
    arrays = _read_cache(file)
    accelerator.wait_for_everyone()  # all processes have seen the same cache
    if arrays is None:
        arrays = _compute(images, extract)
        with together(accelerator):
            if accelerator.is_main_process:
                write_arrays(file, arrays)
    features = torch.from_numpy(np.array(arrays["features"]))
    return Reference(images.name, images.fingerprint, images, _gaussians(arrays), features)


def open_reference(
    path: Path,
    network: FeatureNetwork,
    extract: Extract,
    accelerator: Accelerator,
    check: Callable[[ImageSet], None] = lambda images: None,
) -> Reference:
    """A reference from a file or folder: images, statistics, or both, as ADM's files have them.

    Statistics that a file holds are used as they are, and its images for everything else.

    Args:
        path: the .npz file, or a folder of images.
        network, extract, accelerator: as for `measure`.
        check: refuses images that the network cannot take, before any work is done.

    Raises:
        UserError: unreadable, or its statistics have another shape than the network's features.
    """
    if path.is_dir() or not path.is_file():
        images = open_images(path)
        check(images)
        return measure(images, network, extract, accelerator)
    arrays = open_npz(path)
    if not arrays.keys() & {"arr_0", "mu"}:
        raise UserError(
            f"{path} holds {', '.join(arrays) or 'nothing'}: a reference holds images (arr_0), or "
            "statistics (mu, sigma, mu_s, sigma_s), or both"
        )
    given = _gaussians(arrays)
    for mean, covariance in _NAMES.values():
        sizes = [arrays[name].shape for name in (mean, covariance) if name in arrays]
        if sizes and sizes != [(len(arrays[mean]),), (len(arrays[mean]),) * 2]:
            raise UserError(
                f"{mean} and {covariance} of {path} have the shapes {sizes}: allowed are (D,), (D, D)"
            )
    if "network" in arrays and str(arrays["network"]) != _identity(network):
        raise UserError(
            f"{path} holds statistics of {arrays['network']}, not of {_identity(network)}"
        )
    if "arr_0" not in arrays:
        return Reference(path.name, hash_file(path), None, given, None)
    images = images_of(path, arrays)
    check(images)
    measured = measure(images, network, extract, accelerator)
    for kind, gaussian in given.items():
        expected = measured.gaussians.get(kind)
        if expected is None or expected.mean.shape != gaussian.mean.shape:
            raise UserError(
                f"{path} holds statistics of {len(gaussian.mean)} features, {network.name} has "
                f"{len(measured.gaussians['features'].mean)}: they come from different networks"
            )
    return Reference(
        path.name,
        measured.fingerprint,
        measured.images,
        {**measured.gaussians, **given},
        measured.features,
    )


def write_reference(path: Path, reference: Reference, network: FeatureNetwork) -> None:
    """Write a reference in ADM's format, with at most 10,000 images.

    Raises:
        UserError: the name does not end in .npz, or the disk is full.
    """
    if path.suffix != ".npz":
        raise UserError(f"--write-reference is {str(path)!r}: allowed is a name ending in .npz")
    arrays = {"network": np.array(_identity(network)), **_arrays(reference.gaussians)}
    if reference.images is not None:
        chosen = reference.images.read(neighbour_images(len(reference.images)).tolist())
        arrays["arr_0"] = chosen.permute(0, 2, 3, 1).numpy()
    write_arrays(path, arrays)


def _identity(network: FeatureNetwork) -> str:
    return f"{network.name} {network.weight_hash}"


def neighbour_images(count: int) -> Int[Tensor, "R"]:
    """Numbers of the images whose features a reference of `count` images keeps."""
    if count <= NEIGHBOUR_IMAGES:
        return torch.arange(count)
    generator = make_generator(0, "reference images")
    return torch.randperm(count, generator=generator)[:NEIGHBOUR_IMAGES].sort().values


def _compute(images: ImageSet, extract: Extract) -> dict[str, Array]:
    """One pass over the images, however many they are."""
    moments: dict[str, Moments] = {}
    chosen, kept, first = neighbour_images(len(images)), [], 0
    for part in extract(images):
        for kind in _NAMES.keys() & part.keys():
            require_finite(part[kind])
            if kind not in moments:
                moments[kind] = Moments(part[kind].mean(dim=0, dtype=torch.float64))
            moments[kind].add(part[kind])
        size = len(part["features"])
        here = chosen[(chosen >= first) & (chosen < first + size)] - first
        kept.append(part["features"][here])
        first += size
    if first < 2:
        raise UserError(f"{images.name} holds {first} image: a reference needs at least 2")
    gaussians = {kind: sums.gaussian() for kind, sums in moments.items()}
    return {"features": torch.cat(kept).numpy(), **_arrays(gaussians)}


def _arrays(gaussians: Mapping[str, Gaussian]) -> dict[str, Array]:
    arrays = {}
    for kind, gaussian in gaussians.items():
        mean, covariance = _NAMES[kind]
        arrays[mean], arrays[covariance] = gaussian.mean.numpy(), gaussian.covariance.numpy()
    return arrays


def _gaussians(arrays: Mapping[str, Array]) -> dict[str, Gaussian]:
    return {
        kind: Gaussian(
            *(torch.from_numpy(np.array(arrays[name], dtype=np.float64)) for name in names)
        )
        for kind, names in _NAMES.items()
        if all(name in arrays for name in names)
    }


def _read_cache(file: Path) -> dict[str, Array] | None:
    try:
        return open_npz(file) if file.is_file() else None
    except UserError:
        return None  # damaged: computed again, and replaced
