"""Captions, which every token reads by cross-attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from selfalign.conditions.label import Label
from selfalign.parts import register

if TYPE_CHECKING:
    from torch import nn


@register("text")
@dataclass(frozen=True)
class Text(Label):
    """A caption, by its number among the data's captions; number `num_classes` is the empty one.

    What a caption says reaches every token of every group: as a vector beside the timestep, and by
    cross-attention in every block (PixArt-α, arXiv:2310.00426). Captions are dropped as labels are.
    """

    attends = True

    encoder: str = "bytes"
    """What reads captions: bytes, a small transformer over UTF-8 that is trained along, or transformers:NAME,
    a frozen text encoder by its name or folder, which runs once for each caption."""
    length: int = 32
    """Tokens (or bytes) of a caption that are read."""
    layers: int = 2
    """Layers of the encoder bytes."""

    def check(self) -> None:
        """Limits of the numbers."""
        self.require_number("length", 2, 4096, "a number from 2 to 4096")
        self.require_number("layers", 0, 100, "a number from 0 to 100")
        kind, _, name = self.encoder.partition(":")
        self.require(
            self.encoder == "bytes" or (kind == "transformers" and bool(name)),
            "encoder",
            "allowed are bytes, and transformers:NAME",
        )

    def check_in(self, config: Any) -> None:
        """There must be something to read; how much the data tells when it is opened."""
        self.require(
            config.model.num_classes != 0,
            "encoder",
            "the data has neither captions nor labels to read",
        )

    def embedder(self, num_classes: int, hidden_size: int) -> nn.Module | None:
        """What reads captions, from their numbers to vectors and tokens."""
        from selfalign.texts import BytesEncoder, TransformersEncoder

        if not num_classes:
            return None
        if self.encoder == "bytes":
            return BytesEncoder(num_classes, hidden_size, self.length, self.layers)
        name = self.encoder.partition(":")[2]
        return TransformersEncoder(num_classes, hidden_size, self.length, name)
