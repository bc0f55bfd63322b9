"""How alike two sets of features are: linear CKA and CKNNA, between blocks, networks and an encoder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from selfalign.data.shapes import to_uint8
from selfalign.evaluation.config import Progress
from selfalign.evaluation.estimate import GROUPS, Estimate, from_jackknife
from selfalign.inspect.features import chosen_blocks, mean_tokens, untrained
from selfalign.inspect.scenes import SEED, read_images
from selfalign.inspect.section import About, Section, Table
from selfalign.network import Tap
from selfalign.pages.figures import Chart, heat_map
from selfalign.pages.numbers import plus_minus
from selfalign.randomness import make_generator

if TYPE_CHECKING:
    from selfalign.inspect.subject import Subject

IMAGES = 600
LEAST_IMAGES = 500
"""Below which the page says that they are few."""
NEIGHBOURS = 10
TIMESTEP = 0.3
TEACHER_TIMESTEP = 0.2
"""Where the teacher is compared: SRA's lies below the student's by 0.1 on average."""
PERMUTATIONS = 10

Measure = Callable[[Tensor, Tensor], float]
"""Of two kernel matrices."""


def gram(features: Float[Tensor, "M D"]) -> Float[Tensor, "M M"]:
    """Inner products of centred features, in float64."""
    centred = features.double() - features.double().mean(dim=0)
    return centred @ centred.T


def hsic(first: Float[Tensor, "M M"], second: Float[Tensor, "M M"]) -> float:
    """The unbiased estimate of the Hilbert-Schmidt independence criterion (Song et al., JMLR 13, 2012).

    Args:
        first, second: kernel matrices of the same images; their diagonals are not read.
    """
    count = len(first)
    k, l_ = first.clone().fill_diagonal_(0), second.clone().fill_diagonal_(0)
    sums = k.sum() * l_.sum() / ((count - 1) * (count - 2))
    rows = 2 * (k.sum(dim=0) @ l_.sum(dim=1)) / (count - 2)
    return float(((k * l_.T).sum() + sums - rows) / (count * (count - 3)))


def linear_cka(first: Float[Tensor, "M D"], second: Float[Tensor, "M Z"]) -> float:
    """Debiased linear CKA (arXiv:1905.00414, with the estimate of `hsic`): 1 up to rotation and scale.

    Independent features give 0 on average, and so a little less than 0 half of the time.

    Args:
        first, second: features of the same M images, 4 or more.
    """
    return _cka(gram(first), gram(second))


def cknna(first: Float[Tensor, "M D"], second: Float[Tensor, "M Z"], k: int = NEIGHBOURS) -> float:
    """CKA among mutual nearest neighbours (arXiv:2405.07987): local likeness.

    A pair (i, j) counts where j is among the k images nearest to i, by inner product of centred features,
    in both sets. With k = M - 1 all pairs count, and it is `linear_cka`.

    Args:
        first, second: features of the same M images, 4 or more.
        k: neighbours.
    """
    return _cknna(gram(first), gram(second), k)


def _cka(one: Float[Tensor, "M M"], two: Float[Tensor, "M M"]) -> float:
    scale = max(hsic(one, one), 0.0) * max(hsic(two, two), 0.0)
    return hsic(one, two) / max(scale, 1e-300) ** 0.5


def _cknna(one: Float[Tensor, "M M"], two: Float[Tensor, "M M"], k: int = NEIGHBOURS) -> float:
    near = _neighbours(one, k), _neighbours(two, k)
    both = near[0] & near[1]
    own = [
        hsic(kernel * mask, kernel * mask) for kernel, mask in zip((one, two), near, strict=True)
    ]
    return hsic(one * both, two * both) / max(own[0] * own[1], 1e-300) ** 0.5


def _neighbours(kernel: Float[Tensor, "M M"], k: int) -> Bool[Tensor, "M M"]:
    nearest = kernel.clone().fill_diagonal_(-torch.inf).topk(k, dim=1).indices
    return torch.zeros_like(kernel, dtype=torch.bool).scatter_(1, nearest, True)


@dataclass(frozen=True)
class Likeness:
    """Two sets of features compared."""

    cka: Estimate
    cknna: Estimate
    permuted_cka: float
    """Largest of those with the images of one set permuted: what chance gives."""
    permuted_cknna: float


def likeness(first: Float[Tensor, "M D"], second: Float[Tensor, "M Z"]) -> Likeness:
    """Both measures with delete-a-group jackknife errors over images, and those of permuted images."""
    one, two = gram(first), gram(second)
    count = len(one)

    def of(kernel: Tensor, rows: Tensor) -> Tensor:
        return kernel[rows][:, rows]

    kept = [torch.arange(count)[torch.arange(count) % GROUPS != group] for group in range(GROUPS)]
    orders = [
        torch.randperm(count, generator=make_generator(SEED, "likeness", number))
        for number in range(PERMUTATIONS)
    ]

    def estimate(measure: Measure) -> Estimate:
        return from_jackknife(measure(one, two), [measure(of(one, k), of(two, k)) for k in kept])

    def chance(measure: Measure) -> float:
        return max(measure(one, of(two, order)) for order in orders)

    return Likeness(estimate(_cka), estimate(_cknna), chance(_cka), chance(_cknna))


def between(
    first: Mapping[Tap, Float[Tensor, "M D"]],
    second: Mapping[Tap, Float[Tensor, "M Z"]],
    measure: Measure = _cka,
) -> list[list[float]]:
    """How alike every block of the first network is to every block of the second.

    Args:
        first, second: features of the same images, by block.
        measure: of two kernel matrices; left out: linear CKA.
    """
    kernels = (
        [gram(features) for features in first.values()],
        [gram(features) for features in second.values()],
    )
    return [[measure(one, two) for two in kernels[1]] for one in kernels[0]]


ABOUT = About(
    title="Similarity of features",
    question="Which blocks, and which networks, see images alike?",
    definition=f"Debiased linear CKA, and CKNNA over {NEIGHBOURS} mutual nearest neighbours, of the mean "
    f"tokens of {IMAGES} images at t = {TIMESTEP:g}, without labels; held-out images first, then training "
    "images.",
    control=f"the images of one side permuted (the largest of {PERMUTATIONS}); random weights; another seed "
    "of the same training as the ceiling.",
)


def look(subject: "Subject", progress: Progress) -> Section:
    """Between blocks, student and teacher, with an encoder, another seed, and random weights."""
    x0 = _images(subject)
    path, depth = subject.config.flow.path, len(subject.model.blocks)
    blocks: list[Tap] = list(chosen_blocks(depth))
    student_tap, teacher_tap = subject.aligned or (blocks[0], blocks[-1])
    taps = list(dict.fromkeys([*blocks, student_tap, teacher_tap]))
    wanted = [
        (subject.model, TIMESTEP),
        (subject.student, TIMESTEP),
        (subject.teacher, TEACHER_TIMESTEP),
        (untrained(subject.model), TIMESTEP),
        *([] if subject.twin is None else [(subject.twin, TIMESTEP)]),
    ]
    found = []
    for done, (model, t) in enumerate(wanted, 1):
        found.append(mean_tokens(model, x0, path, t, taps, "similarity"))
        progress("similarity", done, len(wanted) + 1)
    own, student, teacher, fresh, *twin = found
    first, middle, last = blocks[0], blocks[len(blocks) // 2], blocks[-1]
    pairs = {
        f"student, block {student_tap}, with teacher, block {teacher_tap}": (
            student[student_tap],
            teacher[teacher_tap],
        ),
        f"block {first} with block {last}": (own[first], own[last]),
        f"block {middle} with random weights": (own[middle], fresh[middle]),
    }
    notes = []
    if len(x0) < LEAST_IMAGES:
        notes.append(
            f"{len(x0)} images are few for CKNNA, which {LEAST_IMAGES} and more make steady"
        )
    if twin:
        pairs |= {
            f"block {block}, ceiling: with another seed": (own[block], twin[0][block])
            for block in blocks
        }
    else:
        notes.append("another seed, the ceiling, was not given (--beside)")
    if subject.encoder is None:
        notes.append("an encoder: there is no classifier, and --features names no network")
    else:
        encoded = subject.encode(to_uint8(subject.decode(x0)))
        for block in blocks:
            pairs[f"block {block} with {subject.encoder.name}"] = (own[block], encoded)
    measured = {name: likeness(*pair) for name, pair in pairs.items()}
    progress("similarity", len(wanted) + 1, len(wanted) + 1)

    def of_blocks(features: Mapping[Tap, Tensor]) -> dict[Tap, Tensor]:
        return {block: features[block] for block in blocks}

    itself = between(of_blocks(own), of_blocks(own))
    nearest = between(of_blocks(own), of_blocks(own), _cknna)
    crossed = between(of_blocks(student), of_blocks(teacher))
    names = [str(block) for block in blocks]
    charts = [
        Chart(
            "Between the model’s blocks",
            heat_map(itself, names, names, "block", "block", "Linear CKA between blocks"),
            f"Linear CKA at t = {TIMESTEP:g}.",
        ),
        Chart(
            "The same among nearest neighbours",
            heat_map(nearest, names, names, "block", "block", "CKNNA between blocks"),
            f"CKNNA over {NEIGHBOURS} neighbours at t = {TIMESTEP:g}.",
        ),
        Chart(
            "Student and teacher",
            heat_map(crossed, names, names, "student", "teacher", "Linear CKA, student, teacher"),
            f"Linear CKA of the student’s blocks at t = {TIMESTEP:g} with the EMA teacher’s at "
            f"{TEACHER_TIMESTEP:g}.",
        ),
    ]
    name, told = next(iter(measured.items()))
    rows = [
        (name, (p.cka, p.permuted_cka, p.cknna, p.permuted_cknna)) for name, p in measured.items()
    ]
    columns = ("features", "CKA", "permuted", "CKNNA", "permuted")
    return Section(
        ABOUT,
        [
            f"{name[0].upper()}{name[1:]}: CKA {plus_minus(told.cka)}, CKNNA {plus_minus(told.cknna)}."
        ],
        charts,
        [Table("Similarity beside its controls", columns, rows)],
        notes,
        {
            "images": len(x0),
            "blocks": blocks,
            "between_blocks": itself,
            "between_blocks_cknna": nearest,
            "student_teacher": crossed,
            "pairs": measured,
        },
    )


def _images(subject: "Subject") -> Float[Tensor, "M C *sides"]:
    """Held-out images, and training images for what is short: it is no matter of generalisation."""
    x0, _ = read_images(subject.source.heldout, IMAGES, "similarity")
    if len(x0) == IMAGES:
        return x0
    more, _ = read_images(subject.source.train, IMAGES - len(x0), "similarity training")
    return torch.cat([x0, more])
