"""Decoding and cropping: ADM's crop, and images as people really have them."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selfalign.data.datasets import open_data
from selfalign.data.images import (
    UnreadableImageError,
    centre_crop,
    decode_image,
    open_image,
    read_image,
)
from selfalign.errors import UserError
from selfalign.sections import DataConfig


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(width).integers(0, 256, (height, width, channels), np.uint8)


@pytest.mark.parametrize("shape", [(501, 375), (64, 64), (65, 257), (33, 40), (500, 32)])
def test_crop_is_adms_to_the_pixel(shape: tuple[int, int]):
    """Halve with a box filter, rounding down, while twice too large; bicubic; cut the middle."""
    image = Image.fromarray(noise(*shape))
    expected = image
    while min(expected.size) >= 64:
        half = (expected.width // 2, expected.height // 2)
        expected = expected.resize(half, Image.Resampling.BOX)
    scale = 32 / min(expected.size)
    whole = (round(expected.width * scale), round(expected.height * scale))
    pixels = np.asarray(expected.resize(whole, Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - 32) // 2, (pixels.shape[1] - 32) // 2
    expected_pixels = pixels[top : top + 32, left : left + 32]
    assert np.array_equal(np.asarray(centre_crop(image, 32)), expected_pixels)


def test_sixteen_bits_become_eight(tmp_path: Path):
    grey = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64
    Image.fromarray(grey).save(tmp_path / "x.png")
    assert np.array_equal(read_image(tmp_path / "x.png", 32)[0].numpy(), (grey / 257).round())


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str):
    image = Image.fromarray(noise(40, 30)).convert(mode)
    path = tmp_path / ("x.jpg" if mode in ("CMYK", "YCbCr") else "x.png")
    image.save(path)
    read = read_image(path, 16)
    assert read.shape == (3, 16, 16) and read.float().std() > 1


def test_animation_is_its_first_frame(tmp_path: Path):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "x.gif", 8)[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("size", [(1, 1), (1, 60_000), (60_000, 1)])
def test_tiny_and_endless_images(tmp_path: Path, size: tuple[int, int]):
    Image.new("RGB", size, "lime").save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", 64).unique().tolist() == [0, 255]


def test_huge_image_is_refused_before_it_fills_the_memory(tmp_path: Path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"x\.png is not a readable image.*exceeds limit"):
        read_image(tmp_path / "x.png", 16)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_damaged_files_are_read_or_refused_by_name(tmp_path: Path, kind: str):
    file = io.BytesIO()
    Image.fromarray(noise(40, 30)).save(file, kind)
    whole = file.getvalue()
    random = np.random.default_rng(0)
    path = tmp_path / "damaged \udcff\n.png"
    said: set[str] = set()
    for trial in range(60):
        content = bytearray(whole)
        for place in random.integers(0, len(whole) if trial % 2 else 64, 4):
            content[place] = random.integers(256)
        path.write_bytes(content[: random.integers(1, len(whole) + 1)] if trial % 3 else content)
        try:
            read_image(path, 16)
        except UserError as error:
            said.add(str(error))
    assert all(r"damaged \udcff .png is not a readable image: " in message for message in said)


def test_folder_with_names_that_are_not_utf8(tmp_path: Path):
    for i in range(2):
        Image.fromarray(noise(9, 9)).save(tmp_path / f"\udcff{i}.png")
    source = open_data(DataConfig(name="folder", root=str(tmp_path), image_size=8))
    assert len(source.train) == len(source.heldout) == 1


# The same picture, however it is stored

GREY = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
DEEP = GREY.astype(np.uint16) * 257


def tiff(
    values: np.ndarray | bytes,
    bits: int,
    white_is_zero: bool = False,
    sample_format: int = 1,
    *,
    planes: int = 1,
    compressed: bool = False,
) -> bytes:
    """A TIFF of 8×8, in the byte order of the values: grey, or of several planes, one after the other."""
    big = isinstance(values, np.ndarray) and values.dtype.byteorder == ">"
    order = ">" if big else "<"
    data = values if isinstance(values, bytes) else values.tobytes()
    size = len(data) // planes
    strips = [data[place * size : (place + 1) * size] for place in range(planes)]
    if compressed:
        strips = [zlib.compress(strip) for strip in strips]
    places = np.cumsum([8, *map(len, strips)]).tolist()
    photometric = {1: int(not white_is_zero), 2: 1, 3: 2, 4: 5}[planes]
    entries = [
        *((256, "H", [8]), (257, "H", [8]), (258, "H", [bits] * planes), (259, "H", [1 + 7 * compressed])),
        *((262, "H", [photometric]), (273, "I", places[:-1]), (277, "H", [planes]), (278, "H", [8])),
        *((279, "I", list(map(len, strips))), (284, "H", [2 if planes > 1 else 1])),
        *([(338, "H", [2])] if planes == 2 else []),
        (339, "H", [sample_format] * planes),
    ]  # fmt: skip
    packed, beyond = b"", b""
    after = places[-1] + 2 + 12 * len(entries) + 4
    for tag, kind, numbers in entries:
        held = struct.pack(order + kind * len(numbers), *numbers)
        if len(held) > 4:
            held, beyond = struct.pack(order + "I", after + len(beyond)), beyond + held
        packed += struct.pack(f"{order}HHI", tag, 3 if kind == "H" else 4, len(numbers))
        packed += held.ljust(4, b"\0")
    head = (b"MM" if big else b"II") + struct.pack(f"{order}HI", 42, places[-1])
    directory = struct.pack(f"{order}H", len(entries)) + packed + bytes(4)
    return head + b"".join(strips) + directory + beyond


def png(pixels: np.ndarray, colour: int, transparent: bytes = b"", bits: int = 16) -> bytes:
    """A PNG of 8×8, of 16 bits or of less than 8."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    def packed(row: np.ndarray) -> bytes:
        if bits == 16:
            return row.astype(">u2").tobytes()
        return np.packbits(row[:, None] >> np.arange(bits - 1, -1, -1) & 1).tobytes()

    rows = b"".join(b"\0" + packed(row) for row in pixels)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, bits, colour, 0, 0, 0)),
            chunk(b"tRNS", transparent) if transparent else b"",
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        ]
    )


def saved(kind: str, mode: str, **settings: object) -> bytes:
    """The picture as Pillow writes it."""
    image = Image.fromarray(DEEP) if mode == "I;16" else Image.fromarray(GREY)
    if mode == "P":
        image = image.convert(mode)  # by way of RGB, Pillow would choose other colours
    elif mode not in ("L", "I;16"):
        image = image.convert("RGB").convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def decoded(content: bytes, size: int | None = None, background: str = "white") -> np.ndarray:
    return decode_image(
        lambda: open_image(io.BytesIO(content)), "the image", size, background
    ).numpy()


PLANES, DEEP_PLANES = (np.repeat(pixels[None], 3, axis=0) for pixels in (GREY, DEEP))
DEEP_RGB = np.repeat(DEEP[..., None], 3, axis=2)
SAME = {
    "16 bits, TIFF": tiff(DEEP, 16),
    "16 bits, TIFF, big-endian": tiff(DEEP.astype(">u2"), 16),
    "16 bits, TIFF, white is 0": tiff(65535 - DEEP, 16, white_is_zero=True),
    "8 bits, TIFF, white is 0": tiff(255 - GREY, 8, white_is_zero=True),
    "floats, TIFF": tiff((GREY / 255).astype("<f4"), 32, sample_format=3),
    "floats, TIFF, big-endian": tiff((GREY / 255).astype(">f4"), 32, sample_format=3),
    "floats, TIFF, white is 0": tiff((1 - GREY / 255).astype("<f4"), 32, True, 3),
    "12 bits, TIFF": tiff(
        np.packbits(
            [int(bit) for v in GREY.ravel() for bit in f"{round(int(v) / 255 * 4095):012b}"]
        ).tobytes(),
        12,
    ),
    "planes, TIFF": tiff(PLANES, 8, planes=3),
    "planes, TIFF, compressed": tiff(PLANES, 8, planes=3, compressed=True),
    "planes of 16 bits, TIFF, compressed": tiff(DEEP_PLANES, 16, planes=3, compressed=True),
    "16 bits, PNG": png(DEEP, 0),
    "16 bits, PNG, colour": png(DEEP_RGB, 2),
    "16 bits, PNG, alpha": png(np.stack([DEEP, np.full_like(DEEP, 65535)], -1), 4),
    "16 bits, PNG, a transparent colour of another upper byte": png(
        DEEP_RGB, 2, struct.pack(">HHH", 255, 255, 255)
    ),
    "16 bits, PGM": b"P5\n8 8\n65535\n" + DEEP.astype(">u2").tobytes(),
    "PGM up to 1000": b"P5\n8 8\n1000\n" + (GREY / 255 * 1000).round().astype(">u2").tobytes(),
    "floats, PFM": b"Pf\n8 8\n-1.0\n" + np.flipud(GREY / 255).astype("<f4").tobytes(),
    **{
        f"{kind} {mode}": saved(kind, mode)
        for kind in ("PNG", "TIFF")
        for mode in ("L", "P", "RGB")
    },
    **{f"{kind} {mode}": saved(kind, mode) for kind in ("PNG", "TIFF") for mode in ("LA", "RGBA")},
    **{f"{kind} I;16": saved(kind, "I;16") for kind in ("PNG", "TIFF", "JPEG2000")},
    **{f"{kind} L": saved(kind, "L") for kind in ("BMP", "GIF", "TGA", "PCX", "PPM", "JPEG2000")},
    "TIFF CMYK": saved("TIFF", "CMYK"),
    "WEBP RGBA": saved("WEBP", "RGBA", lossless=True),
    "BMP RGBA": saved("BMP", "RGBA"),
}


@pytest.mark.parametrize("kind", SAME)
def test_the_same_picture_gives_the_same_pixels(kind: str, tmp_path: Path):
    expected = np.broadcast_to(GREY, (3, 8, 8))
    assert np.array_equal(decoded(SAME[kind]), expected)
    (tmp_path / "x").write_bytes(SAME[kind])  # by its content, not by its name
    assert np.array_equal(read_image(tmp_path / "x", None).numpy(), expected)


REFUSED = {
    "8 bits, signed": tiff((GREY.astype(int) - 128).astype("i1"), 8, sample_format=2),
    "16 bits, signed": tiff((DEEP // 2).astype("<i2"), 16, sample_format=2),
    "32 bits": tiff((GREY.astype(np.uint64) * 0x1010101).astype("<u4"), 32),
    "32 bits, signed": tiff(GREY.astype(">i4"), 32, sample_format=2),
    "floats to 255": tiff(GREY.astype("<f4"), 32, sample_format=3),
    "floats below 0": tiff((GREY / 127.5 - 1).astype("<f4"), 32, sample_format=3),
    "NaN": tiff(np.full((8, 8), np.nan, "<f4"), 32, sample_format=3),
    "floats of 64 bits": tiff(GREY / 255, 64, sample_format=3),
    "planes of 16 bits, which Pillow misreads": tiff(DEEP_PLANES, 16, planes=3),
    "planes of 16 bits, CMYK": tiff(np.concatenate([DEEP_PLANES, DEEP[None]]), 16, planes=4),
    "planes of grey and alpha": tiff(PLANES[:2], 8, planes=2, compressed=True),
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_say_how_bright_it_is_is_refused_by_name(kind: str):
    with pytest.raises(UnreadableImageError, match="the image is not a readable image: "):
        decoded(REFUSED[kind])


@pytest.mark.parametrize(
    "content",
    [
        png(DEEP, 0, struct.pack(">H", DEEP[0, 0])),
        png(DEEP_RGB, 2, struct.pack(">HHH", *[DEEP[0, 0]] * 3)),
        saved("PNG", "L", transparency=int(GREY[0, 0])),
        saved("GIF", "L", transparency=int(GREY[0, 0])),
    ],
)
def test_a_transparent_colour_shows_the_background(content: bytes):
    expected = np.where(GREY[0, 0] == GREY, [[[255]], [[0]], [[0]]], GREY)
    assert np.array_equal(decoded(content, background="red"), expected)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("transparent", [0, 1])
def test_few_bits_are_spread_over_a_byte_and_so_is_their_transparent_colour(
    bits: int, transparent: int
):
    few = GREY >> (8 - bits)
    spread = few * (255 // (2**bits - 1))
    assert np.array_equal(decoded(png(few, 0, bits=bits)), np.broadcast_to(spread, (3, 8, 8)))
    found = decoded(png(few, 0, struct.pack(">H", transparent), bits), background="red")
    assert np.array_equal(found, np.where(few == transparent, [[[255]], [[0]], [[0]]], spread))


def test_half_transparent_pixels_are_mixed_before_they_are_resized():
    pixels = np.zeros((16, 16, 4), np.uint8)  # black where it can be seen, and that is a half
    pixels[:, 8:] = (0, 255, 0, 0)
    pixels[:, :8, 3] = 128
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    found = decoded(file.getvalue(), 8, "white")
    assert abs(found[:, :, :3].astype(int) - 127).max() <= 1  # not green
    assert (found[:, :, 5:] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_cameras_orientation_is_applied(kind: str, orientation: int):
    upright = np.zeros((6, 10, 3), np.uint8)
    upright[:3, :5] = 255  # bright in the upper left
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    # 6: the camera stored its picture turned by 90° to the left, so that rows are columns from below
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    settings = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    Image.fromarray(np.ascontiguousarray(turned)).save(file, kind, exif=exif, **settings)
    found = decoded(file.getvalue())
    assert found.shape == (3, 6, 10)
    assert abs(found.transpose(1, 2, 0).astype(int) - upright).max() < 60


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "I;16", "F"])
def test_turned_tiffs_are_the_same_from_files(tmp_path: Path, mode: str, orientation: int):
    """Pillow 13 maps such files, and takes their height for their width."""
    grey = np.random.default_rng(0).integers(0, 256, (6, 10), dtype=np.uint8)
    image = {
        "F": Image.fromarray((grey / 255).astype("<f4")),
        "I;16": Image.fromarray(grey.astype(np.uint16) * 257),
    }.get(mode) or Image.fromarray(grey).convert("RGB").convert(mode)
    image.save(tmp_path / "x.tif", tiffinfo={0x0112: orientation})
    from_memory = decoded((tmp_path / "x.tif").read_bytes())
    assert from_memory.shape[1:] == ((6, 10) if orientation < 5 else (10, 6))
    assert np.array_equal(read_image(tmp_path / "x.tif", None).numpy(), from_memory)


def test_damaged_tags_do_not_make_an_image_unreadable():
    file = io.BytesIO()
    Image.fromarray(noise(9, 9)).save(file, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decoded(file.getvalue(), 8).shape == (3, 8, 8)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_pictures_it_is_the_first(kind: str):
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    file = io.BytesIO()
    settings = {"lossless": True} if kind == "WEBP" else {}
    first.save(file, kind, save_all=True, append_images=[second], **settings)
    assert decoded(file.getvalue())[:, 0, 0].tolist() == [255, 0, 0]


def test_a_bomb_of_pixels_is_refused_before_it_is_unpacked():
    content = bytearray(png(DEEP, 0))
    content[16:24] = struct.pack(">II", 50_000, 50_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    with pytest.raises(UnreadableImageError, match="decompression bomb"):
        decoded(bytes(content))
