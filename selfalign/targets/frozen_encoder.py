"""Frozen encoders on the clean image as target: REPA (arXiv:2410.06940), iREPA and HASTE."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from selfalign.encoders import known_width, parse_word
from selfalign.parts import Part, register
from selfalign.settings import require
from selfalign.targets import BuiltTarget, Target

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from selfalign.config import ResolvedConfig
    from selfalign.data.source import DataSource, Features
    from selfalign.network import Tap
    from selfalign.objective import Pass
    from selfalign.tokens import TokenGrid
    from selfalign.vision import Vision


@register("frozen-encoder")
@dataclass(frozen=True)
class FrozenEncoderTarget(Target):
    """Token features of the clean image, by one network or several; each has a projector of its own."""

    sees_images: ClassVar[bool] = True

    encoders: tuple[str, ...] = ("repa:dinov2-vit-b",)
    """Networks, each as PART[:MODEL][#MODULE][@SIDE][+class]: repa:dinov2-vit-b, timm:NAME,
    efficientnet-lite0, or one of your own file; MODULE is whose output is taken, SIDE to which images are
    resized before, +class joins the class token to every token."""
    when: Literal["auto", "once", "every-step"] = "auto"
    """once: features are computed by `selfalign prepare --encoder` or, of other data, at the first start,
    into the cache; every-step: the encoder runs along; auto: once where they are stored or the images
    are in memory."""
    interpolate: bool = True
    """Whether features over another token grid than the student's are interpolated, or refused."""
    widths: tuple[int, ...] = ()
    """Features of each encoder's tokens; left out: found when the run begins."""
    hashes: tuple[str, ...] = ()
    """Of the encoders; left out: found when the run begins."""
    image_side: int = 0
    """Of the images that encoders see; left out: found when the run begins."""

    def check(self) -> None:
        """No word twice, and one width and hash for each."""
        self.require(len(self.encoders) > 0, "encoders", "allowed are one or more")
        twice = len(set(self.encoders)) < len(self.encoders)
        self.require(not twice, "encoders", "one stands there twice")
        self.require(
            all(width > 0 for width in self.widths), "widths", "allowed are numbers from 1"
        )
        for name in ("widths", "hashes"):
            self.require(
                len(getattr(self, name)) in (0, len(self.encoders)),
                name,
                f"allowed is one for each of the {len(self.encoders)} encoders, or none",
            )

    def check_in(self, config: Any) -> None:
        """The words must name encoders, which see images."""
        for word in self.encoders:
            parse_word(word, self.dotted("encoders"))
        sides = config.model.image_size or (1, 1)
        self.require(
            len(sides) == 2, "encoders", f"encoders see images, and the data has {len(sides)} axes"
        )

    def uses(self, config: Any) -> tuple[Part, ...]:
        """The kinds of encoders."""
        return tuple(config.encoders[parse_word(word).part] for word in self.encoders)

    def part_widths(self, config: ResolvedConfig) -> tuple[int | None, ...]:
        """One part per encoder."""
        if self.widths:
            return self.widths
        known = [known_width(parse_word(word), config.encoders) for word in self.encoders]
        self.require(None not in known, "widths", "must be given, a number per encoder")
        return tuple(known)

    def completed(self, config: ResolvedConfig, source: DataSource) -> FrozenEncoderTarget:
        """With when features are computed, their widths, and hashes that must be those recorded."""
        from selfalign.data.features import Encoded

        setting = self.dotted("encoders")
        encoded = Encoded(source, config.data, setting)
        when = encoded.when(self.encoders, self.when)
        for word in () if self.interpolate else self.encoders:
            rows, columns, _ = encoded.shape(word, when)
            self.require(
                (rows, columns) == config.grid.shape,
                "interpolate",
                f"{word} has {rows}×{columns} tokens and the model "
                f"{'×'.join(map(str, config.grid.shape))}; allowed is True, or another @SIDE",
            )
        found = [encoded.describe(word, when) for word in self.encoders]
        widths, hashes = tuple(shape[2] for shape, _ in found), tuple(sha for _, sha in found)
        self.require(self.widths in ((), widths), "widths", f"the encoders have {widths}")
        for word, before, now in zip(self.encoders, self.hashes, hashes, strict=False):
            same = f"it has the hash {now[:16]}…, and the run was begun with {before[:16]}…"
            require(before == now, setting, word, same)
        side = encoded.image_side
        return dataclasses.replace(self, when=when, widths=widths, hashes=hashes, image_side=side)

    def stored(self, config: ResolvedConfig, source: DataSource) -> Mapping[str, Features]:
        """Of every encoder; where they run along, the images, should the model see latents."""
        from selfalign.data.features import Encoded

        encoded = Encoded(source, config.data, self.dotted("encoders"))
        if self.when == "every-step":
            return encoded.images()
        return {word: encoded.stored(word) for word in self.encoders}

    def stored_shapes(self, config: ResolvedConfig) -> Mapping[str, tuple[int, ...]]:
        """Of every encoder, as if its token grid were the student's."""
        if self.when == "every-step":
            return {}
        widths = self.part_widths(config)
        return {
            word: (*config.grid.shape, width or 1)
            for word, width in zip(self.encoders, widths, strict=True)
        }

    def live(self) -> FrozenEncoderTarget:
        """With encoders that run along."""
        return dataclasses.replace(self, when="every-step")

    def build(self, config: ResolvedConfig) -> BuiltTarget:
        """This, or the encoders that run along."""
        if self.when != "every-step":
            return self
        from selfalign.vision import open_encoder

        side = self.image_side or max(config.model.image_size)
        return RunningEncoders({word: open_encoder(word, side) for word in self.encoders})

    def features(self, forward: Pass) -> Float[Tensor, "B N Z"]:
        """Of all encoders side by side, which have come with the batch."""
        missing = [word for word in self.encoders if word not in forward.stored]
        self.require(
            not missing,
            "encoders",
            "features must come with the batch (`stored`), or run every-step",
        )
        return in_group_order([forward.stored[word] for word in self.encoders], forward)


class RunningEncoders:
    """The target whose encoders run in every step, on the clean images of the batch."""

    def __init__(self, visions: Mapping[str, Vision]) -> None:
        self.visions = dict(visions)

    def taps(self, config: ResolvedConfig) -> tuple[Tap, ...]:
        """None."""
        return ()

    def features(self, forward: Pass) -> Float[Tensor, "B N Z"]:
        """Of all encoders side by side."""
        from selfalign.vision import clean_images

        images = clean_images(forward)
        visions = [vision.to(images.device) for vision in self.visions.values()]
        return in_group_order([vision(images) for vision in visions], forward)


def in_group_order(grids: list[Float[Tensor, "B h w Z"]], forward: Pass) -> Float[Tensor, "B N Z"]:
    """Features over grids of several encoders, side by side over the student's tokens."""
    import torch

    grid, dtype = forward.config.grid, forward.x0.dtype
    features = [over_tokens(each.to(dtype), grid) for each in grids]
    return forward.views.groups.sort(torch.cat(features, dim=2))


def over_tokens(features: Float[Tensor, "B h w Z"], grid: TokenGrid) -> Float[Tensor, "B N Z"]:
    """Features over the student's token grid in image order, interpolated where theirs is another."""
    from torch.nn import functional

    if tuple(features.shape[1:3]) != grid.shape:
        channels = features.permute(0, 3, 1, 2)
        resized = functional.interpolate(channels, grid.shape, mode="bilinear", antialias=True)
        features = resized.permute(0, 2, 3, 1)
    return features.flatten(1, 2)
