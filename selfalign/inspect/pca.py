"""Principal components of token features: maps, and what the components follow."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfalign.evaluation.config import Progress
from selfalign.inspect.features import block_features, chosen_blocks, noised_images
from selfalign.inspect.scenes import SEED, read_images
from selfalign.inspect.section import About, Section, Table
from selfalign.inspect.views import as_array, pixels
from selfalign.pages.figures import Chart, heat_map, picture_grid
from selfalign.pages.numbers import number
from selfalign.randomness import make_generator

if TYPE_CHECKING:
    from selfalign.inspect.subject import Subject

TIMESTEPS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
IMAGES = 64
COMPONENTS = 3
"""As many as a picture has colours."""
SHUFFLES = 10
SHOWN = 2
"""Images whose maps are drawn."""


@dataclass(frozen=True)
class Components:
    """The first components of a block's tokens over timesteps, images and positions."""

    directions: Float[Tensor, "C D"]
    """Orthonormal, the one of most variance first; the largest weight of each is positive."""
    scores: Float[Tensor, "T M N C"]
    """Every token's place along them, its position's mean removed."""
    variance: Float[Tensor, "C"]
    """Share of the variance about the positions' means."""
    r_squared: dict[str, Float[Tensor, "C"]]
    """Share of a component's variance that knowing the `position`, the timestep `t` or the `class`
    explains; that of the position before its mean is removed, after which it is 0 by construction.
    `shuffled`: that of the classes of other images, which is not 0 where images are few."""


def components(
    features: Float[Tensor, "T M N D"], labels: Int[Tensor, "M"], count: int = COMPONENTS
) -> Components:
    """PCA of tokens about the mean of their position, as the released `pca-vis` pictures show it.

    Without the removal, the first components are the position embedding's.

    Args:
        features: of the same images at T timesteps.
        labels: the images' classes.
        count: components C.
    """
    raw = features.double()
    centred = raw - raw.mean(dim=(0, 1), keepdim=True)
    flat = centred.flatten(0, 2)
    values, vectors = torch.linalg.eigh(flat.T @ flat / len(flat))
    directions = vectors.flip(1)[:, :count].T
    peak = directions.abs().argmax(dim=1, keepdim=True)
    directions = directions * directions.gather(1, peak).sign()
    orders = [
        torch.randperm(len(labels), generator=make_generator(SEED, "pca classes", k))
        for k in range(SHUFFLES)
    ]
    scores, along = centred @ directions.T, raw @ directions.T
    return Components(
        directions,
        scores,
        values.flip(0)[:count] / values.clamp(min=0).sum().clamp(min=1e-300),
        {
            "position": _explained(along, along.mean(dim=(0, 1), keepdim=True)),
            "t": _explained(scores, scores.mean(dim=(1, 2), keepdim=True)),
            "class": _of_class(scores, labels),
            "shuffled": torch.stack([_of_class(scores, labels[order]) for order in orders]).mean(0),
        },
    )


def _of_class(scores: Float[Tensor, "T M N C"], labels: Int[Tensor, "M"]) -> Float[Tensor, "C"]:
    means = torch.stack([scores[:, labels == label].mean(dim=(0, 1, 2)) for label in labels])
    return _explained(scores, means[None, :, None])


def _explained(
    values: Float[Tensor, "T M N C"], means: Float[Tensor, "*groups C"]
) -> Float[Tensor, "C"]:
    """Share of the variance that the groups' means have; `means` broadcasts against the values."""
    middle = values.mean(dim=(0, 1, 2))
    total = (values - middle).square().mean(dim=(0, 1, 2))
    between = (means.expand_as(values) - middle).square().mean(dim=(0, 1, 2))
    return between / total.clamp(min=1e-300)


def colours(scores: Float[Tensor, "N C"], grid: Sequence[int]) -> "np.ndarray[Any, Any]":
    """The first three components of an image's tokens as red, green and blue, each over its own range."""
    low, high = scores.amin(dim=0), scores.amax(dim=0)
    shown = (scores - low) / (high - low).clamp(min=1e-12)
    picture = (255 * shown).round().to(torch.uint8).reshape(*grid, -1).numpy()
    return np.pad(picture, ((0, 0), (0, 0), (0, 3 - picture.shape[2])))


ABOUT = About(
    title="Principal components",
    question="What do the tokens of a block differ in?",
    definition=f"PCA of the tokens of {IMAGES} held-out images at {len(TIMESTEPS)} timesteps, the mean of "
    "each position removed, without labels; maps as in the released pca-vis pictures.",
    control="R² of position (before its mean is removed), timestep and class per component: how much of "
    "a component is only where a token lies, or how noisy the image is; and R² of other images’ classes.",
)
FOLLOWED = {"position": "position", "t": "timestep", "class": "class", "shuffled": "other class"}


def look(subject: "Subject", progress: Progress) -> Section:
    """Maps by block and timestep, and what the components follow."""
    x0, labels = read_images(subject.source.heldout, IMAGES, "pca")
    model, path = subject.model, subject.config.flow.path
    blocks = chosen_blocks(len(model.blocks))
    inputs = [noised_images(x0, path, t, "pca") for t in TIMESTEPS]
    by_time = []
    for done, (xt, t) in enumerate(zip(inputs, TIMESTEPS, strict=True), 1):
        parts = list(block_features(model, xt, t, blocks))
        by_time.append({block: torch.cat([part[block] for part in parts]) for block in blocks})
        progress("principal components", done, len(TIMESTEPS))
    found = {
        block: components(torch.stack([of_t[block] for of_t in by_time]), labels)
        for block in blocks
    }
    names, times = [str(block) for block in blocks], [f"{t:g}" for t in TIMESTEPS]
    charts = []
    for image in range(min(SHOWN, len(x0)) if len(model.grid.shape) == 2 else 0):
        above = [as_array(pixels(xt[image], subject.decode)) for xt in inputs]
        maps = [
            [colours(found[b].scores[k, image], model.grid.shape) for k in range(len(TIMESTEPS))]
            for b in blocks
        ]
        title = f"Principal components of held-out image {image + 1}"
        picture = picture_grid([above, *maps], ["input", *names], times, "block", "t", title)
        caption = (
            "Its tokens’ first three components as red, green and blue; the same components at "
            "every t of a block."
        )
        charts.append(Chart(title, picture, caption))
    shares = [[float(found[b].r_squared[name][0]) for name in FOLLOWED] for b in blocks]
    words = list(FOLLOWED.values())
    title = "What the first component follows"
    explained = heat_map(shares, names, words, "block", "R² of", title)
    charts.append(Chart(title, explained, "Share of its variance that each explains."))
    rows = [
        (
            f"block {b}, component {c + 1}",
            (
                float(found[b].variance[c]),
                *(float(found[b].r_squared[name][c]) for name in FOLLOWED),
            ),
        )
        for b in blocks
        for c in range(len(found[b].variance))
    ]
    variance = 100 * float(found[blocks[-1]].variance[0])
    _, of_time, of_class, of_other = (number(share, 2) for share in shares[-1])
    return Section(
        ABOUT,
        [
            f"After block {blocks[-1]} the first component holds {number(variance, 2)} % of the variance "
            f"about the positions’ means; the timestep explains {of_time} of it, the class {of_class} (other "
            f"images’ classes: {of_other})."
        ],
        charts,
        [
            Table(
                "Variance and R² of every component",
                ("component", "variance", *(f"R² of {word}" for word in words)),
                rows,
            )
        ],
        numbers={
            "images": len(x0),
            "timesteps": list(TIMESTEPS),
            "blocks": {
                str(b): {
                    "variance": found[b].variance.tolist(),
                    "r_squared": {k: v.tolist() for k, v in found[b].r_squared.items()},
                }
                for b in blocks
            },
        },
    )
