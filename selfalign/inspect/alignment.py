"""Alignment over training: how alike student and teacher are, by block, beside what any image gives."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from selfalign.config import ResolvedConfig
from selfalign.data.source import Split
from selfalign.encoders import IMAGES as ENCODED
from selfalign.errors import UserError
from selfalign.evaluation.config import Progress
from selfalign.evaluation.estimate import Estimate, from_independent
from selfalign.inspect.features import chosen_blocks
from selfalign.inspect.scenes import SEED, mean_of, read_images
from selfalign.inspect.section import About, Section, Table
from selfalign.network import Backbone, Tap
from selfalign.objective import Objective
from selfalign.pages.figures import Chart, Series, curve_chart
from selfalign.pages.numbers import plus_minus
from selfalign.randomness import make_generator
from selfalign.targets.ema import EMATarget
from selfalign.views import draw_views, make_views

if TYPE_CHECKING:
    from selfalign.inspect.subject import Subject

IMAGES = 128
MOST_CHECKPOINTS = 8
"""Of those that are kept, evenly spread."""
MOST_POINTS = 40
PARTS = 4
"""Draws of the recipe that the loss is the mean of."""


@dataclass(frozen=True)
class Alike:
    """Mean cosine over tokens of two sets of features of the same images."""

    same: Estimate
    other: Estimate
    """Against the features of another image at the same place: what a shared mean gives."""


def alike(first: Float[Tensor, "M N D"], second: Float[Tensor, "M N D"]) -> Alike:
    """Cosine of the tokens of each image with its own and with the next image's."""
    values = [
        cosine_similarity(first, part, dim=2).mean(dim=1).double()
        for part in (second, second.roll(1, 0))
    ]
    return Alike(*map(mean_of, values))


@dataclass(frozen=True)
class Alignment:
    """Student and teacher on the views of training."""

    by_block: Mapping[Tap, Alike]
    """Student and teacher after the same block, raw features, each at its own view."""
    loss: Estimate | None
    """The alignment loss itself, through the student's head; None without one."""
    loss_other: Estimate | None
    """The same with the target of another image."""


@torch.no_grad()
def alignment(
    student: Backbone,
    teacher: Backbone,
    config: ResolvedConfig,
    split: Split,
    blocks: Sequence[Tap],
    images: int = IMAGES,
    decode: Callable[[Tensor], Tensor] = lambda samples: samples,
    with_loss: bool = True,
) -> Alignment:
    """How alike student and teacher are on held-out images, drawn as in training.

    Partitions, timesteps and noise are those of the recipe, the same for every checkpoint. Encoders run
    along: the features that a run has stored are those of its training images.

    Args:
        student: the trained weights, with heads.
        teacher: their average.
        config: a resolved tree.
        split: the held-out images.
        blocks: counted from 1.
        images: how many.
        decode: from the model's space to the images in [-1, 1] that encoders see.
        with_loss: whether the alignment loss is wanted, and what it is compared with is there.

    Raises:
        UserError: an encoder or a teacher that the loss needs is not there.
    """
    device, used = student.device, config.used_targets()
    x0, labels = (part.to(device) for part in read_images(split, images, "alignment"))
    draw = draw_views(config, x0, make_generator(SEED, "alignment", device=device))
    views = make_views(config, x0, draw)
    ema = used.get("ema")
    seen = ema.view(views, draw) if isinstance(ema, EMATarget) else views.student
    features = [
        model.features(view.tokens, view.timesteps, labels, view.groups, tuple(blocks))
        for model, view in ((student, views.student), (teacher, seen))
    ]
    by_block = {block: alike(features[0][block], features[1][block]) for block in blocks}
    term = config.used_terms().get("alignment")
    if (
        not with_loss
        or term is None
        or any(name not in student.head_taps for name in term.head_names(config))
    ):
        return Alignment(by_block, None, None)
    settings = config.targets
    for name, target in used.items():
        live = target.live()
        settings = settings.override(name, {f.name: getattr(live, f.name) for f in fields(live)})
    objective = Objective(replace(config, targets=settings))
    looked_at = any(target.sees_images for target in used.values())
    losses: list[list[float]] = [[], []]
    for number_of, part in enumerate(torch.arange(len(x0), device=device).chunk(PARTS)):
        generator = make_generator(SEED, "alignment loss", number_of, device=device)
        of_part = draw_views(config, x0[part], generator)
        stored = {}
        if looked_at:
            stored[ENCODED] = ((decode(x0[part]) + 1) / 2).permute(0, 2, 3, 1)
        forward = objective.predict(
            student, teacher, x0[part], labels[part], of_part, stored=stored
        )
        rolled = {name: target.roll(1, 0) for name, target in forward.targets.items()}
        for values, targets in zip(losses, (forward.targets, rolled), strict=True):
            values.append(float(term(replace(forward, targets=targets)).mean()))
    own, other = map(from_independent, losses)
    return Alignment(by_block, own, other)


def logged(metrics: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, Estimate]]:
    """A term's loss over training, in at most MOST_POINTS parts of equally many logged steps.

    Args:
        metrics: the lines of metrics.jsonl.
        name: of the term.
    """
    points = [(line["step"], line[f"{name}_loss"]) for line in metrics if f"{name}_loss" in line]
    points = [(step, value) for step, value in points if math.isfinite(value)]
    size = max(1, -(-len(points) // MOST_POINTS))
    found = []
    for start in range(0, len(points), size):
        steps, values = zip(*points[start : start + size], strict=True)
        found.append((sum(steps) / len(steps), from_independent(values)))
    return found


ABOUT = About(
    title="Alignment over training",
    question="How alike are student and teacher, and how much of that is about the image?",
    definition="Mean cosine over tokens of the student’s (trained weights) and the teacher’s (EMA) features "
    "after the same block, each at the view that it has in training, on held-out images; and the alignment "
    "loss itself, through the student’s head.",
    control="the same with another image’s features at the same place: what remains of a high cosine is a "
    "shared mean, and no agreement about the image.",
    needs_all_tokens=True,
)


def look(subject: "Subject", progress: Progress) -> Section:
    """Similarity over training, and by block at the checkpoints that are kept."""
    config, split = subject.config, subject.source.heldout
    blocks: list[Tap] = list(chosen_blocks(len(subject.model.blocks)))
    kept = list(subject.checkpoints(MOST_CHECKPOINTS))
    found: dict[int, Alignment] = {}
    notes: list[str] = []
    for done, (step, load) in enumerate(kept, 1):
        models = load()
        try:
            found[step] = alignment(*models, config, split, blocks, IMAGES, subject.decode)
        except UserError as error:  # an encoder's weights, or what decodes latents, may not be here
            found[step] = alignment(*models, config, split, blocks, IMAGES, with_loss=False)
            notes.append(f"the alignment loss at step {step}: {error}")
        progress("alignment over training", done, len(kept))
    term = config.used_terms().get("alignment")
    cosine = str(getattr(term, "distance", "")).startswith("cosine")
    what = "similarity" if cosine else "alignment loss"
    curve = logged(subject.metrics, "alignment")

    def shown(loss: Estimate) -> Estimate:
        return Estimate(1 - loss.value, loss.standard_error) if cosine else loss

    curve = [(step, shown(loss)) for step, loss in curve]
    last, middle = found[max(found)], blocks[len(blocks) // 2]
    findings = []
    if last.loss is not None and last.loss_other is not None:
        findings.append(
            f"At the last checkpoint the {what} through the student’s head is {plus_minus(shown(last.loss))} "
            f"with the image’s own target and {plus_minus(shown(last.loss_other))} with another image’s: "
            "only what lies between is about the image."
        )
    elif term is None:
        findings.append(
            "This recipe aligns nothing: student and teacher are two averages of one run."
        )
    of_middle = last.by_block[middle]
    findings.append(
        f"Raw features after block {middle}: cosine {plus_minus(of_middle.same)}, with another image "
        f"{plus_minus(of_middle.other)}."
    )
    if len(found) == 1:
        notes.append("one checkpoint is kept; training.keep_checkpoints keeps more, to be compared")
    columns = ["step", *(f"block {b}" for b in blocks), *(f"{b}, other image" for b in blocks)]
    rows = [
        (
            str(step),
            [a.by_block[b].same for b in blocks] + [a.by_block[b].other for b in blocks],
        )
        for step, a in found.items()
    ]
    return Section(
        ABOUT,
        findings,
        _charts(curve, what, found, blocks),
        [Table("Cosine of student and teacher by checkpoint", columns, rows)],
        notes,
        {
            "images": IMAGES,
            "blocks": blocks,
            "checkpoints": found,
            "logged": curve,
            "logged_is": what,
        },
    )


def _charts(
    curve: Sequence[tuple[float, Estimate]],
    what: str,
    found: Mapping[int, Alignment],
    blocks: Sequence[Tap],
) -> list[Chart]:
    """Over training as logged, by block at the last checkpoint, and by block over the checkpoints."""
    charts = []
    if curve:
        line = [Series(what, 1, curve)]
        charts.append(
            Chart(
                f"Over training: {what}",
                curve_chart(line, "step", f"{what} over training"),
                "As logged while it trained, the student’s head against its target, in means over "
                "neighbouring steps" + ("; 1 minus the loss." if what == "similarity" else "."),
            )
        )
    last = found[max(found)].by_block
    places = [float(k) for k in range(1, len(blocks) + 1)]
    by_block = [
        Series("the same image", 1, list(zip(places, (last[b].same for b in blocks), strict=True))),
        Series("another image", 0, list(zip(places, (last[b].other for b in blocks), strict=True))),
    ]
    charts.append(
        Chart(
            "By block, at the last checkpoint",
            curve_chart(by_block, f"block ({', '.join(map(str, blocks))})", "Cosine by block"),
            "Cosine of the tokens of student and teacher after the same block, raw features.",
            by_block,
        )
    )
    if len(found) > 1:
        over = [
            Series(f"block {b}", 1 + k, [(step, a.by_block[b].same) for step, a in found.items()])
            for k, b in enumerate(blocks)
        ]
        charts.append(
            Chart(
                "By block, over the checkpoints",
                curve_chart(over, "step", "Cosine over training, by block"),
                "Cosine of the same image’s tokens.",
                over,
            )
        )
    return charts
