"""Label reliance: how much of the denoising is owed to the label."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from selfalign.data.source import Split
from selfalign.evaluation.config import Progress
from selfalign.evaluation.estimate import Estimate
from selfalign.inspect.scenes import SEED
from selfalign.inspect.section import About, Section
from selfalign.network import Backbone
from selfalign.pages.figures import Chart, Series, curve_chart
from selfalign.pages.numbers import plus_minus
from selfalign.randomness import make_generator
from selfalign.training.heldout import BINS, HeldOutErrors, HeldOutLoss, heldout_errors, summarise

if TYPE_CHECKING:
    from selfalign.inspect.subject import Subject

PAIRS = 2_000


@dataclass(frozen=True)
class Relabelled:
    """A split whose images have other labels."""

    split: Split
    labels: Int[Tensor, "M"]

    @property
    def reads_in_threads(self) -> bool:
        """As the split itself."""
        return self.split.reads_in_threads

    def __len__(self) -> int:
        return len(self.split)

    def read(
        self, indices: Sequence[int], seeds: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Split.read`."""
        return self.split.read(indices, seeds)[0], self.labels[torch.as_tensor(indices)]


def label_reliance(
    model: Backbone,
    split: Split,
    path: str,
    pairs: int = PAIRS,
    shuffled: bool = False,
    told: HeldOutErrors | None = None,
) -> HeldOutErrors:
    """L(no label) - L(label) on every pair of `heldout_errors`: `summarise` makes G(t) of it.

    Args:
        model: in eval mode; any backbone with classes and a null label that it was trained with.
        split: the held-out images.
        path: name of the path of Eq. 1.
        pairs: of an image and a timestep.
        shuffled: whether images have each other's labels, permuted once: the control. A model that
            uses labels then does worse with them than without: G is below zero.
        told: errors on these pairs with labels, where they are known already.
    """
    if told is None:
        chosen = split
        if shuffled:
            order = torch.randperm(len(split), generator=make_generator(SEED, "label permutation"))
            chosen = Relabelled(split, split.labels[order])
        told = heldout_errors(model, chosen, path, pairs)
    untold = heldout_errors(model, split, path, pairs, with_labels=False)
    return replace(untold, errors=untold.errors - told.errors)


ABOUT = About(
    title="Label reliance",
    question="How much does the model make of a label?",
    definition="G(t) = L(t, no label) − L(t, label): the loss with the null label minus that with the true "
    "one, on the same held-out images, timesteps and noise.",
    control="labels permuted between images, with which G must not be above zero; another seed of the "
    "same training.",
    pads=True,
)


def look(subject: "Subject", progress: Progress) -> Section:
    """G over t, of the model, of shuffled labels, and of another seed."""
    if not subject.model.num_classes or subject.source.num_classes < 2:
        return ABOUT.left_out("the model or its data has no two classes")
    if subject.config.views.class_dropout == 0:
        return ABOUT.left_out("trained without dropped labels, it has never seen the null label")
    split, path = subject.source.heldout, subject.config.flow.path
    runs = [("this model", subject.model, False), ("shuffled labels", subject.model, True)]
    if subject.twin is not None:
        runs.append(("another seed", subject.twin, False))
    found = {}
    for done, (name, model, shuffled) in enumerate(runs, 1):
        found[name] = summarise(label_reliance(model, split, path, PAIRS, shuffled))
        progress("label reliance", done, len(runs))
    centres = [(k + 0.5) / BINS for k in range(BINS)]
    lines = [
        Series(name, style, list(zip(centres, _bins(loss), strict=True)))
        for (name, loss), style in zip(found.items(), (1, 0, 3), strict=False)
    ]
    own, control = (
        Estimate(found[name].overall, found[name].standard_error) for name, _, _ in runs[:2]
    )
    chart = Chart(
        "G over t",
        curve_chart(lines, "t (1 is noise)", "Label reliance over t"),
        "Ten bins of t, 95 % intervals for the choice of images.",
        lines,
    )
    return Section(
        ABOUT,
        [
            f"The label lowers the held-out loss by {plus_minus(own)}; with shuffled labels G is "
            f"{plus_minus(control)}."
        ],
        [chart],
        notes=[] if subject.twin is not None else ["another seed was not given (--beside)"],
        numbers={"pairs": PAIRS, **found},
    )


def _bins(loss: HeldOutLoss) -> list[Estimate]:
    errors = loss.by_timestep_standard_errors
    return [Estimate(v, e) for v, e in zip(loss.by_timestep, errors, strict=True)]
