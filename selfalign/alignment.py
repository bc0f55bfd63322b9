"""Distances between the student's and the teacher's features (Eq. 3), and the teacher's pass."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from selfalign.models.sit import SiT
from selfalign.views import View

Distance = Callable[[Tensor, Tensor], Tensor]

DISTANCES: dict[str, Distance] = {
    "cosine": lambda a, b: 1 - functional.cosine_similarity(a, b, dim=2).mean(),
    "cosine-over-tokens": lambda a, b: 1 - functional.cosine_similarity(a, b, dim=1).mean(),
    "smooth-l1": lambda a, b: functional.smooth_l1_loss(a, b, beta=0.05),
    "l1": functional.l1_loss,
    "l2": functional.mse_loss,
}
"""Features (B, N, D) of student and teacher to a scalar.

`cosine` is Eq. 3: over D, then the mean over tokens. `cosine-over-tokens` runs over the N tokens of
each channel, which is what the released SRA, DTS and AS code computes.
"""


@torch.no_grad()
def teacher_features(
    teacher: SiT, view: View, labels: Int[Tensor, "B"], block: int
) -> Float[Tensor, "B N D"]:
    """sg[h_EMA^n] of Eq. 3: the raw output of block n, without gradient and without later blocks."""
    return teacher.features(view.tokens, view.timesteps, labels, view.groups, block)
