"""What a set will hold: from the source, the settings and the autoencoder."""

import math
from typing import TYPE_CHECKING

import numpy as np

from selfalign.data.latents import autoencoder as vae
from selfalign.data.latents.moments import read_moments
from selfalign.data.latents.settings import PrepareConfig
from selfalign.data.latents.sources import Source
from selfalign.data.latents.store import Layout
from selfalign.errors import UserError
from selfalign.names import printable
from selfalign.vision import Vision, encoder_sha256, probe
from selfalign.weights import weights_sha256

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

SHARD_BYTES = 2**30
"""Largest shard."""
SHARDS = 64
"""Into how many shards a set is cut unless they get too large or too small. A kill costs the shards
that were being written, and processes share the work by shards."""
SMALLEST_SHARD = 512
"""Images of the smallest shards that sets are cut into."""
_BY_CONTENT = frozenset(["source", "autoencoder"])
"""Paths may be spelt differently: fingerprint and hash say what they lead to."""


def make_layout(
    name: str, source: Source, config: PrepareConfig, autoencoder: "AutoencoderKL | None"
) -> Layout:
    """The layout of a set.

    Args:
        name: of the source, as it was given.
        source: the images.
        config: the settings.
        autoencoder: the VAE; None for pixels, and for moments where it is not at hand.

    Raises:
        UserError: they do not fit together.
    """
    size = config.image_size
    scale: vae.Numbers = 1.0
    shift: vae.Numbers = 0.0
    sha256 = ""
    shape = (3, size, size)
    if config.vae != "none":
        shape = _moments_shape(config, autoencoder)
        scale = vae.NAMED_SCALE
        if autoencoder is not None:
            scale, shift = vae.scale_and_shift(autoencoder)
            sha256 = weights_sha256(autoencoder.state_dict().items())
    if source.moments:
        if config.vae == "none":
            raise UserError(
                f"source {name!r} holds latents, and vae is none: allowed is the VAE that "
                "encoded them (ema, mse or a folder)"
            )
        if config.flip:
            raise UserError("flip is True, but the source holds latents: allowed is False")
        read_moments(source, 0, shape)
        if config.encoder:
            raise UserError(
                f"encoder is {config.encoder[0]!r}, but the source holds latents: encoders see images"
            )
    dtype = "uint8" if config.vae == "none" else config.dtype
    views = 1 + (config.flip and config.vae != "none")
    images = len(source.names)
    return Layout(
        kind="pixels" if config.vae == "none" else "moments",
        dtype=dtype,
        shape=(views, *shape),
        image_size=size,
        scale=scale,
        shift=shift,
        autoencoder="" if config.vae == "none" else printable(config.vae),
        autoencoder_sha256=sha256,
        class_names=source.class_names,
        source=printable(name),
        fingerprint=source.fingerprint,
        images=images,
        shard_images=_shard_images(images, views * math.prod(shape) * np.dtype(dtype).itemsize),
        background=config.background,
        normalise=config.normalise if config.vae != "none" else "config",
    )


def features_layout(
    word: str, vision: Vision, source: Source, config: PrepareConfig, name: str, fingerprint: str
) -> Layout:
    """The layout of a set of features.

    Args:
        word: of the encoder.
        vision: the encoder.
        source: the images.
        config: the settings; `dtype`, `flip` and those of the images count.
        name: of the source, as it was given.
        fingerprint: of the set of images.
    """
    shape = probe(vision, config.image_size)
    views = 1 + config.flip
    images = len(source.names)
    return Layout(
        kind="features",
        dtype=config.dtype,
        shape=(views, *shape),
        image_size=config.image_size,
        scale=1.0,
        shift=0.0,
        autoencoder="",
        autoencoder_sha256="",
        class_names=(),
        source=printable(name),
        fingerprint=fingerprint,
        images=images,
        shard_images=_shard_images(
            images, views * math.prod(shape) * np.dtype(config.dtype).itemsize
        ),
        background=config.background,
        encoder=word,
        encoder_sha256=encoder_sha256(vision),
    )


def _shard_images(images: int, record_bytes: int) -> int:
    """Images per shard: neither too few nor too many bytes."""
    return max(1, min(SHARD_BYTES // record_bytes, max(SMALLEST_SHARD, -(-images // SHARDS))))


def require_same(begun: Layout, wanted: Layout, where: object) -> None:
    """Refuse to go on with a set that was made in another way.

    Raises:
        UserError: it was; the message names what differs.
    """
    for name in Layout.__struct_fields__:
        before, now = getattr(begun, name), getattr(wanted, name)
        by_content = name in _BY_CONTENT and (name == "source" or wanted.autoencoder_sha256)
        unknown = name == "background" and before is None
        if before != now and not by_content and not unknown:
            raise UserError(
                f"{where} was made with another {name} ({before!r}, now {now!r}): continue "
                "with the same settings and source, or choose another folder"
            )


def _moments_shape(
    config: PrepareConfig, autoencoder: "AutoencoderKL | None"
) -> tuple[int, int, int]:
    if autoencoder is not None:
        channels, height, width = vae.latent_shape(autoencoder, config.image_size)
        return 2 * channels, height, width
    if config.image_size % vae.NAMED_FACTOR:
        raise UserError(
            f"image_size is {config.image_size}: allowed are multiples of {vae.NAMED_FACTOR}"
        )
    side = config.image_size // vae.NAMED_FACTOR
    return 2 * vae.NAMED_CHANNELS, side, side
