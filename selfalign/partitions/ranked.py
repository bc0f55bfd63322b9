"""What partitions by a number per token share: groups are slices of the tokens' ranking."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from selfalign.partitions import Partition

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from selfalign.partitions import Ungrouped

TIES = 1e-6
"""Noise that decides between equal tokens, so that a constant score gives a random partition."""


@dataclass(frozen=True)
class Ranked(Partition):
    """The first group takes the tokens that rank first, the next one those after them."""

    first: Literal["high", "low", "either"] = "either"
    """Which tokens the first group gets: high scores, low ones, or either, drawn per sample."""
    temperature: float = 0.5
    """Noise added to the scores, relative to their deviation within a sample; 0 ranks strictly."""

    def check(self) -> None:
        """Limits of the numbers."""
        self.require_number("temperature", 0, 1e6, "a number from 0")

    @abstractmethod
    def scores(self, batch: Ungrouped) -> Float[Tensor, "B N"] | None:
        """A number per token, in image order; None where it cannot be known: the order is random then."""

    def order(self, batch: Ungrouped) -> Int[Tensor, "B N"]:
        """Tokens by score plus Gumbel noise: a Plackett-Luce draw, strict at temperature 0."""
        import torch

        scores = self.scores(batch)
        # Drawn in any case, so that what is drawn after it does not depend on the scores.
        uniform = batch.uniform(batch.grid.num_tokens)
        coin = batch.uniform(1) < 0.5
        if scores is None:
            return uniform.argsort(dim=1)
        scores = scores.float()
        spread = scores.std(dim=1, keepdim=True, correction=0)
        scores = (scores - scores.mean(dim=1, keepdim=True)) / spread.clamp(min=1e-12)
        if self.first == "either":
            scores = torch.where(coin, scores, -scores)
        elif self.first == "low":
            scores = -scores
        gumbel = -(-uniform.clamp(1e-7, 1 - 1e-7).log()).log()
        return (scores + (self.temperature + TIES) * gumbel).argsort(dim=1, descending=True)
