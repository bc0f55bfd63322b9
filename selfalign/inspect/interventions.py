"""Interventions at inference: the same weights, and something changed in what they see."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfalign.data.shapes import to_uint8
from selfalign.data.source import Split
from selfalign.evaluation.config import Progress
from selfalign.evaluation.estimate import Estimate
from selfalign.evaluation.frechet import fit, frechet_estimate
from selfalign.inspect.scenes import (
    SEED,
    Scene,
    batches,
    make_scene,
    mean_of,
    read_images,
    token_errors,
)
from selfalign.inspect.section import About, Section, Table
from selfalign.inspect.timesteps import LossGrid
from selfalign.network import Backbone
from selfalign.pages.figures import Chart, Series, curve_chart, heat_map
from selfalign.pages.numbers import plus_minus
from selfalign.randomness import make_generator
from selfalign.sampling.generate import Labels, balanced_labels, generate
from selfalign.sampling.settings import SamplingConfig
from selfalign.tokens import TokenGroups
from selfalign.training.heldout import (
    WHOLE,
    HeldOutErrors,
    Seen,
    heldout_errors,
    summarise,
)

if TYPE_CHECKING:
    from selfalign.inspect.subject import Subject

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
IMAGES = 128
IMAGES_OF_A_CLASS = 4
"""On average, at least: each is to have another one of its class."""
SHARES = (0.125, 0.25, 0.375, 0.5)
"""Of the tokens, in the smaller of two separated groups."""
PAIRS = 1_000
"""Of a held-out image and a timestep."""
SAMPLES = 300
STEPS = 20
GAPS = (0.2, 0.4)
"""By which two timesteps are held apart in sampling."""
REFERENCE_IMAGES = 5_000
NAMES = {
    "cut": "cross-group attention cut",
    "content": "the other group’s content from another image of the class",
    "timestep": "the other group’s timestep said to be the own",
}


@dataclass(frozen=True)
class Interventions:
    """L(own t, other s) with the model's own attention, with the other one, and what interventions add."""

    full: LossGrid
    separated: LossGrid
    changes: Mapping[str, Float[Tensor, "T T m"]]
    """ΔL by the names of NAMES. Of content, for the images that are not the only one of their class; left
    out where all are."""


def partners(labels: Int[Tensor, "M"]) -> Int[Tensor, "M"]:
    """For every image the next one of its class; itself where it is the only one."""
    partner = torch.arange(len(labels))
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        partner[members] = members.roll(-1)
    return partner


def intervene(
    model: Backbone,
    scene: Scene,
    levels: Sequence[float] = LEVELS,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Interventions:
    """ΔL(t, s) of the tokens of one group when something about the other group is changed.

    Cut: the groups no longer attend to each other. Content: the other group shows, at the same places and
    noise, another image of the class. Timestep: the network is told that the other group's timestep is the
    own one. At s = t the last changes nothing; with separated attention all of them are exactly 0.

    Args:
        model: in eval mode; any backbone.
        scene: what it is shown, with the attention of its training.
        levels: timesteps, T of them.
        tick: told how many of all pairs are done.
    """
    count, first = len(levels), scene.groups.sizes[0]
    partner = partners(scene.labels)
    exchanged = partner != torch.arange(len(scene))
    others = scene.groups.sort(scene.groups.restore(scene.clean)[partner])
    # Content of the other group, for the own group 0 and 1.
    mixed = [
        replace(scene, clean=torch.cat([scene.clean[:, :first], others[:, first:]], dim=1)),
        replace(scene, clean=torch.cat([others[:, :first], scene.clean[:, first:]], dim=1)),
    ]
    tables = {
        name: torch.zeros(count, count, len(scene), dtype=torch.float64)
        for name in ("full", "separated", "content", "timestep")
    }

    def add(name: str, i: int, j: int, errors: Tensor, groups: Sequence[int] = (0, 1)) -> None:
        """To own and other level, from errors of the groups at levels i and j."""
        if 0 in groups:
            tables[name][i, j] += errors[:, :first].sum(dim=1)
        if 1 in groups:
            tables[name][j, i] += errors[:, first:].sum(dim=1)

    for i, t in enumerate(levels):
        for j, s in enumerate(levels):
            for name, separate in (("full", False), ("separated", True)):
                add(name, i, j, token_errors(model, scene.separated(separate), (t, s)))
            for own in (0, 1):
                add("content", i, j, token_errors(model, mixed[own], (t, s)), (own,))
                told = (t, t) if own == 0 else (s, s)
                add("timestep", i, j, token_errors(model, scene, (t, s), told), (own,))
            tick(i * count + j + 1, count * count)
    tables = {name: table / model.num_tokens for name, table in tables.items()}
    base = tables["separated" if scene.groups.separate else "full"]
    changes = {
        "cut": tables["separated"] - base,
        "content": (tables["content"] - base)[:, :, exchanged],
        "timestep": tables["timestep"] - base,
    }
    return Interventions(
        LossGrid(tuple(levels), tables["full"]),
        LossGrid(tuple(levels), tables["separated"]),
        {name: change for name, change in changes.items() if change.numel()},
    )


def losses_by_share(
    model: Backbone,
    split: Split,
    path: str,
    shares: Sequence[float] = SHARES,
    pairs: int = PAIRS,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> dict[float, HeldOutErrors]:
    """Held-out errors with full attention (a share of 0), and with two separated random groups.

    Args:
        model: in eval mode; any backbone.
        split: the held-out images.
        path: name of the path of Eq. 1.
        shares: of the tokens in the smaller group.
        pairs: of an image and a timestep, the same for all shares.
        tick: told how many of all shares are done.
    """
    found: dict[float, HeldOutErrors] = {}
    for share in (0.0, *shares):
        seen = Seen((share, 1 - share), separate=True) if share else WHOLE
        found[share] = heldout_errors(model, split, path, pairs, seen=seen)
        tick(len(found), 1 + len(shares))
    return found


@torch.no_grad()
def sample_apart(
    model: Backbone,
    noise: Float[Tensor, "B C *sides"],
    condition: Int[Tensor, "B"],
    groups: TokenGroups,
    gap: float,
    steps: int,
) -> Float[Tensor, "B C *sides"]:
    """Samples whose first group is ahead of the other by a gap in t, by Euler steps of each group's own.

    Both begin at 1 and end at 0: with u from 1 to 0, t_1 = clip(u·(1+gap) - gap) and t_2 = clip(u·(1+gap)).
    With a gap of 0 this is Euler's method on whole images.

    Args:
        model: in eval mode; any backbone.
        noise: where the samples begin.
        condition: one per sample.
        groups: two of them, and whether they see each other.
        gap: from 0 to below 1.
        steps: of u.
    """
    x = groups.sort(model.grid.patchify(noise.to(model.device, model.dtype)))
    u = torch.linspace(1, 0, steps + 1, device=x.device, dtype=x.dtype) * (1 + gap)
    times = torch.stack([u - gap, u], dim=1).clamp(0, 1)
    for now, then in itertools.pairwise(times):
        t = now.expand(len(x), 2)
        velocity = model(x, t, condition, groups).velocity
        x = x + groups.broadcast((then - now).expand(len(x), 2)[..., None]) * velocity
    return model.grid.unpatchify(groups.restore(x))


ABOUT = About(
    title="Interventions",
    question="What do tokens use of the other group, and what does another attention than in training cost?",
    definition="ΔL(t, s): change of the squared velocity error of one group’s tokens, whose timestep is t, "
    "when the other group (timestep s) is cut off, shows another image of the class, or is said to have "
    "timestep t; the same held-out images, groups and noise. And the held-out loss and the Fréchet distance "
    "of the same weights with other attention, and with two timesteps held apart.",
    control="the same at s = t; and models with separated attention, for which all three are exactly 0.",
    mixes_timesteps=True,
)


def look(subject: "Subject", progress: Progress) -> Section:
    """ΔL of the interventions, and the mismatch between training and sampling."""
    model, config, split = subject.model, subject.config, subject.source.heldout
    scene = make_scene(config, split, IMAGES, "interventions", classes=_classes(split))
    trained = "separated" if scene.groups.separate else "full"
    found = intervene(
        model, scene, LEVELS, tick=lambda done, of: progress("interventions", done, of)
    )
    found_by_share = losses_by_share(
        model,
        split,
        config.flow.path,
        SHARES,
        PAIRS,
        lambda done, of: progress("loss by attention", done, of),
    )
    losses = {share: _overall(found) for share, found in found_by_share.items()}
    full = found_by_share[0.0]
    mismatch = {
        share: _overall(replace(found, errors=found.errors - full.errors))
        for share, found in found_by_share.items()
    }
    notes, distances = [], {}
    if "content" not in found.changes:
        notes.append("another image of the class: no class has two held-out images")
    if subject.encoder is None:
        notes.append("Fréchet distances: there is no classifier, and --features names no network")
    else:
        distances = _distances(subject, progress)
    off = ~torch.eye(len(LEVELS), dtype=torch.bool)
    means = {
        name: (mean_of(change[off].mean(dim=0)), mean_of(change[~off].mean(dim=0)))
        for name, change in found.changes.items()
    }
    gaps = [
        Series("full attention", 1, found.full.by_gap()),
        Series("separated", 2, found.separated.by_gap()),
    ]
    findings = [
        f"{_capital(NAMES[name])}: {plus_minus(two)} with two timesteps, {plus_minus(one)} with one."
        for name, (two, one) in means.items()
    ]
    findings.append(
        "On whole images the loss with separated attention, a quarter of the tokens in the smaller group, "
        f"minus that with full attention is {plus_minus(mismatch[0.25])}; the training was with {trained}."
    )
    tables = [
        Table(
            "Change of the loss",
            ("intervention", "two timesteps", "one timestep (control)"),
            [(NAMES[name], values) for name, values in means.items()],
        ),
        Table(
            "Held-out loss by attention",
            ("attention", "loss", "minus full"),
            [(_attention(share), (loss, mismatch[share])) for share, loss in losses.items()],
        ),
    ]
    if distances:
        tables.append(
            Table(
                f"Fréchet distance of {SAMPLES} samples from the same noise and labels",
                ("sampled with", "distance"),
                [(name, (value,)) for name, value in distances.items()],
            )
        )
    return Section(
        ABOUT,
        findings,
        [*_change_charts(found), *_mismatch_charts(list(mismatch.items()), gaps)],
        tables,
        notes,
        {
            "levels": list(LEVELS),
            "images": len(scene),
            "trained_with": trained,
            "changes": {name: c.mean(dim=2).tolist() for name, c in found.changes.items()},
            "mean_change": {
                name: {"two_timesteps": two, "one_timestep": one}
                for name, (two, one) in means.items()
            },
            "loss_by_share": losses,
            "loss_minus_full": mismatch,
            "by_gap": {line.name: line.points for line in gaps},
            "frechet_distance": distances,
        },
    )


def _classes(split: Split) -> Int[Tensor, "K"]:
    """The classes of most images, so few that of most of them several images are shown."""
    sizes = split.labels.bincount()
    return sizes.argsort(descending=True, stable=True)[: IMAGES // IMAGES_OF_A_CLASS]


def _change_charts(found: Interventions) -> list[Chart]:
    names = [f"{t:g}" for t in LEVELS]
    return [
        Chart(
            _capital(NAMES[name]),
            heat_map(
                change.mean(dim=2).tolist(),
                names,
                names,
                "own t",
                "the other group’s t",
                f"Change of the loss: {NAMES[name]}",
                signed=True,
            ),
            "ΔL of the own group’s tokens. The diagonal is the control: one timestep for both.",
        )
        for name, change in found.changes.items()
    ]


def _mismatch_charts(
    mismatch: Sequence[tuple[float, Estimate]], gaps: Sequence[Series]
) -> list[Chart]:
    line = [Series("separated", 2, mismatch)]
    return [
        Chart(
            "Separated groups, one timestep",
            curve_chart(line, "share of the smaller group", "Loss above that with full attention"),
            "Held-out loss minus that with full attention (a share of 0), 95 % intervals over images.",
        ),
        Chart(
            "Two timesteps held apart",
            curve_chart(gaps, "gap between the timesteps", "Loss above that of one timestep"),
            "Mean of L(t, s) − L(t, t) over both orders of each gap.",
            gaps,
        ),
    ]


def _overall(errors: HeldOutErrors) -> Estimate:
    """Mean over pairs, its standard error for the choice of images."""
    found = summarise(errors)
    return Estimate(found.overall, found.standard_error)


def _attention(share: float) -> str:
    return f"separated, {share:g} of the tokens" if share else "full attention"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _distances(subject: "Subject", progress: Progress) -> dict[str, Estimate]:
    """Fréchet distances of samples made in several ways from the same noise and labels."""
    model, path = subject.model, subject.config.flow.path
    real, _ = read_images(subject.source.train, REFERENCE_IMAGES, "frechet")
    reference = fit(subject.encode(to_uint8(subject.decode(real))))
    separated = subject.config.views.attention == "separated"
    ways: dict[str, Iterator[Tensor]] = {}
    for share in (0.0, 0.25, 0.5):
        ways[_attention(share)] = _whole(
            model, path, SamplingConfig(solver="euler", steps=STEPS, mask_ratio=share)
        )
    for gap in GAPS:
        name = f"two timesteps {gap:g} apart, {'separated' if separated else 'full'} attention"
        ways[name] = _apart(model, gap, separated)
    found = {}
    for number, (name, images) in enumerate(ways.items()):
        progress("samples by attention", number, len(ways))
        features = [subject.encode(to_uint8(subject.decode(batch)).cpu()) for batch in images]
        found[name] = frechet_estimate(torch.cat(features), reference)
    progress("samples by attention", len(ways), len(ways))
    return found


def _whole(model: Backbone, path: str, sampling: SamplingConfig) -> Iterator[Tensor]:
    labels: Labels | None = "balanced" if model.num_classes else None
    size = batches(SAMPLES, model.num_tokens)[0].stop
    for batch in generate(model, path, sampling, SAMPLES, batch_size=size, labels=labels):
        yield batch.images


def _apart(model: Backbone, gap: float, separate: bool) -> Iterator[Tensor]:
    """As `_whole`, with two random groups of the paper's shares apart in time."""
    shape, tokens = (model.channels, *model.image_size), model.num_tokens
    first = max(1, tokens // 4)
    for part in batches(SAMPLES, tokens):
        numbers = range(part.start, part.stop)
        seed = SamplingConfig().seed
        noise = [torch.randn(shape, generator=make_generator(seed, "sample", i)) for i in numbers]
        order = [
            torch.randperm(tokens, generator=make_generator(SEED, "sample groups", i))
            for i in numbers
        ]
        labels = balanced_labels(max(1, model.num_classes), numbers).to(model.device)
        groups = TokenGroups(
            torch.stack(order).to(model.device), (first, tokens - first), separate=separate
        )
        yield sample_apart(model, torch.stack(noise), labels, groups, gap, STEPS)
