"""Decoding and cropping: ADM's crop, and images as people really have them."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selfalign.data.folder import centre_crop, open_folder, read_image
from selfalign.errors import UserError


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
    train, heldout, _, _ = open_folder(tmp_path, 8, flip=False)
    assert len(train) == len(heldout) == 1
