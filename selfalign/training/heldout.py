"""The denoising loss on held-out images, with random numbers that all runs share."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfalign.data.source import Split
from selfalign.flow import PATHS, velocity_error
from selfalign.network import Backbone
from selfalign.randomness import make_generator
from selfalign.tokens import TokenGroups, one_group

BINS = 10
_SEED = 0  # not the run's: two runs compare on the same images, timesteps and noise


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean squared velocity error of whole images at one timestep each (Eq. 2)."""

    overall: float
    """Mean over t uniform in [0, 1]."""
    by_timestep: tuple[float, ...]
    """Means within ten equal bins of t."""
    standard_error: float
    """Of `overall`, for the choice of images, timesteps and noise. All runs share that choice, so the
    difference of two runs is known far better than this."""
    by_timestep_standard_errors: tuple[float, ...]
    """The same of every bin."""


@dataclass(frozen=True)
class HeldOutErrors:
    """Squared velocity errors of pairs of an image and a timestep, the same pairs for every model."""

    errors: Float[Tensor, "S"]
    """Mean over pixels and channels, in float64."""
    images: Int[Tensor, "S"]
    """Number of each pair's image."""
    bins: Int[Tensor, "S"]
    """Number of each pair's bin of t."""


def heldout_loss(
    model: Backbone, split: Split, path: str, samples: int, batch_size: int = 256
) -> HeldOutLoss:
    """Evaluate a model's denoising loss on the pairs of `heldout_errors`, whose arguments it takes."""
    return summarise(heldout_errors(model, split, path, samples, batch_size))


@torch.no_grad()
def heldout_errors(
    model: Backbone,
    split: Split,
    path: str,
    samples: int,
    batch_size: int = 256,
    with_labels: bool = True,
) -> HeldOutErrors:
    """Evaluate a model's denoising error, pair by pair.

    Sample i lies in bin i mod 10 of t and shows image (i + i div 10) mod M, so that bins are covered
    exactly evenly, and every image meets every bin; its timestep and noise are functions of i alone.

    Args:
        model: evaluated in its own dtype, on its own device.
        split: the held-out images.
        path: name of the path of Eq. 1.
        samples: pairs of image and timestep, rounded up to fill the bins evenly.
        batch_size: evaluated at once; has no effect on the samples.
        with_labels: whether the model is told the true labels, or the null label.
    """
    device, dtype = model.device, model.dtype
    samples = -(-samples // BINS) * BINS
    numbers = torch.arange(samples)
    bins, images = numbers % BINS, (numbers + numbers // BINS) % len(split)
    groups = one_group(model.num_tokens)
    errors = []
    for indices in numbers.split(batch_size):
        x0, labels = split.read(images[indices].tolist())
        labels = labels if with_labels else torch.full_like(labels, model.null_label)
        # One generator per sample, so that no sample depends on the batch it is in.
        generators = [make_generator(_SEED, "heldout", i) for i in indices.tolist()]
        within = torch.cat([torch.rand(1, generator=g) for g in generators])
        noise = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in generators])
        t = ((bins[indices] + within) / BINS).to(device, dtype)[:, None]
        errors.append(
            _errors(model, path, x0.to(device, dtype), noise.to(device, dtype), t, labels, groups)
        )
    return HeldOutErrors(torch.cat(errors).double().cpu(), images, bins)


def summarise(found: HeldOutErrors) -> HeldOutLoss:
    """Means over all pairs and within bins of t, with their standard errors."""
    images, bins = found.images, found.bins
    by_bin = found.errors.view(-1, BINS)
    by_timestep = by_bin.mean(dim=0)
    # Within bins: what differs between bins is covered evenly, and no matter of chance. A mean that
    # was fitted to that many images takes up one degree of freedom.
    fitted_to = min(len(by_bin), len(images.unique()))
    degrees_of_freedom = max(1, fitted_to - 1)
    residuals = (by_bin - by_timestep).flatten() * (fitted_to / degrees_of_freedom) ** 0.5
    return HeldOutLoss(
        by_timestep.mean().item(),
        tuple(by_timestep.tolist()),
        _standard_error(residuals, images),
        tuple(_standard_error(residuals[bins == k], images[bins == k]) for k in range(BINS)),
    )


def _standard_error(residuals: Float[Tensor, "S"], images: Int[Tensor, "S"]) -> float:
    """Standard error of a mean over bins, from the residuals within them.

    Residuals of one image are added up before they are squared: an image that is hard in one bin is
    hard in others, so ten pairs of one image say less than ten images. With one pair per image this
    is the stratified estimate √(Σ s²/n)/bins. A single image shows no spread: 0, but for rounding.

    Args:
        residuals: each pair's error less its bin's mean.
        images: each pair's image.
    """
    per_image = torch.zeros(int(images.max()) + 1, dtype=residuals.dtype)
    per_image.index_add_(0, images, residuals)
    return (per_image.square().sum().sqrt() / len(residuals)).item()


def _errors(
    model: Backbone,
    path_name: str,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    labels: Tensor,
    groups: TokenGroups,
) -> Float[Tensor, "B"]:
    path = PATHS[path_name]
    clean, noisy = model.grid.patchify(x0), model.grid.patchify(noise)
    xt = path.interpolate(clean, noisy, t[..., None])
    target = path.velocity(clean, noisy, t[..., None])
    return velocity_error(model(xt, t, labels.to(t.device), groups).velocity, target)
