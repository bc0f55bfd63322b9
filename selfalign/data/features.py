"""Features that encoders make of a data set's images: stored beside it, kept in the cache, or made live."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from selfalign.data.latents.prepare import write_features
from selfalign.data.latents.reader import StoredFeatures, StoredSplit, open_features
from selfalign.data.latents.settings import PrepareConfig
from selfalign.data.latents.sources import Source
from selfalign.data.latents.store import MANIFEST, features_folder
from selfalign.data.shapes import to_uint8
from selfalign.data.source import DataSource, Features, MemorySplit, Split, SubsetSplit
from selfalign.disk import cache_folder, locked
from selfalign.encoders import IMAGES, parse_word
from selfalign.errors import UserError
from selfalign.sections import DataConfig
from selfalign.vision import encoder_sha256, open_encoder, probe

When = Literal["auto", "once", "every-step"]
"""When features are computed."""


class Encoded:
    """What encoders make of the training images of a run.

    Args:
        source: the opened data set.
        data: its settings.
        setting: where the encoders are chosen, for messages.

    Raises:
        UserError: the data is neither grey nor coloured.
    """

    def __init__(self, source: DataSource, data: DataConfig, setting: str) -> None:
        self.source, self.data, self.setting = source, data, setting
        self.split, self.positions = _whole(source.train)
        pixels = not self._has_latents and not isinstance(self.split, StoredSplit)
        if pixels and source.channels not in (1, 3):  # latents in an array, for one
            raise UserError(
                f"{setting}: encoders see images of 1 or 3 channels, and data.name {data.name} has "
                f"{source.channels}"
            )

    def when(self, words: tuple[str, ...], wanted: When) -> When:
        """When features are computed: once where they are stored or the images are in memory."""
        if wanted != "auto":
            return wanted
        if isinstance(self.split, StoredSplit):
            there = all((self._folder(word) / MANIFEST).exists() for word in words)
            return "once" if there or self._has_latents else "every-step"
        square = len(set(self.source.image_size)) == 1
        return "once" if isinstance(self.split, MemorySplit) and square else "every-step"

    def shape(self, word: str, when: When) -> tuple[int, int, int]:
        """Rows, columns and features of an encoder's tokens, before any image is encoded.

        Raises:
            UserError: there is no such encoder, or its features should be stored and are not there.
        """
        if when == "once" and isinstance(self.split, StoredSplit):
            return self.stored(word).shape
        return probe(open_encoder(word, self.image_side, self.setting), self.image_side)

    def describe(self, word: str, when: When) -> tuple[tuple[int, int, int], str]:
        """Rows, columns and features of an encoder's tokens, and the encoder's hash.

        Raises:
            UserError: there is no such encoder, its features are not there or of other images, or there are
                no images.
        """
        if when == "once":
            features = self.stored(word)
            return features.shape, features.encoder_sha256
        if self._has_latents and not self.images():
            raise UserError(
                f"{self.setting} is {word!r}: data.name {self.data.name} holds latents, and encoders see "
                f"images; {self._how_to_store(word)}, or keep the images: --encoder {IMAGES}"
            )
        vision = open_encoder(word, self.image_side, self.setting)
        return probe(vision, self.image_side), encoder_sha256(vision)

    @property
    def image_side(self) -> int:
        """Side of the images that encoders see."""
        if isinstance(self.split, StoredSplit):
            return self.split.records.layout.image_size
        return max(self.source.image_size)

    def images(self) -> dict[str, Features]:
        """The images that are kept beside latents, by the word of their encoder; nothing otherwise."""
        kept = self._has_latents and isinstance(self.split, StoredSplit)
        if not kept or not (self._folder(IMAGES) / MANIFEST).exists():
            return {}
        return {IMAGES: self.stored(IMAGES)}

    def stored(self, word: str) -> Features:
        """The features of the training images; of images that are no stored set, from the cache.

        Raises:
            UserError: as for `describe`.
        """
        if not isinstance(self.split, StoredSplit):
            return self._cached(word)
        folder = self._folder(word)
        if not (folder / MANIFEST).exists():
            raise UserError(
                f"{self.setting} is {word!r}: {str(self.split.records.root)!r} has no features of it; "
                f"{self._how_to_store(word)}"
            )
        chosen = (
            self.split.positions if self.positions is None else self.split.positions[self.positions]
        )
        images = self.split.records.fingerprint
        return open_features(folder, word, chosen, self.split.flip, images)

    @property
    def _has_latents(self) -> bool:
        """Whether what the model sees are no pixels."""
        if isinstance(self.split, StoredSplit):
            return self.split.records.layout.kind == "moments"
        return bool(self.data.source.decodes)

    def _folder(self, word: str) -> Path:
        assert isinstance(self.split, StoredSplit)
        return features_folder(self.split.records.root, word)

    def _how_to_store(self, word: str) -> str:
        return f"make them with `selfalign prepare SOURCE {self.data.root} … --encoder {word}`"

    def _cached(self, word: str) -> StoredFeatures:
        """Made of the training images at the first call, and kept."""
        height, width = self.source.image_size
        if height != width or self._has_latents:
            raise UserError(
                f"{self.setting} is {word!r}: features are computed once of square images only; allowed is "
                "every-step"
            )
        vision = open_encoder(word, height, self.setting)
        train, flip = self.source.train, bool(getattr(self.split, "flip", False))
        name = "-".join(
            [
                self.source.fingerprint,
                *(["flip"] * flip),
                parse_word(word).folder,
                encoder_sha256(vision)[:16],
            ]
        )
        folder = cache_folder("features") / name
        images = Source(
            names=[str(index) for index in range(len(train))],
            labels=np.zeros(len(train), np.int32),
            class_names=(),
            fingerprint=self.source.fingerprint,
            load=_Images(train),
        )
        config = PrepareConfig(height, "none", flip=flip, encoder=(word,))
        try:
            with locked(folder, None):
                write_features(folder, images, config, word, self.data.name, images.fingerprint)
        except OSError as error:
            raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
        return open_features(folder, word, np.arange(len(train)), flip, images.fingerprint)


@dataclass(frozen=True)
class _Images:
    """A split's images as pictures."""

    split: Split

    def __call__(self, index: int) -> Image.Image:
        image = self.split.read([index])[0][0]
        pixels: Any = to_uint8(image[None])[0].permute(1, 2, 0).numpy()
        return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _whole(split: Split) -> tuple[Split, np.ndarray | None]:
    """The split of which others are parts, and which of its images these have; None for all."""
    chosen = None
    while isinstance(split, SubsetSplit):
        own = split.chosen.numpy()
        chosen = own if chosen is None else own[chosen]
        split = split.split
    return split, chosen
