"""The one way from an image file to pixels, for training, preparing and evaluating alike.

The same picture gives the same pixels whatever the file's mode, depth and container: grey, palettes and
CMYK become RGB, 16 bits are scaled to 8, transparency is composed onto a background, cameras'
orientation tags are applied. What does not say how bright its numbers are is refused by name.
"""

import errno
import io
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageColor, UnidentifiedImageError
from torch import Tensor

from selfalign.errors import UserError
from selfalign.names import printable

_EXTENSIONS = Image.registered_extensions()  # which also registers all formats
_FOREIGN = frozenset(["BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"])
"""Formats that Pillow names but cannot read itself, and FITS, whose numbers are no brightness."""
FORMATS = tuple(kind for kind in Image.ID if kind not in _FOREIGN)
IMAGE_SUFFIXES = frozenset(
    suffix
    for suffix, kind in _EXTENSIONS.items()
    if kind in Image.OPEN and kind not in ("BUFR", "GRIB", "HDF5", "MPEG")
)
"""How the names of images end, of those too that are refused; no films, no tables of numbers."""
UNREADABLE_SUFFIXES = frozenset(s for s in IMAGE_SUFFIXES if _EXTENSIONS[s] in _FOREIGN)
GREY_MODES = frozenset(["1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N", "F"])
LONGEST_ASPECT = 16
"""Longer strips are cut to this before they are resized: 1×50,000 pixels would become gigabytes."""
_ORIENTATION = 0x0112
_PACKED = re.compile(r"'(?:L|RGB);(2|4|16)")
"""How Pillow says of how many bits the numbers of a PNG are, where these are not 8."""
_BITS, _COMPRESSION, _PHOTOMETRIC, _PLANES, _SAMPLE_FORMAT = 258, 259, 262, 284, 339  # tags of TIFF
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each value of the orientation tag (EXIF 2.3)."""
_MACHINE_ERRORS = frozenset(
    [errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT]
)
"""Of the machine, not of the file: no reason to leave an image out."""


class UnreadableImageError(UserError):
    """A file is no image that can be read; the message names it."""


def open_image(file: Path | str | io.BytesIO) -> Image.Image:
    """An image's header, in one of the formats that are read.

    By its content, whatever its name says: PostScript named .png is not handed to an interpreter.

    Raises:
        ValueError: it is no file, such as a pipe, which would wait for a writer.
    """
    if not isinstance(file, io.BytesIO) and not os.path.isfile(file):  # noqa: PTH113 - at every image
        raise ValueError("it is not a file")
    image = Image.open(file, formats=FORMATS)
    # Pillow would map some files: it reads turned TIFFs by the wrong width then, and the system kills a
    # process whose mapped file shrinks.
    image.filename = ""
    return image


def decode_image(
    open_: Callable[[], Image.Image], name: str, size: int | None, background: str = "white"
) -> UInt8[Tensor, "3 H W"]:
    """An image as RGB, cropped and resized to a square where a size is given.

    Of animations and of files with several pages it is the first.

    Args:
        open_: opens the image; whatever it raises counts as unreadable.
        name: the image in error messages.
        size: side of the square; None keeps the image as it is.
        background: the colour behind what is transparent, as `parse_colour` takes it.

    Raises:
        UnreadableImageError: this is not a readable image.
        UserError: the machine lacks what reading it takes.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of damaged tags and of large images, and raises for what it cannot read.
            warnings.simplefilter("ignore")
            with open_() as image:
                rgb = _as_rgb(image, background)
                pixels = np.array(rgb if size is None else centre_crop(rgb, size))
    except Exception as error:  # the formats' readers raise nearly anything for damaged files
        reason = _reason(error)
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in _MACHINE_ERRORS:
            raise UserError(f"{printable(name)} cannot be read: {reason}") from error
        message = f"{printable(name)} is not a readable image: {reason}"
        raise UnreadableImageError(message) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def read_image(path: Path, size: int | None, background: str = "white") -> UInt8[Tensor, "3 H W"]:
    """An image file; arguments and errors as of `decode_image`."""
    return decode_image(lambda: open_image(path), str(path), size, background)


def read_header(path: Path) -> tuple[bool, tuple[int, int]]:
    """What an image file says in its header: whether it has no colours, and its width and height.

    An image that is to be turned when it is read has its sides the other way round there.

    Raises:
        UnreadableImageError: it has no header of an image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_image(path) as image:
                return image.mode in GREY_MODES, image.size
    except Exception as error:  # as above
        message = f"{printable(str(path))} is not a readable image: {_reason(error)}"
        raise UnreadableImageError(message) from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its text is the file again
        return "its content is of no format that is read"
    return printable(str(error) or type(error).__name__)


def parse_colour(name: str) -> tuple[int, int, int]:
    """Red, green and blue from 0 to 255 of a colour's name, or of #rrggbb.

    Raises:
        ValueError: there is no such colour, or it is transparent itself.
    """
    colour = ImageColor.getrgb(name)
    if len(colour) != 3:
        raise ValueError(f"{name} is transparent")
    return colour


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `size` and cut the middle square (as ADM prepares ImageNet)."""
    if max(image.size) > LONGEST_ASPECT * min(image.size):
        image = _cut_middle(image, *(min(s, LONGEST_ASPECT * min(image.size)) for s in image.size))
    while min(image.size) >= 2 * size:
        width, height = image.size
        # Halves of odd sides are rounded down, as there; Image.reduce would round them up.
        image = image.resize((width // 2, height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    return _cut_middle(image.resize((width, height), Image.Resampling.BICUBIC), size, size)


def _cut_middle(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _as_rgb(image: Image.Image, background: str) -> Image.Image:
    tags: Any = image.tag_v2 if image.format == "TIFF" else {}  # type: ignore[attr-defined]
    if set(tags.get(_SAMPLE_FORMAT, (1,))) - {1, 3}:
        raise ValueError("its numbers are signed, and do not say which is black: allowed is 8 bits")
    if _are_misread_planes(image, tags):
        raise ValueError(
            "its channels lie in planes, which are read of 8 bits, or compressed, only"
        )
    packed = _PACKED.search(str(getattr(image, "tile", None)))
    image.load()
    image = _upright(image)
    transparent = image.info.get("transparency")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _as_grey(image, tags)
    elif packed is not None and image.mode in ("L", "RGB"):
        # Pillow brings pixels to a byte each, and leaves the transparent colour as it was.
        bits = int(packed[1])
        if isinstance(transparent, tuple):
            image.info["transparency"] = tuple(value >> (bits - 8) for value in transparent)
        elif isinstance(transparent, int):
            image.info["transparency"] = transparent * 255 // (2**bits - 1)
    if image.has_transparency_data:
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        behind = Image.new("RGBA", rgba.size, (*parse_colour(background), 255))
        image = Image.alpha_composite(behind, rgba)
    return image.convert("RGB")


def _are_misread_planes(image: Image.Image, tags: Any) -> bool:
    """Whether Pillow takes the numbers of a TIFF for those of another channel or place."""
    in_planes = tags.get(_PLANES) == 2 and len(image.getbands()) > 1
    deep = max(tags.get(_BITS, (8,))) > 8 and tags.get(_COMPRESSION, 1) == 1
    return in_planes and (deep or image.mode in GREY_MODES)


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # noqa: BLE001 - damaged tags raise nearly anything, and say nothing
        return image
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    if method is None:
        return image
    turned = image.transpose(method)
    turned.format = image.format
    return turned


def _as_grey(image: Image.Image, tags: Any) -> Image.Image:
    """Grey of more than 8 bits, whose white the file's format defines."""
    pixels = np.asarray(image)
    white = 65535
    if image.mode == "F":
        white = 1
    elif (image.mode == "I" and image.format not in ("PNG", "PPM")) or image.format not in (
        *("PNG", "PPM", "TIFF", "JPEG2000"),
    ):
        raise ValueError(
            f"its {image.mode} numbers do not say which is white: allowed are 8 bits, 16 bits in "
            "PNG, TIFF, PGM and JPEG 2000, and floats from 0 to 1"
        )
    elif tags.get(_BITS) == (12,):
        white = 4095
    if not (pixels.min() >= 0 and pixels.max() <= white):  # false for NaN
        raise ValueError(
            f"its numbers go from {pixels.min():g} to {pixels.max():g}: allowed are 0 to {white}"
        )
    if tags.get(_PHOTOMETRIC) == 0:  # white is 0, which Pillow minds in 8 bits only
        pixels = white - pixels
    grey = Image.fromarray((pixels * (255 / white)).round().astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        opaque = Image.fromarray((np.asarray(image) != transparent).astype(np.uint8) * 255)
        return Image.merge("LA", (grey, opaque))
    return grey
