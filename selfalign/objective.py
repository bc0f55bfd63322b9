"""L = Σ weight(step)·term, of which L_gen + lambda·L_align is one case (Eq. 4)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from selfalign.config import ResolvedConfig
from selfalign.network import Backbone, Output
from selfalign.targets import BuiltTarget
from selfalign.terms import Term
from selfalign.views import Draw, Views, make_views


@dataclass(frozen=True)
class Pass:
    """What terms and targets see of a step."""

    config: ResolvedConfig
    x0: Float[Tensor, "B C *sides"]
    condition: Any
    """Of every sample: its label, for one."""
    seen: Any
    """The same with some dropped: what the student sees."""
    draw: Draw
    views: Views
    output: Output
    """The student's."""
    teacher: Backbone | None
    """The EMA model."""
    targets: Mapping[str, Float[Tensor, "B N Z"]] = field(default_factory=dict)
    """The targets' features by name, in group order."""
    stored: Mapping[str, Float[Tensor, "B h w Z"]] = field(default_factory=dict)
    """Features of the clean samples that came with the batch, by encoder, over the encoder's own grid."""


@dataclass(frozen=True)
class Losses:
    """The terms of Eq. 4."""

    total: Float[Tensor, ""]
    """Σ weight·term."""
    terms: dict[str, Float[Tensor, ""] | Float[Tensor, "B"]]
    """Each term by name, unweighted; some per sample, as the denoising loss."""

    def means(self) -> dict[str, Float[Tensor, ""]]:
        """Each term's mean over the batch."""
        return {name: value.mean() for name, value in self.terms.items()}


class Objective:
    """The training objective of one point of the space.

    Pure: given the draw, the same inputs give the same losses.

    Args:
        config: a resolved tree.
        compile: compile predictions and losses with torch.compile.
    """

    def __init__(self, config: ResolvedConfig, compile: bool = False) -> None:
        self.config = config
        self.terms = config.used_terms()
        self.targets: dict[str, BuiltTarget] = {
            name: part.build(config) for name, part in config.used_targets().items()
        }
        # Asked for once: the compiler cannot follow settings that are made on the way.
        self._heads = {name: term.head_names(config) for name, term in self.terms.items()}
        self._weighted = torch.compile(self._sum, dynamic=False) if compile else self._sum

    def __call__(
        self,
        student: Callable[..., Output],
        teacher: Backbone | None,
        x0: Float[Tensor, "B C *sides"],
        condition: Any,
        draw: Draw,
        step: int = 0,
        stored: Mapping[str, Tensor] | None = None,
    ) -> Losses:
        """Losses of one batch.

        Args:
            student: the model being trained (a `Backbone`, or a wrapper that calls its forward).
            teacher: the EMA model; may be None where no target needs it.
            x0: clean samples.
            condition: one per sample: class labels, for one.
            draw: the step's randomness, from `draw_views`.
            step: optimizer step, counted from 0, which weights may depend on.
            stored: features that came with the batch, as `Pass.stored`.
        """
        weights = self.weights(step, x0)
        return self._weighted(student, teacher, x0, condition, draw, weights, stored or {})

    def weights(self, step: int, like: Tensor) -> dict[str, float | Tensor]:
        """The weight of each term that is computed at a step.

        Weights that change are tensors on the device of `like`: the compiler would make a graph for every
        number.
        """
        return {
            name: term.weight
            if term.decay == "constant"
            else torch.full((), term.weight_at(step), device=like.device)
            for name, term in self.terms.items()
            if not term.stopped(step)
        }

    def _sum(
        self,
        student: Callable[..., Output],
        teacher: Backbone | None,
        x0: Tensor,
        condition: Any,
        draw: Draw,
        weights: dict[str, float | Tensor],
        stored: Mapping[str, Tensor],
    ) -> Losses:
        """Σ weight·term."""
        forward = self.predict(student, teacher, x0, condition, draw, weights, stored)
        return self.losses(forward, weights)

    def predict(
        self,
        student: Callable[..., Output],
        teacher: Backbone | None,
        x0: Float[Tensor, "B C *sides"],
        condition: Any,
        draw: Draw,
        active: Mapping[str, Any] | None = None,
        stored: Mapping[str, Tensor] | None = None,
    ) -> Pass:
        """Run the student on its view of the batch, and what the targets need.

        Arguments as for the call; `active` holds the names of the terms that are computed, None all.
        """
        config = self.config
        views = make_views(config, x0, draw)
        seen = config.condition.drop(condition, draw.label_dropout, config.model.num_classes)
        terms = {
            name: term for name, term in self.terms.items() if active is None or name in active
        }
        targets = dict.fromkeys(name for term in terms.values() for name in term.target_names())
        sources: list[Term | BuiltTarget] = [
            *terms.values(),
            *(self.targets[name] for name in targets),
        ]
        heads = [name for term in terms.values() for name in self._heads[term.name]]
        idle = [
            name
            for term in self.terms.values()
            if term.name not in terms
            for name in self._heads[term.name]
        ]
        output = student(
            views.student.tokens,
            views.student.timesteps,
            seen,
            views.groups,
            tuple(dict.fromkeys(tap for source in sources for tap in source.taps(config))),
            tuple(heads),
            tuple(idle),
        )
        forward = Pass(
            config, x0, condition, seen, draw, views, output, teacher, stored=stored or {}
        )
        features = {name: self.targets[name].features(forward) for name in targets}
        return replace(forward, targets=features)

    def losses(self, forward: Pass, weights: Mapping[str, float | Tensor] | None = None) -> Losses:
        """Compare the predictions with their targets (Eq. 2 to 4).

        Args:
            forward: from `predict`.
            weights: of the terms that are computed; None for those of the first step.
        """
        weights = self.weights(0, forward.x0) if weights is None else weights
        terms = {name: self.terms[name](forward) for name in weights}
        total = sum(
            (weight * terms[name].mean() for name, weight in weights.items()),
            start=forward.x0.new_zeros(()),
        )
        return Losses(total, terms)
