"""The denoising loss on held-out images, with random numbers that all runs share."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfalign.data.source import Split
from selfalign.flow import PATHS
from selfalign.network import Backbone
from selfalign.randomness import make_generator
from selfalign.terms import over_values
from selfalign.tokens import TokenGroups, group_sizes, one_group, without_padding
from selfalign.views import noised

BINS = 10
_SEED = 0  # not the run's: two runs compare on the same images, timesteps and noise


@dataclass(frozen=True)
class Seen:
    """How held-out images are shown to a model, whatever it was trained with."""

    mask_ratios: tuple[float, ...] = (1.0,)
    """Share of the tokens in each group, drawn at random for every pair."""
    separate: bool = False
    """Whether tokens attend within their group only."""
    several_timesteps: bool = False
    """Whether the groups after the first have timesteps of their own, uniform in [0, 1]."""


WHOLE = Seen()
"""The image at one timestep, in which all tokens attend to each other: as models are sampled."""


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean squared velocity error (Eq. 2)."""

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
    seen: Seen = WHOLE,
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
        seen: how the images are shown; the bins are of the first group's timestep. Image, timestep and noise
            of a pair are the same for all.
    """
    device, dtype = model.device, model.dtype
    samples = -(-samples // BINS) * BINS
    numbers = torch.arange(samples)
    bins, images = numbers % BINS, (numbers + numbers // BINS) % len(split)
    sizes, errors = group_sizes(seen.mask_ratios, model.num_tokens), []
    for indices in numbers.split(batch_size):
        x0, labels = split.read(images[indices].tolist())
        labels = labels if with_labels else torch.full_like(labels, model.null_label)
        # One generator per sample, so that no sample depends on the batch it is in.
        generators = [make_generator(_SEED, "heldout", i) for i in indices.tolist()]
        within = torch.cat([torch.rand(1, generator=g) for g in generators])
        noise = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in generators])
        t = ((bins[indices] + within) / BINS)[:, None].expand(-1, len(sizes))
        groups = one_group(model.num_tokens)
        if len(sizes) > 1:
            order = torch.stack([torch.rand(model.num_tokens, generator=g) for g in generators])
            groups = TokenGroups(order.argsort(dim=1).to(device), sizes, separate=seen.separate)
        if seen.several_timesteps:
            others = [torch.rand(len(sizes) - 1, generator=g) for g in generators]
            t = torch.cat([t[:, :1], torch.stack(others)], dim=1)
        padded = bool(x0.isnan().any())
        x0, noise, t = (tensor.to(device, dtype) for tensor in (x0, noise, t))
        errors.append(_errors(model, path, x0, noise, t, labels, groups, padded))
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
    padded: bool,
) -> Float[Tensor, "B"]:
    path = PATHS[path_name]
    clean, epsilon = (groups.sort(model.grid.patchify(samples)) for samples in (x0, noise))
    there = None
    if padded:
        clean, epsilon, there = without_padding(clean, epsilon)
        groups = replace(groups, present=there.any(dim=2))
    view = noised(clean, epsilon, path, t, groups)
    target = path.velocity(clean, epsilon, groups.broadcast(t[..., None]))
    output = model(view.tokens, view.timesteps, labels.to(t.device), groups)
    return over_values(groups, (), there, output.velocity, target)
