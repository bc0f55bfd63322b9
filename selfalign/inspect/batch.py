"""What a batch of training contains: timesteps, gaps, context, views, and which states are covered."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from selfalign.config import ResolvedConfig, whole_images
from selfalign.evaluation.config import Progress
from selfalign.evaluation.estimate import Estimate, from_share
from selfalign.flow import PATHS
from selfalign.inspect.scenes import SEED, read_images
from selfalign.inspect.section import About, Section, Table
from selfalign.pages.figures import Chart, Series, curve_chart, heat_map
from selfalign.pages.numbers import number, plus_minus
from selfalign.randomness import make_generator
from selfalign.training.heldout import heldout_loss
from selfalign.views import draw_views, make_views

if TYPE_CHECKING:
    from selfalign.inspect.subject import Subject

BINS = 10
BATCHES = 64
LEAST_IMAGES = 4_096
"""Images of which the shares are taken, at least."""
HIGH = 0.9
WHOLE_SHARES = (0.0, 0.1, 0.25)
"""Shares of whole images that state coverage is compared over."""
VISITS = 1_000
"""Most visits of an image whose views are drawn and counted."""
PAIRS = 2_000


@dataclass(frozen=True)
class Contents:
    """What the tokens of many drawn images carry."""

    timesteps: Float[Tensor, "M N"]
    """Of every token, by image."""
    visible: Float[Tensor, "M N"]
    """Tokens that each token attends to, itself included."""
    signal: Float[Tensor, "M N"]
    """The same with each counted by its share of signal, alpha²/(alpha² + sigma²): clean tokens' worth."""

    @property
    def lowest(self) -> Float[Tensor, "M"]:
        """Smallest timestep of each image."""
        return self.timesteps.amin(dim=1)

    @property
    def highest(self) -> Float[Tensor, "M"]:
        """Largest timestep of each image."""
        return self.timesteps.amax(dim=1)

    def over_t(self) -> list[float]:
        """Share of the tokens in each of ten bins of t."""
        return _histogram(self.timesteps)

    def over_gap(self) -> list[float]:
        """Share of the images in each of ten bins of the gap between largest and smallest timestep."""
        return _histogram(self.highest - self.lowest)

    def states(self) -> list[list[float]]:
        """Density of (smallest, largest timestep): share of the images per cell, times 100."""
        low, high = (_bin(t) for t in (self.lowest, self.highest))
        counts = torch.bincount(low * BINS + high, minlength=BINS**2).double()
        return (100 * counts.reshape(BINS, BINS) / len(low)).tolist()

    def both_high(self) -> Estimate:
        """Share of the images whose timesteps are all above HIGH."""
        return from_share(float((self.lowest > HIGH).double().mean()), len(self.timesteps))


def _bin(t: Tensor) -> Tensor:
    return (t * BINS).long().clamp(0, BINS - 1)


def _histogram(t: Tensor) -> list[float]:
    counts = torch.bincount(_bin(t).flatten(), minlength=BINS).double()
    return (counts / counts.sum()).tolist()


def draw_contents(
    config: ResolvedConfig, x0: Float[Tensor, "M C *sides"], number_of: int = 0
) -> Contents:
    """What the views of one batch carry, drawn as in training.

    Args:
        config: a resolved tree of any recipe.
        x0: clean images; partitions by content look at them.
        number_of: of the draw.
    """
    draw = draw_views(config, x0, make_generator(SEED, "batch", number_of))
    views = make_views(config, x0, draw)
    groups, path = views.groups, PATHS[config.flow.path]
    t = groups.broadcast(views.student.timesteps[..., None])[..., 0]
    alpha, sigma = path.alpha(t), path.sigma(t)
    signal = alpha**2 / (alpha**2 + sigma**2)
    visible, seen = torch.empty_like(t), torch.empty_like(t)
    for first, end, begin, stop in groups.attention_parts(len(t)):
        visible[first:end, begin:stop] = stop - begin
        seen[first:end, begin:stop] = signal[first:end, begin:stop].sum(dim=1, keepdim=True)
    return Contents(t, visible, seen)


def contents(config: ResolvedConfig, x0: Float[Tensor, "M C *sides"]) -> Contents:
    """The same of many batches of the images given, each of the run's size.

    Args:
        config: a resolved tree.
        x0: as many clean images as a batch has, or fewer.
    """
    count = max(BATCHES, -(-LEAST_IMAGES // len(x0)))
    parts = [draw_contents(config, x0, number_of) for number_of in range(count)]
    return Contents(
        *(
            torch.cat([getattr(part, name) for part in parts])
            for name in ("timesteps", "visible", "signal")
        )
    )


def distinct_views(
    config: ResolvedConfig, image: Float[Tensor, "C *sides"], visits: int = VISITS
) -> list[tuple[int, int, int]]:
    """How many distinct views an image has been, after so many visits.

    Args:
        config: a resolved tree.
        image: the image.
        visits: how often it is drawn.

    Returns:
        (visits, distinct partitions, distinct pairs of partition and binned timesteps) at ten numbers of
        visits. Timesteps count by tenths: without bins, and with noise, no view comes twice.
    """
    x0 = image.expand(visits, *image.shape)
    draw = draw_views(config, x0, make_generator(SEED, "visits"))
    views = make_views(config, x0, draw)
    several, sizes = config.num_groups > 1, views.groups.sizes  # those that the student sees
    partitions, states = [], []
    for index in range(visits):
        whole = index < views.groups.whole
        order = views.groups.order
        groups: tuple[object, ...] = ()
        if several and order is not None and not whole:
            groups = tuple(frozenset(part.tolist()) for part in order[index].split(sizes))
        partitions.append(groups)
        states.append((groups, tuple(_bin(views.student.timesteps[index]).tolist())))
    shown = sorted({max(1, round(visits ** (k / 9))) for k in range(10)})
    # Whole images come first in a batch: views are counted in a mixed order.
    mixed = torch.randperm(visits, generator=make_generator(SEED, "visits order")).tolist()
    return [
        (n, len({partitions[i] for i in mixed[:n]}), len({states[i] for i in mixed[:n]}))
        for n in shown
    ]


def visits_per_image(config: ResolvedConfig, images: int) -> float:
    """How often training shows an image: steps · batch / images."""
    return config.training.steps * config.training.batch_size / images


def coverage(config: ResolvedConfig, x0: Tensor) -> Mapping[float, Estimate]:
    """P(all timesteps > HIGH) by share of whole images, for recipes of several groups that are all seen.

    Shares of which a batch would have no image are left out.
    """
    several = config.num_groups > 1 and not config.views.hidden_groups
    shares = WHOLE_SHARES if several else (0.0,)
    found = {}
    for share in shares:
        if share == 0 or whole_images(share, len(x0)) > 0:
            views = replace(config.views, whole_image_fraction=share)
            found[share] = contents(replace(config, views=views), x0).both_high()
    return found


ABOUT = About(
    title="What a batch contains",
    question="Which noise levels, which context and which views did the training see?",
    definition="Drawn as in training: the timestep of each token and the gap within an image; how many "
    "tokens a token attends to (Eq. 8, 9), and their worth in clean tokens, Σ α²/(α² + σ²); the density of "
    "(smallest, largest timestep); distinct views of one image.",
    control=f"P(all timesteps > {HIGH:g}): under uniform p(t) it is .1 with one timestep and .01 with two "
    "independent ones; whole images bring it back, so shares of 0, .1 and .25 are drawn too.",
)


def look(subject: "Subject", progress: Progress) -> Section:
    """Distributions of a batch, and the states that it covers."""
    config, train = subject.config, subject.source.train
    size = min(config.training.batch_size, len(train))
    x0, _ = read_images(train, size, "batch")
    found = contents(config, x0)
    progress("what a batch contains", 1, 3)
    covered, views = coverage(config, x0), distinct_views(config, x0[0], VISITS)
    progress("what a batch contains", 2, 3)
    loss = heldout_loss(subject.model, subject.source.heldout, config.flow.path, PAIRS)
    highest = Estimate(loss.by_timestep[-1], loss.by_timestep_standard_errors[-1])
    progress("what a batch contains", 3, 3)
    shown = visits_per_image(config, len(train))
    steps_a_visit = config.training.steps / shown
    visible, signal = float(found.visible.mean()), float(found.signal.mean())
    tokens = config.model.num_tokens
    visits, partitions, states = views[-1]
    findings = [
        f"A token attends to {number(visible)} of {tokens} tokens, worth {number(signal)} clean ones.",
        f"P(all timesteps > {HIGH:g}) is {plus_minus(found.both_high())}; the held-out loss on whole images "
        f"with t > {HIGH:g} is {plus_minus(highest)}.",
        f"{config.training.steps:,} steps show an image {number(shown)} times; after {visits} visits it has "
        f"been {partitions} distinct partitions, and {states} with the timesteps in tenths.",
    ]
    tables = [
        Table(
            f"P(all timesteps > {HIGH:g})",
            ("share of whole images", "share of the images"),
            [(f"{share:g}", (value,)) for share, value in covered.items()],
        ),
        Table(
            "Context of a token",
            ("mean over tokens", "tokens"),
            [("attended to", (visible,)), ("clean tokens’ worth of signal", (signal,))],
        ),
        Table(
            "Distinct views of an image after so many steps",
            ("steps", "visits of the image", "partitions", "partitions and tenths of t"),
            [(f"{round(n * steps_a_visit):,}", (n, parts, both)) for n, parts, both in views],
        ),
    ]
    return Section(
        ABOUT,
        findings,
        _charts(found, views),
        tables,
        numbers={
            "images": len(found.timesteps),
            "tokens_over_t": found.over_t(),
            "images_over_gap": found.over_gap(),
            "states_per_hundred": found.states(),
            "visible_tokens": visible,
            "clean_tokens_worth": signal,
            "all_high": found.both_high(),
            "all_high_by_whole_share": covered,
            "loss_in_highest_bin": highest,
            "visits_per_image": shown,
            "distinct_views": views,
        },
    )


def _charts(found: Contents, views: Sequence[tuple[int, int, int]]) -> list[Chart]:
    names = [f".{k}" for k in range(BINS)]
    centres = [(k + 0.5) / BINS for k in range(BINS)]

    def histogram(name: str, style: int, shares: Sequence[float]) -> Series:
        heights = [from_share(share, len(found.timesteps)) for share in shares]
        return Series(name, style, list(zip(centres, heights, strict=True)))

    def counts(name: str, style: int, which: int) -> Series:
        points = [(math.log10(of[0]), Estimate(math.log10(of[which]), 0.0)) for of in views]
        return Series(name, style, points)

    shares = [
        histogram("timestep of a token", 1, found.over_t()),
        histogram("gap within an image", 2, found.over_gap()),
    ]
    distinct = [counts("partition and tenths of t", 1, 2), counts("partition", 2, 1)]
    density = heat_map(
        found.states(), names, names, "smallest t", "largest t", "Density of smallest and largest t"
    )
    return [
        Chart(
            "Timesteps and gaps",
            curve_chart(shares, "t, or gap", "Shares of tokens over t, of images over the gap"),
            "Share of the tokens, and of the images, in ten bins.",
            shares,
        ),
        Chart(
            "States of an image",
            density,
            "Images in a hundred, by tenths of the smallest and the largest timestep.",
        ),
        Chart(
            "Distinct views of an image",
            curve_chart(distinct, "visits, log₁₀", "Distinct views over visits, as logarithms"),
            "Logarithm of the number of distinct views over that of visits.",
            distinct,
        ),
    ]
