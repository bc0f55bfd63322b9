"""Encoders: frozen networks whose features of the clean image are targets (REPA and its kin).

An encoder is named by one word, in the config as on the command line of `prepare`:

    PART[:MODEL][#MODULE][@SIDE][+class]

as in `repa:dinov2-vit-b`, `timm:resnet18#layer3@128`, `efficientnet-lite0`. MODULE is the module whose output
is taken, SIDE the side to which images are resized before, and `+class` joins the class token to every
token's features, where it is left out otherwise.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from selfalign.errors import UserError
from selfalign.parts import Part, get
from selfalign.settings import require

if TYPE_CHECKING:
    from selfalign.vision import Vision

_WORD = re.compile(
    r"(?P<part>[a-z0-9-]+)(:(?P<model>[\w./-]+))?(#(?P<module>[\w.]+))?(@(?P<side>\d{1,9}))?(?P<class>\+class)?"
)
MAX_SIDE = 2**12
IMAGES = "images"
"""The word that stands for no network: the images themselves."""


@dataclass(frozen=True)
class Encoder(Part):
    """A kind of frozen network."""

    kind: ClassVar[str] = "encoder"

    def width(self, model: str) -> int | None:
        """Features Z of a token, as far as they are known without loading anything."""
        return None

    @abstractmethod
    def load(self, model: str, image_side: int, side: int | None) -> Vision:
        """The network with its weights and what it does to images first.

        Args:
            model: what the word says after the colon; empty if nothing.
            image_side: side of the images that it will be given.
            side: to which they are to be resized; None for what suits the network.

        Raises:
            UserError: there are no such weights; the message says what to put where.
        """


@dataclass(frozen=True)
class EncoderWord:
    """An encoder's word, taken apart."""

    word: str
    part: str
    model: str
    module: str
    """Whose output is taken; empty for the network's own features."""
    side: int | None
    class_token: bool
    """Whether the class token's features are joined to every token's."""

    @property
    def folder(self) -> str:
        """A name for files."""
        return re.sub(r"[^\w.@+-]", "_", self.word)


def parse_word(word: str, setting: str = "encoder") -> EncoderWord:
    """Take an encoder's word apart.

    Raises:
        UserError: it is none, or there is no such encoder; `setting` is where it stands.
    """
    found = _WORD.fullmatch(word)
    require(
        found is not None,
        setting,
        word,
        "allowed is PART[:MODEL][#MODULE][@SIDE][+class], as in repa:dinov2-vit-b, timm:resnet18#layer3@128 "
        "or efficientnet-lite0",
    )
    assert found is not None
    part = get("encoder", found["part"], setting).name
    side = int(found["side"]) if found["side"] else None
    require(side is None or 1 <= side <= MAX_SIDE, setting, word, f"sides go from 1 to {MAX_SIDE}")
    return EncoderWord(
        word, part, found["model"] or "", found["module"] or "", side, bool(found["class"])
    )


def refuse_model(encoder: Encoder, model: str, allowed: str) -> UserError:
    """The error of a model that an encoder does not have."""
    return UserError(f"encoder {encoder.name}:{model}: allowed is {allowed}")


def known_width(parsed: EncoderWord, encoders: Any) -> int | None:
    """Features of a token that an encoder's word promises; None where only loading it tells.

    Args:
        parsed: the word.
        encoders: `RunConfig.encoders`.
    """
    width: int | None = encoders[parsed.part].width(parsed.model)
    if width is None or parsed.module:
        return None
    return 2 * width if parsed.class_token else width
