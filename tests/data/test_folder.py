"""Folders of images: labels, splits, every colour mode, what cannot be read, and what changes."""

import errno
import gzip
import shutil
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image

from selfalign import UserError
from selfalign.data import folder
from selfalign.data.contents import Recorded, describe_changes, read_contents, write_contents
from selfalign.data.datasets import open_data
from selfalign.data.images import centre_crop
from selfalign.data.latents.sources import open_source
from selfalign.data.splits import order_by_hash, split_in_order
from selfalign.data.stream import training_batches
from selfalign.sections import DataConfig


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

    @pytest.mark.parametrize("root", ["x" * 5_000, "a\0b", "/dev/null", "/dev/null/x"])
    def test_names_that_no_folder_can_have(self, root):
        one_line_error(lambda: open_folder(root))
        one_line_error(lambda: open_source(root))

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
        split = open_folder(tmp_path).train
        files_of(split)[1].write_bytes(content)
        assert str(files_of(split)[1]) in one_line_error(lambda: split.read([1]))
        assert str(files_of(split)[1]) in one_line_error(lambda: open_folder(tmp_path))

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


class TestRareClasses:
    def test_keep_a_training_image(self, tmp_path):
        for label in range(30):
            fill(tmp_path, (f"c{label:02}",), 40 if label == 0 else 1)
        source = open_folder(tmp_path)
        assert source.summary.untrained == ()
        assert len(source.heldout) == 6
        assert set(source.heldout.labels.tolist()) == {0}

    def test_where_none_is_rare_the_split_is_that_of_version_0_1_0(self):
        names = [f"{label}/{number}.png" for label in "ab" for number in range(50)]
        labels = [0] * 50 + [1] * 50
        order = order_by_hash(names)
        assert split_in_order(order, 0.1, labels) == split_in_order(order, 0.1)

    def test_one_is_held_out_even_where_all_are_rare(self):
        order = order_by_hash(["a/1", "b/1", "c/1"])
        train, heldout = split_in_order(order, 0.1, [0, 1, 2])
        assert len(train) == 2 and len(heldout) == 1

    def test_a_run_of_version_0_1_0_keeps_its_split(self, tmp_path):
        for label in range(30):
            fill(tmp_path, (f"c{label:02}",), 40 if label == 0 else 1)
        now = open_folder(tmp_path)
        former = now.fingerprint.removesuffix("-c")
        config = DataConfig(name="folder", root=str(tmp_path), image_size=8)
        source = open_data(config, Recorded(former))
        assert source.fingerprint == former
        assert source.summary.untrained
        assert any("no training image" in line for line in source.summary.lines())


class TestUnreadable:
    def spoil(self, root):
        fill(root, ("cat", "dog"), 10)
        path = root / "cat" / "003.png"
        path.write_bytes(path.read_bytes()[:60])
        return path

    def test_is_named_when_a_small_folder_is_opened(self, tmp_path):
        path = self.spoil(tmp_path)
        assert f"{path} is not a readable image" in one_line_error(lambda: open_folder(tmp_path))

    def test_another_image_stands_in_and_the_rest_keep_their_places(self, tmp_path):
        fill(tmp_path, ("cat", "dog"), 10)
        whole = open_folder(tmp_path).train
        self.spoil(tmp_path)
        source = open_folder(tmp_path, skip_unreadable=True)
        assert source.left_out["unreadable"] == 1
        for split in (source.train, source.heldout):
            assert split.read(range(len(split)))[0].isfinite().all()
        assert files_of(source.train) == files_of(whole)
        place = files_of(whole).index(tmp_path / "cat" / "003.png")
        others = [index for index in range(len(whole)) if index != place]
        assert torch.equal(source.train.read(others)[0], whole.read(others)[0])
        following = (place + 1) % len(whole)
        image, label = source.train.read([place])
        assert torch.equal(image, whole.read([following])[0])
        assert label.item() == whole.labels[following]

    @pytest.mark.parametrize("workers", [0, 1])
    def test_one_found_late_is_warned_of_from_any_process(self, tmp_path, monkeypatch, workers):
        monkeypatch.setattr(folder, "CHECK_SECONDS", -1)
        path = self.spoil(tmp_path)
        split = open_folder(tmp_path, skip_unreadable=True).train
        with pytest.warns(UserWarning, match="003.png is not a readable image.*stands in for it"):
            batches = list(
                training_batches(split, seed=0, batch_size=6, first=0, last=3, workers=workers)
            )
        assert len(batches) == 3
        split = open_folder(tmp_path).train
        place = files_of(split).index(path)
        assert str(path) in one_line_error(lambda: split.read([place]))

    def test_reading_one_takes_no_list_of_all(self, tmp_path):
        path = save(tmp_path / "0.png")

        class Many(Sequence):
            def __len__(self):
                return 10**12

            def __getitem__(self, index):
                return path, index % 7

        images, labels = folder.FolderSplit(Many(), 8).read([5, 10**12 - 1])
        assert images.shape == (2, 3, 8, 8)
        assert labels.tolist() == [5, (10**12 - 1) % 7]

    def test_a_machine_that_fails_is_no_reason_to_leave_an_image_out(self, tmp_path, monkeypatch):
        fill(tmp_path, ("cat",), 4)
        split = open_folder(tmp_path, skip_unreadable=True).train

        def fail(path, **settings):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(Image, "open", fail)
        assert "cannot be read: [Errno 5]" in one_line_error(lambda: split.read([0]))


class TestChanges:
    def recorded(self, root):
        source = open_folder(root)
        return source, Recorded(source.fingerprint, source.contents)

    def reopen(self, root, recorded):
        return open_data(DataConfig(name="folder", root=str(root), image_size=8), recorded)

    def test_nothing_changed(self, tmp_path):
        fill(tmp_path / "here")
        source, recorded = self.recorded(tmp_path / "here")
        (tmp_path / "here").rename(tmp_path / "there")
        again = self.reopen(tmp_path / "there", recorded)
        assert again.fingerprint == source.fingerprint
        assert describe_changes(source.contents, again.contents) == ""

    def test_repaired_removed_and_new_images(self, tmp_path):
        fill(tmp_path)
        source, recorded = self.recorded(tmp_path)
        paths = files_of(source.train)
        repaired, removed, kept = paths[2], paths[5], paths[7]
        save(repaired, size=(30, 30))
        removed.unlink()
        save(tmp_path / "cat" / "new.png")
        again = self.reopen(tmp_path, recorded)
        assert again.fingerprint != source.fingerprint
        assert files_of(again.train) == paths
        assert files_of(again.heldout) == files_of(source.heldout)
        assert torch.equal(again.train.read([7])[0], source.train.read([7])[0])
        assert torch.equal(again.train.read([5])[0], source.train.read([6])[0])
        assert kept.exists()
        names = [path.relative_to(tmp_path).as_posix() for path in (removed, repaired)]
        said = describe_changes(source.contents, again.contents)
        assert said == f"{names[0]} is gone; {names[1]} is of another size"
        assert again.left_out["new since the run began"] == 1
        assert again.left_out["gone since the run began"] == 1
        # what was accepted is what the next resuming compares with
        third = self.reopen(tmp_path, Recorded(again.fingerprint, again.contents))
        assert third.fingerprint == again.fingerprint
        assert describe_changes(again.contents, third.contents) == ""
        assert "cat/new.png is new" in describe_changes(
            source.contents, open_folder(tmp_path).contents
        )

    def test_a_class_that_is_gone_renumbers_nothing(self, tmp_path):
        fill(tmp_path)
        _, recorded = self.recorded(tmp_path)
        shutil.rmtree(tmp_path / "cat")
        again = self.reopen(tmp_path, recorded)
        assert again.class_names == ("cat", "dog", "emu")
        dogs = [i for i, path in enumerate(files_of(again.train)) if path.parent.name == "dog"]
        assert set(again.train.read(dogs)[1].tolist()) == {1}

    def test_the_record_comes_back(self, tmp_path):
        fill(tmp_path / "images", ("caf\udce9", "a\nb"), 3)
        contents = open_folder(tmp_path / "images").contents
        write_contents(tmp_path / "record", contents)
        assert read_contents(tmp_path / "record") == contents

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"no gzip",
            gzip.compress(b"{"),
            gzip.compress(b"[]"),
            gzip.compress(b'{"class_names": [], "names": ["a"], "labels": [0], "sizes": [1]}'),
            gzip.compress(
                b'{"class_names": [], "names": ["a", "a"], "labels": [0, 0], "sizes": [1, 1]}'
            ),
            gzip.compress(
                b'{"class_names": [], "names": ["a", "b"], "labels": [0, 9], "sizes": [1, 1]}'
            ),
            gzip.compress(
                b'{"class_names": [], "names": ["a", "b"], "labels": [0, -1], "sizes": [1, 1]}'
            ),
            gzip.compress(b"[" * 100_000),
            gzip.compress(bytes(2**28 + 2), 9),
        ],
    )
    def test_a_damaged_record_is_named(self, tmp_path, content):
        (tmp_path / "record").write_bytes(content)
        assert "record cannot be read" in one_line_error(lambda: read_contents(tmp_path / "record"))


def test_transparency_is_composed_onto_the_background(tmp_path):
    for number in range(2):
        save(tmp_path / f"{number}.png", Image.new("RGBA", (8, 8), (10, 20, 30, 0)))
    white = open_folder(tmp_path)
    red = open_folder(tmp_path, background="#ff0000")
    assert (white.train.read([0])[0] == 1).all()
    assert red.train.read([0])[0][0, :, 0, 0].tolist() == [1, -1, -1]
    assert white.fingerprint != red.fingerprint


@pytest.mark.parametrize("colour", ["no colour", "", "#12", "#ff000080", "rgba(0, 0, 0, 0)"])
def test_backgrounds_that_are_none(colour):
    assert "data.background" in one_line_error(lambda: DataConfig(background=colour))


def test_the_summary_says_what_was_found(tmp_path):
    fill(tmp_path, ("cat",), 3)
    fill(tmp_path, ("dog",), 8)
    (tmp_path / "cat" / "notes.txt").write_text("")
    (tmp_path / "cat" / ".hidden.png").write_text("")
    assert open_folder(tmp_path).summary.lines() == [
        "images: 10 to train on, 1 held out, 2 classes of 3 ('cat') to 8 ('dog')",
        "left out: 1 .txt, 1 hidden or of the system",
    ]
