"""Reference statistics: computed once, kept by fingerprint, in the ADM suite's format."""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor

from selfalign.arrays import Array, Npz
from selfalign.disk import cache_folder, write_arrays
from selfalign.errors import UserError
from selfalign.evaluation.features import FeatureNetwork
from selfalign.evaluation.frechet import Gaussian, Moments, require_finite
from selfalign.evaluation.inputs import ImageSet, hash_file, images_of, open_images
from selfalign.evaluation.protocols import IMAGENET_256, IMAGENET_512
from selfalign.randomness import make_generator

NEIGHBOUR_IMAGES = 10_000
"""Reference images for precision, recall and KID, as many as ADM's reference files hold."""
LARGEST = 1e100
"""In statistics; the square of a larger number may be none."""
ASYMMETRY = 1e-5
"""Of a covariance's largest entry: far above rounding, float32's included."""
NEGATIVE = 1e-3
"""The same of its smallest eigenvalue: a covariance has none below zero but for rounding."""
_ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
PUBLISHED = {IMAGENET_256: f"{_ADM}/256/{IMAGENET_256}", IMAGENET_512: f"{_ADM}/512/{IMAGENET_512}"}
"""Where ADM's reference batches come from."""

Extract = Callable[[ImageSet], Iterable[dict[str, Float[Tensor, "M F"]]]]
"""Yields the features of a set, in order, a part at a time."""

_NAMES = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
"""What ADM's files call mean and covariance of each kind of features."""


@dataclass(frozen=True)
class ReferenceSource:
    """A reference that is opened and checked, and whose features nothing has computed yet."""

    name: str
    fingerprint: str
    images: ImageSet | None
    """All of its images; None where a file holds statistics only."""
    given: Mapping[str, Gaussian] = field(default_factory=dict)
    """Statistics that a file brings; they are used as they are."""
    network: str | None = None
    """Whose features those are, where the file says so."""
    heldout: ImageSet | None = None
    """Held-out images, where the reference is a data set."""

    def __post_init__(self) -> None:
        if self.images is not None and len(self.images) < 2:
            raise UserError(f"{self.name} holds 1 image: a reference needs at least 2")

    def require_network(self, network: FeatureNetwork, sizes: Mapping[str, int]) -> None:
        """Refuse statistics of another network.

        Args:
            network: the network in use.
            sizes: how many features of each kind it gives.
        """
        if self.network not in (None, _identity(network)):
            raise UserError(
                f"{self.name} holds statistics of {self.network}, not of {_identity(network)}"
            )
        for kind, gaussian in self.given.items():
            if kind in sizes and len(gaussian.mean) != sizes[kind]:
                raise UserError(
                    f"the samples have {sizes[kind]} features and the reference statistics "
                    f"{len(gaussian.mean)}: they come from different networks"
                )

    def kinds(self, sizes: Mapping[str, int]) -> frozenset[str]:
        """Kinds of features whose Gaussian fit it has, or will have once its images are measured."""
        measured = _NAMES.keys() & sizes.keys() if self.images is not None else set()
        return frozenset(self.given) | measured


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
    notes: tuple[str, ...] = ()
    """What a report has to say about it."""

    @property
    def count(self) -> int | None:
        """Images behind the statistics, where known."""
        return None if self.images is None else len(self.images)


def open_reference(path: Path, background: str = "white") -> ReferenceSource:
    """A reference from a file or folder: images, statistics, or both, as ADM's files have them.

    Statistics that a file holds are used as they are, and its images for everything else.

    Args:
        path: the .npz file, or a folder of images. A name that is not there is looked for among the
            references in the cache folder.
        background: colour behind a folder's images where they are transparent.

    Raises:
        UserError: missing, unreadable, or its statistics are not those of any features.
    """
    if not os.path.exists(path):  # noqa: PTH110 – of any name, however long
        kept = cache_folder("references") / path.name
        if not os.path.isfile(kept):  # noqa: PTH113
            published = PUBLISHED.get(path.name)
            known = f" (ADM's reference batch: {published})" if published else ""
            raise UserError(
                f"--reference {path} does not exist, here or as {kept}: allowed are a data set, a .npz "
                f"or a folder of images{known}"
            )
        path = kept
    if os.path.isfile(path / "config.json"):  # noqa: PTH113
        raise UserError(
            f"--reference {path} is a run: allowed are a data set, a .npz or a folder of images, such "
            "as the samples.npz that `selfalign sample` makes of it"
        )
    if not path.is_file():
        images = open_images(path, background)
        return ReferenceSource(images.name, images.fingerprint, images)
    arrays = Npz(path)
    if not arrays.keys() & {"arr_0", "mu", "mu_s"}:
        raise UserError(
            f"{path} holds {', '.join(list(arrays)[:10]) or 'nothing'}: a reference holds images "
            "(arr_0), or statistics (mu, sigma, mu_s, sigma_s), or both"
        )
    given = {
        kind: _given_gaussian(path, arrays, *names)
        for kind, names in _NAMES.items()
        if arrays.keys() & set(names)
    }
    images_here = images_of(path, arrays) if "arr_0" in arrays else None
    network = str(arrays["network"]) if "network" in arrays else None
    return ReferenceSource(path.name, hash_file(path), images_here, given, network)


def _given_gaussian(path: Path, arrays: Npz, mean_name: str, covariance_name: str) -> Gaussian:
    """Mean and covariance of a file, if they can be those of features at all.

    Raises:
        UserError: one is missing, of another shape or kind of number, not finite, or no covariance.
    """
    found = [arrays[name] for name in (mean_name, covariance_name) if name in arrays]
    shapes = [array.shape for array in found]
    both = f"{mean_name} and {covariance_name} of {path}"
    if len(found) < 2 or len(shapes[0]) != 1 or not shapes[0][0] or shapes[1] != shapes[0] * 2:
        raise UserError(f"{both} have the shapes {shapes}: allowed are (D,), (D, D)")
    tensors = []
    for name, array in zip((mean_name, covariance_name), found, strict=True):
        if array.dtype.kind not in "fiu":
            raise UserError(f"{name} of {path} holds {array.dtype}: allowed are real numbers")
        with np.errstate(over="ignore"):
            tensors.append(torch.from_numpy(np.array(array, dtype=np.float64)))
        if not torch.isfinite(tensors[-1]).all():
            raise UserError(f"{name} of {path} holds NaN or infinite numbers")
        if (tensors[-1].abs() > LARGEST).any():
            raise UserError(f"{name} of {path} holds numbers beyond {LARGEST:g}")
    gaussian = Gaussian(*tensors)
    covariance = gaussian.covariance
    largest = covariance.abs().max()
    if ((covariance - covariance.T).abs() > ASYMMETRY * largest).any():
        raise UserError(f"{covariance_name} of {path} is not symmetric: a covariance is")
    try:
        eigenvalues = gaussian.spectrum[0]
    except RuntimeError as error:  # torch's LinAlgError
        raise UserError(f"{covariance_name} of {path} has no eigenvalues: {error}") from error
    if not eigenvalues[0] >= -NEGATIVE * largest:
        raise UserError(
            f"{covariance_name} of {path} has the negative eigenvalue {eigenvalues[0]:.4g}: a "
            "covariance has none"
        )
    return gaussian


def measure(
    source: ReferenceSource, network: FeatureNetwork, extract: Extract, accelerator: Accelerator
) -> Reference:
    """A reference's statistics: given ones, and those of its images from the cache or computed now.

    Args:
        source: the opened reference.
        network: whose features they are.
        extract: extracts them.
        accelerator: the main process writes the cache.
    """
    images = source.images
    if images is None:
        return Reference(source.name, source.fingerprint, None, source.given, None)
    key = hashlib.sha256(
        f"{images.fingerprint} {images.shape} {network.name} {network.weight_hash}".encode()
    ).hexdigest()[:16]
    file = cache_folder("references") / f"{key}.npz"
    arrays, notes = _read_cache(file), []
    accelerator.wait_for_everyone()  # all processes have seen the same cache
    if arrays is None:
        arrays = _compute(images, extract)
        if accelerator.is_main_process:
            try:
                write_arrays(file, arrays)
            except UserError as error:  # it is computed again next time
                notes.append(f"the reference's statistics are not kept: {error}")
    features = torch.from_numpy(np.array(arrays["features"]))
    measured = {
        kind: Gaussian(*(torch.from_numpy(np.array(arrays[name])) for name in names))
        for kind, names in _NAMES.items()
        if names[0] in arrays
    }
    return Reference(
        source.name,
        images.fingerprint,
        images,
        {**measured, **source.given},
        features,
        tuple(notes),
    )


def write_reference(path: Path, reference: Reference, network: FeatureNetwork) -> None:
    """Write a reference in ADM's format, with at most 10,000 images.

    Raises:
        UserError: the disk is full or not writable.
    """
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
    gaussians = {kind: sums.gaussian() for kind, sums in moments.items()}
    return {"features": torch.cat(kept).numpy(), **_arrays(gaussians)}


def _arrays(gaussians: Mapping[str, Gaussian]) -> dict[str, Array]:
    arrays = {}
    for kind, gaussian in gaussians.items():
        mean, covariance = _NAMES[kind]
        arrays[mean], arrays[covariance] = gaussian.mean.numpy(), gaussian.covariance.numpy()
    return arrays


def _read_cache(file: Path) -> dict[str, Array] | None:
    try:
        arrays = dict(Npz(file)) if file.is_file() else {}
    except UserError:
        return None  # damaged: computed again, and replaced
    return arrays if arrays.keys() >= {"features", *_NAMES["features"]} else None
