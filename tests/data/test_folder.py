"""Folders of images: labels, splits, every colour mode, and what cannot be read."""

import numpy as np
import pytest
import torch
from PIL import Image

from selfalign import UserError
from selfalign.config import DataConfig
from selfalign.data import open_data
from selfalign.data.folder import centre_crop


def picture(size=(20, 16), mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def save(path, image=None, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture(**settings)).save(path)
    return path


def fill(root, classes=("cat", "dog", "emu"), count=10):
    for label, name in enumerate(classes):
        for number in range(count):
            save(root / name / f"{number:03}.png", seed=100 * label + number)


def open_folder(root, **settings):
    return open_data(DataConfig(name="folder", root=str(root), **{"image_size": 8, **settings}))


def files_of(split):
    return [path for path, _ in split.files]


def one_line_error(action):
    with pytest.raises(UserError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message
    return message


class TestLayout:
    def test_subfolders_are_classes_in_alphabetical_order(self, tmp_path):
        fill(tmp_path)
        source = open_folder(tmp_path)
        assert source.class_names == ("cat", "dog", "emu")
        assert (source.channels, source.image_size, source.num_classes) == (3, (8, 8), 3)
        for split in (source.train, source.heldout):
            _, labels = split.read(range(len(split)))
            names = [source.class_names[label] for label in labels]
            assert names == [path.parent.name for path in files_of(split)]

    def test_images_alone_have_no_classes(self, tmp_path):
        for number in range(10):
            save(tmp_path / f"{number}.png", seed=number)
        source = open_folder(tmp_path)
        assert source.num_classes == 0
        assert (len(source.train), len(source.heldout)) == (9, 1)
        assert source.train.read([0, 1])[1].tolist() == [0, 0]

    def test_images_deeper_in_a_class_belong_to_it(self, tmp_path):
        fill(tmp_path, ("cat", "dog"), 3)
        save(tmp_path / "dog" / "brown" / "small" / "x.png")
        source = open_folder(tmp_path)
        assert source.class_names == ("cat", "dog")
        assert len(source.train) + len(source.heldout) == 7

    @pytest.mark.parametrize("suffix", [".png", ".PNG", ".jpg", ".JPEG", ".bmp", ".gif", ".webp"])
    def test_suffixes(self, tmp_path, suffix):
        for number in range(2):
            save(tmp_path / f"{number}{suffix}", seed=number)
        source = open_folder(tmp_path)
        assert source.train.read([0])[0].shape == (1, 3, 8, 8)

    def test_other_files_are_not_images(self, tmp_path):
        fill(tmp_path, ("cat", "dog"), 2)
        (tmp_path / "cat" / "notes.txt").write_text("not an image")
        (tmp_path / "README").write_text("not a class")
        source = open_folder(tmp_path)
        assert len(source.train) + len(source.heldout) == 4

    def test_hidden_folders_are_not_classes(self, tmp_path):
        fill(tmp_path, ("cat", "dog"), 2)
        (tmp_path / ".cache").mkdir()
        save(tmp_path / "cat" / ".thumbnails" / "x.png")
        source = open_folder(tmp_path)
        assert source.class_names == ("cat", "dog")
        assert len(source.train) + len(source.heldout) == 4


class TestSplits:
    def test_are_disjoint_and_complete(self, tmp_path):
        fill(tmp_path)
        source = open_folder(tmp_path)
        train, heldout = files_of(source.train), files_of(source.heldout)
        assert len(heldout) == 3
        assert not set(train) & set(heldout)
        assert set(train) | set(heldout) == set(tmp_path.rglob("*.png"))

    def test_follow_the_relative_paths_only(self, tmp_path):
        for root in ("here", "there/else"):
            fill(tmp_path / root)
        a, b = open_folder(tmp_path / "here"), open_folder(tmp_path / "there/else")
        assert a.fingerprint == b.fingerprint
        for split_a, split_b in ((a.train, b.train), (a.heldout, b.heldout)):
            relative = [path.relative_to(tmp_path / "here") for path in files_of(split_a)]
            assert relative == [p.relative_to(tmp_path / "there/else") for p in files_of(split_b)]

    def test_a_new_image_moves_few_others(self, tmp_path):
        fill(tmp_path)
        before = set(files_of(open_folder(tmp_path).heldout))
        save(tmp_path / "cat" / "new.png")
        source = open_folder(tmp_path)
        assert len(before - set(files_of(source.heldout))) <= 1

    def test_fingerprint_changes_with_the_size_of_the_images(self, tmp_path):
        fill(tmp_path)
        small, large = (open_folder(tmp_path, image_size=size).fingerprint for size in (8, 16))
        assert small != large == open_folder(tmp_path, image_size=16).fingerprint

    def test_fingerprint_changes_with_the_files(self, tmp_path):
        fill(tmp_path)
        before = open_folder(tmp_path).fingerprint
        save(tmp_path / "cat" / "new.png")
        added = open_folder(tmp_path).fingerprint
        (tmp_path / "cat" / "new.png").rename(tmp_path / "cat" / "newer.png")
        assert len({before, added, open_folder(tmp_path).fingerprint}) == 3

    def test_two_images_are_enough(self, tmp_path):
        for number in range(2):
            save(tmp_path / f"{number}.png")
        source = open_folder(tmp_path)
        assert (len(source.train), len(source.heldout)) == (1, 1)


class TestPixels:
    def read(self, tmp_path, image, suffix=".png", size=8):
        for number in range(2):
            image.save(tmp_path / f"{number}{suffix}")
        images, _ = open_folder(tmp_path, image_size=size).train.read([0])
        assert images.shape == (1, 3, size, size)
        assert images.dtype == torch.float32
        assert images.min() >= -1 and images.max() <= 1
        return images[0]

    def test_an_image_of_the_right_size_is_read_exactly(self, tmp_path):
        image = picture((8, 8))
        found = self.read(tmp_path, image)
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
        assert torch.allclose(found, expected)

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
    def test_white_stays_white_and_black_black_in_every_mode(self, tmp_path, mode):
        for value, expected in ((0, -1.0), (255, 1.0)):
            folder = tmp_path / str(value)
            folder.mkdir()
            if mode == "I;16":
                image = Image.fromarray(np.full((8, 8), value * 257, dtype=np.uint16))
            else:
                image = Image.new("RGB", (8, 8), (value,) * 3).convert(mode)
            found = self.read(folder, image)
            assert torch.allclose(found, torch.full_like(found, expected))

    @pytest.mark.parametrize("mode", ["L", "I;16"])
    def test_grey_images_are_grey_in_three_channels(self, tmp_path, mode):
        levels = np.arange(0, 256, 4, dtype=np.uint16).reshape(8, 8)
        pixels = levels * 257 if mode == "I;16" else levels.astype(np.uint8)
        found = self.read(tmp_path, Image.fromarray(pixels))
        expected = torch.from_numpy(levels.astype(np.float32)) / 127.5 - 1
        assert torch.allclose(found, expected.expand(3, -1, -1), atol=1 / 127)

    def test_cmyk(self, tmp_path):
        red = Image.new("RGB", (8, 8), (255, 0, 0)).convert("CMYK")
        found = self.read(tmp_path, red, ".jpg")
        assert (found[0] > 0.9).all() and (found[1:] < -0.9).all()

    def test_palette(self, tmp_path):
        image = Image.new("P", (8, 8), 1)
        image.putpalette([0, 0, 0, 0, 255, 0])
        found = self.read(tmp_path, image, ".gif")
        assert (found[1] == 1).all() and (found[[0, 2]] == -1).all()

    @pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 2), (7, 8), (8, 7), (9, 100), (64, 8)])
    def test_images_of_any_size_and_shape(self, tmp_path, size):
        self.read(tmp_path, picture(size))

    def test_the_middle_square_is_kept(self):
        # left, middle and right third in three colours: the crop shows the middle one
        image = Image.new("RGB", (48, 16))
        for third, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
            image.paste(colour, (16 * third, 0, 16 * third + 16, 16))
        pixels = np.array(centre_crop(image, 16))
        assert (pixels == (0, 255, 0)).all()
        upright = np.array(centre_crop(image.transpose(Image.Transpose.ROTATE_90), 16))
        assert (upright == (0, 255, 0)).all()

    def test_shrinking_averages_instead_of_skipping(self):
        checkerboard = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
        pixels = np.array(centre_crop(Image.fromarray(checkerboard), 8)).astype(int)
        assert abs(pixels - 127).max() <= 2


class TestFlips:
    def test_depend_on_the_seed_and_nothing_else(self, tmp_path):
        fill(tmp_path)
        split = open_folder(tmp_path, flip=True).train
        plain, _ = split.read(range(6))
        seeds = [11, 4, 7, 8, 0, 3]
        images, _ = split.read(range(6), seeds)
        again, _ = split.read(range(6), seeds)
        assert torch.equal(images, again)
        mirrored = [
            not torch.equal(image, original) for image, original in zip(images, plain, strict=True)
        ]
        assert 0 < sum(mirrored) < 6
        for image, original, is_mirrored in zip(images, plain, mirrored, strict=True):
            assert torch.equal(image.flip(-1) if is_mirrored else image, original)
        # the same image with the same seed, alone and in another place
        alone, _ = split.read([3], [8])
        assert torch.equal(alone[0], images[3])

    def test_half_of_the_images_are_mirrored(self):
        from selfalign.randomness import derive_seed

        split = open_data(DataConfig(flip=True)).train
        seeds = [derive_seed(0, "augment", position) for position in range(1397)]
        plain, _ = split.read(range(1397))
        flipped, _ = split.read(range(1397), seeds)
        share = (plain != flipped).flatten(1).any(dim=1).float().mean()
        assert abs(share - 0.5) < 4 * 0.5 / 1397**0.5

    def test_are_off_unless_asked_for_and_never_in_the_heldout_split(self, tmp_path):
        fill(tmp_path)
        off, on = open_folder(tmp_path), open_folder(tmp_path, flip=True)
        for split in (off.train, off.heldout, on.heldout):
            plain, _ = split.read([0, 1])
            for seeds in ([0, 1], [1, 0]):
                assert torch.equal(split.read([0, 1], seeds)[0], plain)


class TestRefusals:
    def test_a_missing_folder_is_named(self, tmp_path):
        message = one_line_error(lambda: open_folder(tmp_path / "nowhere"))
        assert str(tmp_path / "nowhere") in message

    def test_a_file_instead_of_a_folder_is_named(self, tmp_path):
        path = save(tmp_path / "image.png")
        assert str(path) in one_line_error(lambda: open_folder(path))

    @pytest.mark.parametrize("count", [0, 1])
    def test_too_few_images(self, tmp_path, count):
        for number in range(count):
            save(tmp_path / f"{number}.png")
        message = one_line_error(lambda: open_folder(tmp_path))
        assert str(tmp_path) in message and f"{count} image" in message

    def test_an_empty_class_is_named(self, tmp_path):
        fill(tmp_path)
        (tmp_path / "dodo").mkdir()
        (tmp_path / "dodo" / "notes.txt").write_text("extinct")
        assert str(tmp_path / "dodo") in one_line_error(lambda: open_folder(tmp_path))

    @pytest.mark.parametrize(
        "content", [b"", b"<html>404</html>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a"]
    )
    def test_files_that_are_no_images_are_named(self, tmp_path, content):
        fill(tmp_path, ("cat",), 4)
        for path in (tmp_path / "cat").iterdir():
            path.write_bytes(content)
        split = open_folder(tmp_path).train
        assert str(files_of(split)[1]) in one_line_error(lambda: split.read([1]))

    @pytest.mark.filterwarnings("ignore::UserWarning:PIL")
    @pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".bmp", ".webp", ".tif", ".ppm"])
    def test_images_cut_anywhere_or_with_damaged_bytes_are_read_or_named(self, tmp_path, suffix):
        for number in range(2):
            save(tmp_path / f"{number}{suffix}", seed=number)
        split = open_folder(tmp_path).train
        path = files_of(split)[0]
        content = path.read_bytes()
        generator = np.random.default_rng(0)
        damaged = [content[:end] for end in range(0, len(content), max(1, len(content) // 25))]
        for _ in range(25):
            changed = bytearray(content)
            for position in generator.integers(0, min(len(content), 120), 3):
                changed[position] = generator.integers(0, 256)
            damaged.append(bytes(changed))
        messages = []
        for changed in damaged:
            path.write_bytes(changed)
            try:
                images, _ = split.read([0])
                assert images.isfinite().all()
            except UserError as error:
                messages.append(str(error))
        assert len(messages) >= 5
        assert all(str(path) in message and "\n" not in message for message in messages)

    def test_an_image_that_vanished_is_named(self, tmp_path):
        fill(tmp_path)
        split = open_folder(tmp_path).train
        files_of(split)[0].unlink()
        assert str(files_of(split)[0]) in one_line_error(lambda: split.read([0]))

    def test_a_decompression_bomb_is_named(self, tmp_path, monkeypatch):
        fill(tmp_path)
        split = open_folder(tmp_path).train
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
        assert str(files_of(split)[0]) in one_line_error(lambda: split.read([0]))
