"""The loss of a token as a function of its own and of the other group's timestep."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from selfalign.data.source import DataSource
from selfalign.evaluation.config import Progress
from selfalign.evaluation.estimate import Estimate
from selfalign.flow import Path
from selfalign.inspect.scenes import Scene, make_scene, mean_of, read_images, token_errors
from selfalign.inspect.section import About, Section, Table
from selfalign.network import Backbone
from selfalign.pages.figures import Chart, Series, curve_chart, heat_map
from selfalign.pages.numbers import number, plus_minus
from selfalign.tokens import TokenGrid

if TYPE_CHECKING:
    from selfalign.inspect.subject import Subject

LEVELS = tuple(k / 9 for k in range(10))
"""Timesteps of the grid, both ends included."""
IMAGES = 200
GAUSSIAN_IMAGES = 5_000
"""Images whose covariance is taken."""
GAUSSIAN_VALUES = 1_024
"""Values of an image for which a covariance of all of them is small enough."""
GAUSSIAN_PARTITIONS = 2
LEAST_GAIN = 0.01
"""Share of the best linear denoiser's largest gain below which nothing is divided by its gain."""
JITTER = 1e-10
"""Share of the mean variance by which the covariance is raised: pixels may be constant."""


@dataclass(frozen=True)
class LossGrid:
    """L(own t, other s) of every image: the mean over its tokens, each as one of its own group."""

    levels: tuple[float, ...]
    errors: Float[Tensor, "T T M"]
    """By own timestep, the other group's, and image; in float64."""

    @property
    def loss(self) -> Float[Tensor, "T T"]:
        """Means over images."""
        return self.errors.mean(dim=2)

    @property
    def gain_by_image(self) -> Float[Tensor, "T M"]:
        """U(t) = L(t, 1) - L(t, 0) at every own t: what a clean other group is worth against a noise one."""
        return self.errors[:, -1] - self.errors[:, 0]

    def mean_gain(self) -> Estimate:
        """Mean of U over the own timesteps above 0: a token without noise has nothing to gain."""
        return mean_of(_over_t(self.gain_by_image, self.levels))

    def by_gap(self) -> list[tuple[float, Estimate]]:
        """Mean of L(t, s) - L(t, t) over the pairs with |t - s| of each gap, by image and own t.

        Own timesteps are the same in both terms: what changes is the other group's only.
        """
        found, count = [], len(self.levels)
        for gap in range(1, count):
            pairs = [(i, i + d) for d in (gap, -gap) for i in range(count) if 0 <= i + d < count]
            change = torch.stack([self.errors[i, j] - self.errors[i, i] for i, j in pairs])
            found.append((self.levels[gap] - self.levels[0], mean_of(change.mean(dim=0))))
        return found


def loss_grid(
    model: Backbone,
    scene: Scene,
    levels: Sequence[float] = LEVELS,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> LossGrid:
    """Score all pairs of timesteps on the same images, groups and noise.

    Each pair (t, s) is given to the two groups in this order; the first group's tokens then have own
    timestep t, the second's s. Under separation L is constant in s: own and other never meet.

    Args:
        model: in eval mode; any backbone.
        scene: what it is shown, and whether its groups see each other.
        levels: ascending timesteps, T of them.
        tick: told how many of all pairs are done.
    """
    count, first = len(levels), scene.groups.sizes[0]
    total = torch.zeros(count, count, len(scene), dtype=torch.float64)
    for i, t in enumerate(levels):
        for j, s in enumerate(levels):
            errors = token_errors(model, scene, (t, s))
            total[i, j] += errors[:, :first].sum(dim=1)
            total[j, i] += errors[:, first:].sum(dim=1)
            tick(i * count + j + 1, count * count)
    return LossGrid(tuple(levels), total / model.num_tokens)


def gaussian_loss(
    covariance: Float[Tensor, "N P N P"],
    first: Float[Tensor, "N"],
    timesteps: tuple[float, float],
    path: Path,
) -> Float[Tensor, "N"]:
    """Smallest possible squared error of every token's velocity where images are Gaussian.

    With x_t = a·x0 + b·e and v = a'·x0 + b'·e, a and b diagonal, the posterior covariance of v given x_t is
    Cov(v) - Cov(v, x_t) Cov(x_t)⁻¹ Cov(x_t, v): the Bayes value, and for other images that of the best
    linear denoiser.

    Args:
        covariance: of the clean tokens' values, in image order, in float64.
        first: which tokens are in the first group.
        timesteps: of the first and the other group.
        path: of Eq. 1.
    """
    tokens, values = covariance.shape[:2]
    sigma = covariance.reshape(tokens * values, -1)
    own, other = (torch.tensor(t, dtype=sigma.dtype) for t in timesteps)
    t = torch.where(first.bool(), own, other).repeat_interleave(values)
    a, b = path.alpha(t), path.sigma(t)
    da, db = path.alpha_derivative(t), path.sigma_derivative(t)
    ridge = JITTER * sigma.diagonal().mean()
    seen = a[:, None] * sigma * a + torch.diag(b * b + ridge)
    cross = a[:, None] * sigma * da + torch.diag(b * db)  # Cov(x_t, v)
    lower = torch.linalg.cholesky(seen)
    explained = torch.linalg.solve_triangular(lower, cross, upper=False).square().sum(dim=0)
    variance = da * da * sigma.diagonal() + db * db
    return (variance - explained).reshape(tokens, values).mean(dim=1)


def within_class_covariance(
    source: DataSource, grid: TokenGrid, count: int = GAUSSIAN_IMAGES
) -> Float[Tensor, "N P N P"] | None:
    """Covariance of the training images' tokens about their class's mean.

    None where it would be too large, or where the images are too few to show it: fewer, beyond one of each
    class, than an image has values.

    Args:
        source: the data set.
        grid: how its images are cut.
        count: images at most.
    """
    x0, labels = read_images(source.train, count, "covariance")
    tokens = grid.patchify(x0).double()
    shape = tokens.shape[1:]
    values = tokens.flatten(1)
    classes = labels.unique()
    if not len(values) - len(classes) >= values.shape[1] <= GAUSSIAN_VALUES:
        return None
    for label in classes:
        values[labels == label] -= values[labels == label].mean(dim=0)
    return (values.T @ values / (len(values) - len(classes))).reshape(*shape, *shape)


def gaussian_gain(
    covariance: Float[Tensor, "N P N P"], scene: Scene, levels: Sequence[float]
) -> list[float]:
    """U(t) of the best linear denoiser, over some of the scene's partitions."""
    order = scene.groups.order
    assert order is not None
    gains = []
    firsts = torch.zeros(min(GAUSSIAN_PARTITIONS, len(scene)), order.shape[1])
    firsts.scatter_(1, order[: len(firsts), : scene.groups.sizes[0]], 1.0)
    for t in levels:
        of_level = []
        for first in firsts:
            for own, place in ((first, 0), (1 - first, 1)):
                ends = [
                    gaussian_loss(covariance, first, (t, s) if place == 0 else (s, t), scene.path)[
                        own.bool()
                    ].sum()
                    for s in (1.0, 0.0)
                ]
                of_level.append(float(ends[0] - ends[1]))
        gains.append(sum(of_level) / (len(firsts) * order.shape[1]))
    return gains


ABOUT = About(
    title="Loss over both timesteps",
    question="Does a cleaner neighbour help a token, and does training with separation remove that?",
    definition="L(own t, other s): squared velocity error (Eq. 2) of the tokens of one group, which have "
    "timestep t, while the other group has s; each group is “own” in turn, weighted by its tokens. "
    "The same held-out images, groups and noise in all cells. U(t) = L(t, 1) − L(t, 0).",
    control="the diagonal, where both groups share a timestep; separated attention, where L cannot "
    "depend on s; and U of the best linear denoiser that knows the class means (the Bayes value if "
    "the images of a class were Gaussian).",
    mixes_timesteps=True,
)


def look(subject: "Subject", progress: Progress) -> Section:
    """L(own t, other s) with full attention, beside separated attention, and U(t)."""
    scene = make_scene(subject.config, subject.source.heldout, IMAGES, "timesteps")
    full = loss_grid(
        subject.model,
        scene.separated(False),
        LEVELS,
        tick=lambda done, total: progress("loss over both timesteps", done, total),
    )
    apart = _separated_line(subject.model, scene.separated(True))
    gain, mean_gain = [mean_of(of_t) for of_t in full.gain_by_image], full.mean_gain()
    covariance = within_class_covariance(subject.source, subject.config.grid)
    linear = None if covariance is None else gaussian_gain(covariance, scene, LEVELS)
    lines = [Series("this model, full attention", 1, list(zip(LEVELS, gain, strict=True)))]
    share, notes = None, []
    if linear is None:
        notes.append(
            "the best linear denoiser: images are too large for their covariance, or too few"
        )
    else:
        known = [Estimate(value, 0.0) for value in linear]
        lines.append(Series("best linear denoiser", 0, list(zip(LEVELS, known, strict=True))))
        possible = float(_over_t(torch.tensor(linear, dtype=torch.float64), LEVELS))
        share = mean_gain.value / possible if possible > 0 else None
    trained = "separated" if scene.groups.separate else "full"
    means = [
        mean_of(torch.stack([grid.errors[i, i] for i in range(len(LEVELS))]).mean(dim=0))
        for grid in (full, apart)
    ]
    findings = [
        "With full attention, clean tokens in the other group instead of pure noise lower a token’s loss by "
        f"{plus_minus(mean_gain)} on average over own t > 0"
        + (
            "."
            if share is None
            else f": {number(share, 2)} of what the best linear denoiser gains."
        ),
        f"At one timestep the loss is {plus_minus(means[0])} with full attention and "
        f"{plus_minus(means[1])} with separated; the model was trained with {trained}.",
    ]
    names = [f"{t:.2f}" for t in LEVELS]
    charts = [
        Chart(
            "Loss of a token, full attention",
            heat_map(
                full.loss.tolist(),
                names,
                names,
                "own t",
                "the other group’s t",
                "Loss of a token over its own and the other group’s timestep, full attention",
            ),
            "Rows: the token’s own timestep. Columns: the other group’s. 1 is noise.",
        ),
        Chart(
            "What the other group is worth, U(t)",
            curve_chart(lines, "own t (1 is noise)", "L(t, 1) − L(t, 0) over own t"),
            "Loss beside pure noise minus loss beside clean tokens, with 95 % intervals over images.",
            lines,
        ),
    ]
    shares = _shares_of(gain, linear)
    rows = [
        (
            f"{t:.2f}",
            [
                *(mean_of(full.errors[i, j]) for j in (i, 0, -1)),
                mean_of(apart.errors[i, i]),
                gain[i],
                shares[i],
            ],
        )
        for i, t in enumerate(LEVELS)
    ]
    columns = (
        *("own t", "other at t", "other clean", "other noise", "separated attention"),
        *("U", "U over the best linear denoiser’s"),
    )
    return Section(
        ABOUT,
        findings,
        charts,
        [Table("Loss by own timestep", columns, rows)],
        notes,
        {
            "levels": list(LEVELS),
            "images": len(scene),
            "tokens_per_group": list(scene.groups.sizes),
            "trained_with": trained,
            "full": full.loss.tolist(),
            "separated": apart.loss[:, 0].tolist(),
            "context_gain": gain,
            "mean_context_gain": mean_gain,
            "context_gain_linear": linear,
            "share_of_linear": share,
            "share_of_linear_by_t": shares,
        },
    )


def _shares_of(
    gain: Sequence[Estimate], linear: Sequence[float] | None
) -> Sequence[Estimate | None]:
    """U over that of the best linear denoiser at every own t; None where it is not known or gains nothing."""
    if linear is None:
        return [None] * len(gain)
    least = LEAST_GAIN * max(linear)
    return [
        Estimate(of.value / known, of.standard_error / known) if known > least else None
        for of, known in zip(gain, linear, strict=True)
    ]


def _separated_line(model: Backbone, scene: Scene) -> LossGrid:
    """The grid under separated attention, which does not depend on the other group: T passes, not T²."""
    own = torch.stack([token_errors(model, scene, (t, t)).mean(dim=1) for t in LEVELS])
    return LossGrid(LEVELS, own[:, None].expand(-1, len(LEVELS), -1))


def _over_t(values: Float[Tensor, "T *rest"], levels: Sequence[float]) -> Float[Tensor, "*rest"]:
    """Mean over the levels above 0, by trapezoids between them."""
    t = torch.tensor(levels, dtype=values.dtype)
    values, t = values[t > 0], t[t > 0]
    return torch.trapezoid(values, t, dim=0) / (t[-1] - t[0])
