"""Contrastive flow matching: away from the velocity of another sample (DeltaFM, 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from selfalign.parts import register
from selfalign.terms import Term, over_values

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Generator, Tensor

    from selfalign.config import RunConfig
    from selfalign.objective import Pass

NEGATIVES = "contrastive.negatives"
"""Where a draw holds which sample each one is pushed away from."""


@register("contrastive")
@dataclass(frozen=True)
class Contrastive(Term):
    """Minus the squared error against the velocity target of another sample of the batch."""

    weight: float = 0.05
    """Weight lambda; DeltaFM's is 0.05."""

    def check_in(self, config: Any) -> None:
        """There must be another sample, compared place by place."""
        config.views.require_all_tokens(self)
        self.require_pairs(config)

    def draw(
        self, config: RunConfig, shape: tuple[int, ...], generator: Generator
    ) -> Mapping[str, Int[Tensor, B]]:
        """For every sample, another one, each as likely."""
        import torch

        batch, device = shape[0], generator.device
        others = torch.randint(max(1, batch - 1), (batch,), generator=generator, device=device)
        return {NEGATIVES: (torch.arange(batch, device=device) + 1 + others) % batch}

    def __call__(self, forward: Pass) -> Float[Tensor, B]:
        """Place by place in image order: another sample's tokens have another order.

        Of samples of unequal lengths over the places that both have.
        """
        groups, negatives = forward.views.groups, forward.draw.more[NEGATIVES]

        def theirs(tokens: Tensor) -> Tensor:
            return groups.sort(groups.restore(tokens)[negatives])

        targets, there = theirs(forward.views.target), forward.views.there
        if there is not None:
            there = there & (theirs(there.to(targets)) > 0)
        return -over_values(groups, (), there, forward.output.velocity, targets)
