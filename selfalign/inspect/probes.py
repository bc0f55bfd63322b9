"""Linear probes: what a block's features tell about an image's class, at every timestep."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selfalign.data.source import DataSource
from selfalign.errors import UserError
from selfalign.evaluation.config import Progress
from selfalign.evaluation.estimate import Estimate, from_share
from selfalign.inspect.features import chosen_blocks, mean_tokens, noised_images, untrained
from selfalign.inspect.logistic import FOLDS, fit_and_predict
from selfalign.inspect.scenes import SEED, mean_of, read_images
from selfalign.inspect.section import About, Section, Table
from selfalign.network import Backbone, Tap
from selfalign.pages.figures import Chart, Series, curve_chart, heat_map
from selfalign.pages.numbers import number, plus_minus
from selfalign.randomness import make_generator
from selfalign.tokens import patchify

if TYPE_CHECKING:
    from selfalign.inspect.subject import Subject

TIMESTEPS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
DRAWS = 4
"""Noises of every image, over which its mean token is averaged."""
TIMESTEP = 0.1
"""Noise level of a single probe: little noise, as the network never sees none."""
IMAGES = 2_000
"""Images of each split that are used at most."""
MOST_CLASSES = 100
"""Classes that are told apart at most, those of most images: of a thousand, so few images show nothing."""
PIXELS = 1_024
"""Values of an image above which the pixel control averages patches until there are no more."""

Accuracies = dict[float, dict[Tap, Bool[Tensor, "R"]]]
"""Which images are recognised, by timestep and block."""


@dataclass(frozen=True)
class ProbeData:
    """The images that probes are trained and tested on."""

    train: Float[Tensor, "M C *sides"]
    train_labels: Int[Tensor, "M"]
    heldout: Float[Tensor, "R C *sides"]
    labels: Int[Tensor, "R"]
    classes: int
    """Between which they are."""

    def shuffled(self) -> "ProbeData":
        """Training images with each other's labels: what a probe of nothing scores."""
        order = torch.randperm(
            len(self.train_labels), generator=make_generator(SEED, "probe labels")
        )
        return replace(self, train_labels=self.train_labels[order])


def probe_data(source: DataSource, images: int = IMAGES) -> ProbeData:
    """Images of both splits, the same for every model.

    Raises:
        UserError: the data set has no two classes of enough images for cross-validation.
    """
    sizes = source.train.labels.bincount()
    classes = sizes.argsort(descending=True, stable=True)[:MOST_CLASSES]
    classes = classes[sizes[classes] >= FOLDS]
    if source.num_classes < 2 or len(classes) < 2:
        raise UserError(
            f"a linear probe needs a data set with two classes or more, of {FOLDS} images each or more"
        )
    return ProbeData(
        *read_images(source.train, images, "probe train", classes),
        *read_images(source.heldout, images, "probe held-out", classes),
        len(classes),
    )


def classify(
    train: Float[Tensor, "M D"], heldout: Float[Tensor, "R D"], data: ProbeData
) -> Bool[Tensor, "R"]:
    """Which held-out images a logistic regression recognises: strength by 5-fold cross-validation."""
    found, _ = fit_and_predict(train, data.train_labels, heldout)
    return found == data.labels


def probe_blocks(
    model: Backbone,
    data: ProbeData,
    path: str,
    t: float,
    blocks: Sequence[Tap],
    draws: int = DRAWS,
    tick: Callable[[], None] = lambda: None,
) -> dict[Tap, Bool[Tensor, "R"]]:
    """Which held-out images a regression on the mean token of each block recognises.

    The model sees no labels: all images carry the null class. Images, noise and folds are the same for
    every model.

    Args:
        model: in eval mode; any backbone.
        data: from `probe_data`.
        path: name of the path of Eq. 1.
        t: timestep of the images.
        blocks: counted from 1, or modules by name.
        draws: noises per image that the mean token is averaged over.
        tick: called after every pass over a split.
    """
    parts = [
        mean_tokens(model, x0, path, t, blocks, f"probe {name}", draws, tick)
        for name, x0 in (("train", data.train), ("held-out", data.heldout))
    ]
    return {block: classify(parts[0][block], parts[1][block], data) for block in blocks}


def linear_probe(model: Backbone, source: DataSource, path: str, block: Tap) -> float:
    """Held-out accuracy of a probe of one block at a little noise.

    Arguments as for `probe_blocks`; `source` is the data set.

    Raises:
        UserError: the data set has no two classes.
    """
    data = probe_data(source)
    return float(probe_blocks(model, data, path, TIMESTEP, (block,))[block].float().mean())


def pixel_probe(data: ProbeData, path: str, t: float, draws: int = DRAWS) -> Bool[Tensor, "R"]:
    """The control: the same regression on the noised pixels themselves, averaged over the same noises."""
    parts = []
    for name, x0 in (("train", data.train), ("held-out", data.heldout)):
        images = [noised_images(x0, path, t, f"probe {name}", draw) for draw in range(draws)]
        parts.append(_shrunk(torch.stack(images).mean(dim=0)).flatten(1))
    return classify(parts[0], parts[1], data)


def _shrunk(x: Float[Tensor, "M C *sides"]) -> Float[Tensor, "M F"]:
    """Means over patches, the smallest that leave few enough values."""
    patch = 1
    while x[0].numel() / patch ** (x.ndim - 2) > PIXELS and not any(
        side % (2 * patch) for side in x.shape[2:]
    ):
        patch *= 2
    return patchify(x, patch).unflatten(2, (-1, x.shape[1])).mean(dim=2)


ABOUT = About(
    title="Linear probes",
    question="Where, and at which noise, do features tell the class?",
    definition="Held-out accuracy of a logistic regression on the mean token of a block, averaged over "
    f"{DRAWS} noises, with the null label; its strength by 5-fold cross-validation on the training images.",
    control="the same regression on the noised pixels, on the same network with random weights, and with "
    "shuffled labels.",
)


def look(subject: "Subject", progress: Progress) -> Section:
    """Accuracy by block and timestep, of the model and of the controls."""
    try:
        data = probe_data(subject.source, IMAGES)
    except UserError as error:
        return ABOUT.left_out(error)
    model, path, random = subject.model, subject.config.flow.path, untrained(subject.model)
    blocks: Sequence[Tap] = chosen_blocks(len(model.blocks))
    middle = blocks[len(blocks) // 2]
    done, total = 0, (2 * len(TIMESTEPS) + 1) * 2 * DRAWS

    def tick() -> None:
        nonlocal done
        done += 1
        progress("linear probes", done, total)

    found: Accuracies = {}
    fresh: Accuracies = {}
    pixels: dict[float, Tensor] = {}
    for t in TIMESTEPS:
        found[t] = probe_blocks(model, data, path, t, blocks, DRAWS, tick)
        fresh[t] = probe_blocks(random, data, path, t, blocks, DRAWS, tick)
        pixels[t] = pixel_probe(data, path, t, DRAWS)
    # Of one cell: by chance is by chance in every cell.
    shuffled = probe_blocks(model, data.shuffled(), path, TIMESTEP, (middle,), DRAWS, tick)[middle]

    top, at = max(
        ((b, t) for b in blocks for t in TIMESTEPS), key=lambda c: _mean(found[c[1]][c[0]])
    )
    best, gain = found[at][top], mean_of(found[at][top].double() - pixels[at].double())
    chance = 1 / data.classes
    findings = [
        f"Best at block {top}, t = {at:g}: {plus_minus(_share(best))} of {len(best)} held-out images, "
        f"{plus_minus(gain)} above the pixels at the same t (the best of all cells, so a little high).",
        f"With shuffled labels {plus_minus(_share(shuffled))}; by chance {number(chance, 2)}.",
    ]
    values, of_random = (
        [[_mean(of[t][b]) for t in TIMESTEPS] for b in blocks] for of in (found, fresh)
    )
    lines = [
        Series("this model, best block", 1, _best(found)),
        Series("random weights, best block", 3, _best(fresh)),
        Series("noised pixels", 0, [(t, _share(pixels[t])) for t in TIMESTEPS]),
    ]
    above = [
        [a - b for a, b in zip(*row, strict=True)] for row in zip(values, of_random, strict=True)
    ]
    names, times = [str(block) for block in blocks], [f"{t:g}" for t in TIMESTEPS]
    charts = [
        Chart(
            "Accuracy by block and timestep",
            heat_map(values, names, times, "block", "t", "Probe accuracy by block and timestep"),
            "Of the model’s features.",
        ),
        Chart(
            "Beside the controls",
            curve_chart(lines, "t (1 is noise)", "Probe accuracy over t beside the controls"),
            "The best block at each t; 95 % intervals for the choice of held-out images.",
            lines,
        ),
        Chart(
            "Above random weights",
            heat_map(
                above, names, times, "block", "t", "Accuracy above random weights", signed=True
            ),
            "Minus the accuracy of the network with random weights at the same block and t.",
        ),
    ]
    rows = [
        *((f"block {b}", [_share(found[t][b]) for t in TIMESTEPS]) for b in blocks),
        ("noised pixels", [_share(pixels[t]) for t in TIMESTEPS]),
    ]
    return Section(
        ABOUT,
        findings,
        charts,
        [Table("Probe accuracy by block", ("block", *(f"t = {t}" for t in times)), rows)],
        numbers={
            "blocks": list(blocks),
            "timesteps": list(TIMESTEPS),
            "train_images": len(data.train),
            "heldout_images": len(data.heldout),
            "classes": data.classes,
            "accuracy": values,
            "random_weights": of_random,
            "pixels": [_mean(pixels[t]) for t in TIMESTEPS],
            "shuffled_labels": _share(shuffled),
            "chance": chance,
        },
    )


def _best(found: Accuracies) -> list[tuple[float, Estimate]]:
    """The accuracy of the best block at each t."""
    return [
        (t, max(map(_share, of_t.values()), key=lambda share: share.value))
        for t, of_t in found.items()
    ]


def _mean(right: Bool[Tensor, "R"]) -> float:
    return float(right.float().mean())


def _share(right: Bool[Tensor, "R"]) -> Estimate:
    return from_share(_mean(right), len(right))
