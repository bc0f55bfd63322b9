"""Sets of images, and the refusal of what is not one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfalign import UserError
from selfalign.arrays import Npz
from selfalign.evaluation.inputs import open_images

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 6, 5, 3), dtype=np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reads_npz(tmp_path: Path, save: object) -> None:
    file = tmp_path / "samples.npz"
    save(file, arr_0=PIXELS, arr_1=np.arange(12))  # type: ignore[operator]
    images = open_images(file)
    assert (len(images), images.shape) == (12, (3, 6, 5))
    assert torch.equal(images.read([3, 0]), torch.from_numpy(PIXELS[[3, 0]]).permute(0, 3, 1, 2))
    assert images.labels is not None and images.labels.tolist() == list(range(12))
    first = images.first(5)
    assert len(first) == 5 and first.labels is not None and len(first.labels) == 5
    assert first.fingerprint != images.fingerprint


def test_arrays_are_mapped_from_the_file(tmp_path: Path) -> None:
    arrays = {"a": PIXELS, "b": np.asfortranarray(np.random.rand(4, 7)), "c": np.array("name")}
    np.savez(tmp_path / "x.npz", **arrays)
    found = Npz(tmp_path / "x.npz")
    assert isinstance(found["a"], np.memmap)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)


def test_floats_from_0_to_1_are_bytes(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", arr_0=PIXELS / 255)
    assert torch.equal(
        open_images(tmp_path / "x.npz").read(range(12)),
        torch.from_numpy(PIXELS).permute(0, 3, 1, 2),
    )


def test_reads_folders(tmp_path: Path) -> None:
    for number, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(tmp_path / f"{number:02d}.png")
    images = open_images(tmp_path)
    assert torch.equal(images.read(range(12)), torch.from_numpy(PIXELS).permute(0, 3, 1, 2))
    Image.fromarray(PIXELS[0, :, :, 0]).save(tmp_path / "00.png")
    grey = open_images(tmp_path)
    assert grey.shape == (3, 6, 5) and grey.fingerprint != images.fingerprint
    assert torch.equal(grey.read([0])[0, 2], torch.from_numpy(PIXELS[0, :, :, 0]))
    Image.fromarray(PIXELS[1, :5]).save(tmp_path / "01.png")
    with pytest.raises(UserError, match=r"01\.png has 5×5 pixels, and 00\.png 6×5"):
        grey.read([0, 1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "holds mu: needed is arr_0"),
        ({"arr_0": PIXELS[0]}, r"has the shape \(6, 5, 3\): allowed is \(M, H, W, C\)"),
        ({"arr_0": PIXELS[..., :2]}, r"shape \(12, 6, 5, 2\): .* 1 or 3 channels"),
        ({"arr_0": PIXELS[:0]}, r"shape \(0, 6, 5, 3\)"),
        ({"arr_0": PIXELS.astype(np.int64)}, "holds int64: allowed are uint8, or floats"),
        ({"arr_0": PIXELS, "arr_1": np.zeros(11, int)}, "one whole number for each of the 12"),
        ({"arr_0": PIXELS / 127.5 - 1}, "holds floats from -1 to 1: allowed are uint8"),
        ({"arr_0": PIXELS * np.nan}, "holds floats from nan to nan"),
    ],
)
def test_refuses_wrong_arrays(tmp_path: Path, arrays: dict[str, object], message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        open_images(tmp_path / "x.npz").read(range(12))


def test_refuses_damaged_files(tmp_path: Path) -> None:
    file = tmp_path / "x.npz"
    np.savez(file, arr_0=PIXELS)
    whole = file.read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:-1], b"PK" + bytes(100)):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.npz is truncated or not a \.npz file"):
            open_images(file)
    np.savez(file, arr_0=np.array([{"code": 1}], dtype=object))
    with pytest.raises(UserError, match="holds pickled objects, which are never loaded"):
        open_images(file)
    with pytest.raises(UserError, match="does not exist"):
        open_images(tmp_path / "absent.npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        open_images(tmp_path / "empty")
    (tmp_path / "empty" / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"a\.png is not a readable image"):
        open_images(tmp_path / "empty")


def test_refuses_folders_with_files_that_are_no_images(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="a.png is not a readable image: .* remove or repair it$"):
        open_images(tmp_path)  # of a set to be compared, none is left out
    (tmp_path / "a.png").unlink()
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"no image")  # after one that has colours, too
    with pytest.raises(UserError, match=r"c\.png is not a readable image"):
        open_images(tmp_path)


def test_refuses_more_images_than_there_are(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", arr_0=PIXELS)
    with pytest.raises(UserError, match=r"--num is 13: x\.npz holds 12 images"):
        open_images(tmp_path / "x.npz").first(13)


def test_refuses_images_of_several_sizes_before_any_is_compared(tmp_path: Path) -> None:
    """By their headers, which cost nothing; one that lies on its side and is turned when read is none."""
    for number, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(tmp_path / f"{number:02}.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(PIXELS[0].transpose(1, 0, 2)).save(tmp_path / "12.png", exif=turned)
    assert open_images(tmp_path).read([12]).shape == (1, 3, 6, 5)
    Image.fromarray(PIXELS[0].transpose(1, 0, 2)).save(tmp_path / "13.png")
    images = open_images(tmp_path)  # may be one that is turned
    with pytest.raises(UserError, match="13.png has 5×6 pixels, and 00.png 6×5: all images of a"):
        images.read(range(14))
    Image.new("RGB", (7, 5)).save(tmp_path / "14.png")
    with pytest.raises(UserError, match="14.png has 5×7 pixels, and 00.png 6×5: all images of a"):
        open_images(tmp_path)
