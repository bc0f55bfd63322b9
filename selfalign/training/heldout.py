"""The denoising loss on held-out images, with random numbers that all runs share."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from selfalign.data.datasets import Split
from selfalign.flow import PATHS
from selfalign.models.sit import SiT
from selfalign.randomness import make_generator
from selfalign.views import TokenGroups, patchify

BINS = 10
_SEED = 0  # not the run's: two runs compare on the same images, timesteps and noise


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean squared velocity error of whole images at one timestep each (Eq. 2)."""

    overall: float
    """Mean over t uniform in [0, 1]."""
    by_timestep: tuple[float, ...]
    """Means within ten equal bins of t."""


@torch.no_grad()
def heldout_loss(
    model: SiT, split: Split, path: str, samples: int, batch_size: int = 256
) -> HeldOutLoss:
    """Evaluate a model's denoising loss.

    Sample i lies in bin i mod 10 of t and shows image (i + i div 10) mod M, so that bins are covered
    exactly evenly, and every image meets every bin; its timestep and noise are functions of i alone.

    Args:
        model: evaluated in its own dtype, on its own device, with the true labels.
        split: the held-out images.
        path: name of the path of Eq. 1.
        samples: pairs of image and timestep, rounded up to fill the bins evenly.
        batch_size: evaluated at once; has no effect on the samples.
    """
    device, dtype = model.pos_embed.device, model.pos_embed.dtype
    samples = -(-samples // BINS) * BINS
    groups = TokenGroups(order=None, sizes=(model.num_tokens,))
    errors, bins = [], []
    for first in range(0, samples, batch_size):
        indices = range(first, min(first + batch_size, samples))
        x0, labels = split.read([(i + i // BINS) % len(split) for i in indices])
        bin_of = torch.tensor([i % BINS for i in indices])
        # One generator per sample, so that no sample depends on the batch it is in.
        generators = [make_generator(_SEED, "heldout", i) for i in indices]
        within = torch.cat([torch.rand(1, generator=g) for g in generators])
        noise = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in generators])
        t = ((bin_of + within) / BINS).to(device, dtype)[:, None]
        errors.append(
            _errors(model, path, x0.to(device, dtype), noise.to(device, dtype), t, labels, groups)
        )
        bins.append(bin_of)
    error, bin_of = torch.cat(errors).double().cpu(), torch.cat(bins)
    by_timestep = tuple(error[bin_of == k].mean().item() for k in range(BINS))
    return HeldOutLoss(sum(by_timestep) / BINS, by_timestep)


def _errors(
    model: SiT,
    path_name: str,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    labels: Tensor,
    groups: TokenGroups,
) -> Float[Tensor, "B"]:
    path = PATHS[path_name]
    clean, noisy = patchify(x0, model.patch_size), patchify(noise, model.patch_size)
    xt = path.interpolate(clean, noisy, t[..., None])
    velocity, _ = model(xt, t, labels.to(t.device), groups)
    target = path.velocity(clean, noisy, t[..., None])
    return (velocity - target).square().mean(dim=(1, 2))
