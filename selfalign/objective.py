"""L = L_gen + lambda·L_align (Eq. 4)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfalign.alignment import DISTANCES, teacher_features
from selfalign.config import RunConfig
from selfalign.models.sit import SiT
from selfalign.views import Draw, TokenGroups, make_views


@dataclass(frozen=True)
class Predictions:
    """What student and teacher say about one batch, in group order."""

    velocity: Float[Tensor, "B N P"]
    """The student's velocity tokens."""
    target: Float[Tensor, "B N P"]
    """The velocity of the path (Eq. 2)."""
    student_features: Float[Tensor, "B N D"] | None
    """g(h^m), after the projection head; None without alignment."""
    teacher_features: Float[Tensor, "B N D"] | None
    """sg[h_EMA^n]; None without alignment."""
    groups: TokenGroups
    """The order of the tokens above; `groups.restore` brings them back into image order."""


@dataclass(frozen=True)
class Losses:
    """The terms of Eq. 4."""

    total: Float[Tensor, ""]
    """L_gen + lambda·L_align."""
    denoising: Float[Tensor, "B"]
    """L_gen per sample: the mean over tokens and channels of the squared velocity error (Eq. 2)."""
    alignment: Float[Tensor, ""]
    """L_align (Eq. 3); zero without alignment."""


@dataclass(frozen=True)
class Objective:
    """The training objective of one point of the factorial space.

    Pure: given the draw, the same inputs give the same losses.

    Args:
        config: a resolved tree.
    """

    config: RunConfig

    def __call__(
        self,
        student: Callable[..., Any],
        teacher: SiT | None,
        x0: Float[Tensor, "B C H W"],
        labels: Int[Tensor, "B"],
        draw: Draw,
    ) -> Losses:
        """Losses of one batch.

        Args:
            student: the model being trained (an SiT, or a wrapper of one that calls its forward).
            teacher: the EMA model; may be None where the recipe has no alignment.
            x0: clean samples.
            labels: one class per sample.
            draw: the step's randomness, from `draw_views`.
        """
        return self.losses(self.predict(student, teacher, x0, labels, draw))

    def predict(
        self,
        student: Callable[..., Any],
        teacher: SiT | None,
        x0: Float[Tensor, "B C H W"],
        labels: Int[Tensor, "B"],
        draw: Draw,
    ) -> Predictions:
        """Run student and teacher on their views of the batch. Arguments as for the call."""
        alignment, null_label = self.config.alignment, self.config.model.num_classes
        assert null_label is not None, "the config is not resolved"
        views = make_views(self.config, x0, draw)
        seen = torch.where(draw.label_dropout, null_label, labels)

        velocity, student_features = student(
            views.student.tokens,
            views.student.timesteps,
            seen,
            views.student.groups,
            alignment.student_block if views.teacher else None,
        )
        features = None
        if views.teacher:
            assert teacher is not None and alignment.teacher_block is not None
            teacher_labels = seen if alignment.teacher_labels == "dropped" else labels
            features = teacher_features(
                teacher, views.teacher, teacher_labels, alignment.teacher_block
            )
        return Predictions(velocity, views.target, student_features, features, views.student.groups)

    def losses(self, predictions: Predictions) -> Losses:
        """Compare the predictions with their targets (Eq. 2 to 4)."""
        alignment = self.config.alignment
        denoising = (predictions.velocity - predictions.target).square().mean(dim=(1, 2))
        align = denoising.new_zeros(())
        student, teacher = predictions.student_features, predictions.teacher_features
        if student is not None and teacher is not None:
            align = DISTANCES[alignment.distance](student, teacher)
        return Losses(
            total=denoising.mean() + alignment.weight * align,
            denoising=denoising,
            alignment=align,
        )
