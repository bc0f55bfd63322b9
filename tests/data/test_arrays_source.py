"""Signals, images and videos from files of arrays: what is read, what is refused, and whole small runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL
from PIL import Image

from selfalign import UserError, recipe
from selfalign.cli import main
from selfalign.data.datasets import open_data
from selfalign.data.shapes import FRAMES_SHOWN, as_pictures, picture_shape, side_by_side, to_uint8
from selfalign.runs.load import load_run
from selfalign.runs.start import start_run
from selfalign.sections import DataConfig

KINDS = {
    "signals": (40, 2, 16),
    "images": (40, 3, 8, 8),
    "videos": (40, 1, 4, 8, 8),
}


def write(path: Path, kind="signals", dtype=np.float32, **more):
    """A file of random samples with labels; the first channel's mean tells the label."""
    generator = np.random.default_rng(0)
    shape = KINDS[kind]
    labels = np.arange(shape[0]) % 4
    samples = generator.normal(size=shape) + labels.reshape(-1, *[1] * (len(shape) - 1))
    if dtype == np.uint8:
        samples = np.clip(samples * 20 + 100, 0, 255)
    arrays = {"samples": samples.astype(dtype), "labels": labels, **more}
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return arrays


def opened(path, **settings):
    config = DataConfig(name="arrays", root=str(path))
    named = {f"data.sources.arrays.{name}": value for name, value in settings.items()}
    return open_data(
        recipe("sit", {"data.name": "arrays", "data.root": str(path), **named}).data
        if settings
        else config
    )


@pytest.mark.parametrize("kind", KINDS)
def test_splits_are_disjoint_and_hold_all_samples(tmp_path, kind):
    arrays = write(tmp_path / "a.npz", kind, np.uint8)
    source = opened(tmp_path / "a.npz")
    assert (source.channels, *source.image_size) == KINDS[kind][1:]
    assert source.class_names == ("0", "1", "2", "3")
    assert len(source.train) == 36 and len(source.heldout) == 4
    both = [split.read(list(range(len(split)))) for split in (source.train, source.heldout)]
    samples = torch.cat([images for images, _ in both])
    labels = torch.cat([labels for _, labels in both])
    expected = torch.from_numpy(arrays["samples"]).float() / 127.5 - 1
    found = {
        tuple(s.flatten().tolist()): int(label) for s, label in zip(samples, labels, strict=True)
    }
    assert found == {
        tuple(s.flatten().tolist()): int(label)
        for s, label in zip(expected, arrays["labels"], strict=True)
    }
    assert opened(tmp_path / "a.npz").fingerprint == source.fingerprint


def test_floats_are_scaled_by_the_training_samples(tmp_path):
    arrays = write(tmp_path / "a.npz")
    source = opened(tmp_path / "a.npz")
    train, _ = source.train.read(range(36))
    flat = train.movedim(1, 0).flatten(1)
    assert torch.allclose(flat.amin(dim=1), torch.tensor(-1.0), atol=1e-5)
    assert torch.allclose(flat.amax(dim=1), torch.tensor(1.0), atol=1e-5)
    small = arrays["samples"] / np.abs(arrays["samples"]).max()
    np.savez(tmp_path / "b.npz", samples=small)
    untouched, _ = opened(tmp_path / "b.npz").train.read(range(36))
    every = {tuple(row.flatten().tolist()) for row in torch.from_numpy(small)}
    assert all(tuple(row.flatten().tolist()) in every for row in untouched)


def test_a_npy_has_no_labels_and_an_h5_has_what_it_holds(tmp_path):
    h5py = pytest.importorskip("h5py")
    arrays = write(tmp_path / "a.npz")
    np.save(tmp_path / "a.npy", arrays["samples"])
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["samples"], file["captions"] = arrays["samples"], [f"text {k % 3}" for k in range(40)]
    assert opened(tmp_path / "a.npy").class_names == ()
    assert opened(tmp_path / "a.h5").class_names == ("text 0", "text 1", "text 2")
    first, second = (opened(tmp_path / name).train.read([0, 5])[0] for name in ("a.npy", "a.h5"))
    assert torch.equal(first, second)


def test_other_names_channels_last_and_captions(tmp_path):
    generator = np.random.default_rng(0)
    pictures = generator.integers(0, 255, (20, 8, 6, 3), dtype=np.uint8)
    words = np.array([f"cat {k % 5}" for k in range(20)])
    np.savez(tmp_path / "a.npz", pictures=pictures, words=words)
    source = opened(
        tmp_path / "a.npz", samples="pictures", captions="words", channels_last=True, heldout=0.25
    )
    assert (source.channels, source.image_size) == (3, (8, 6))
    assert source.class_names == tuple(f"cat {k}" for k in range(5))
    assert len(source.heldout) == 5


def test_labels_that_are_named_win_over_captions(tmp_path):
    write(tmp_path / "a.npz", captions=np.array([f"text {k}" for k in range(40)]))
    assert opened(tmp_path / "a.npz").num_classes == 40
    assert opened(tmp_path / "a.npz", labels="labels").class_names == ("0", "1", "2", "3")
    with pytest.raises(UserError, match="labels or captions, not both"):
        opened(tmp_path / "a.npz", labels="labels", captions="captions")


def test_whole_numbers_are_classes_in_their_order(tmp_path):
    write(tmp_path / "a.npz", labels=np.array([-1, 2, 10, 3] * 10))
    assert opened(tmp_path / "a.npz").class_names == ("-1", "2", "3", "10")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": np.arange(39)}, ["labels of", "(39,)", "40 samples"]),
        ({"labels": np.zeros((40, 2))}, ["labels of", "whole numbers"]),
        ({"samples": np.zeros((40, 3))}, ["samples of", "(40, 3)", "(M, C, L)"]),
        ({"samples": np.zeros((1, 1, 8))}, ["two or more"]),
        ({"samples": np.full((40, 1, 8), np.nan)}, ["sample 0", "not finite"]),
        ({"samples": None}, ["holds labels", "data.sources.arrays.samples"]),
        ({"samples": np.full((40, 1, 8), 1j)}, ["complex128"]),
        ({"samples": np.zeros((40, 0, 8))}, ["(40, 0, 8)"]),
        ({"samples": np.full((40, 1, 8), 3e38)}, ["sample 0", "beyond 1e+30"]),
        ({"samples": np.full((40, 1, 8), 1e300)}, ["sample 0", "not finite"]),
    ],
)
def test_refused_arrays(tmp_path, change, words):
    write(tmp_path / "a.npz", **change)
    with pytest.raises(UserError) as error:
        opened(tmp_path / "a.npz")
    assert [word for word in words if word not in str(error.value)] == []
    assert "\n" not in str(error.value)


def test_refused_files_and_settings(tmp_path):
    write(tmp_path / "a.npz")
    for root in (tmp_path / "none.npz", tmp_path / "a.txt", tmp_path):
        with pytest.raises(UserError):
            opened(root)
    (tmp_path / "b.h5").write_bytes(b"no")
    with pytest.raises(UserError, match=r"b\.h5"):
        opened(tmp_path / "b.h5")
    with pytest.raises(UserError, match="samples, labels"):
        opened(tmp_path / "a.npz", samples="others")
    with pytest.raises(UserError, match="leaves none of the 40 samples"):
        opened(tmp_path / "a.npz", heldout=0.999)
    with pytest.raises(UserError, match=r"data\.flip"):
        open_data(DataConfig(name="arrays", root=str(tmp_path / "a.npz"), flip=True))


LABELLED = ["\udcff", "1" * 5000, "²", "$x_$", "-"]


def test_any_word_is_a_label(tmp_path):
    """Also one that is no text, or a number beyond all reading."""
    write(tmp_path / "a.npz", labels=np.array(LABELLED * 8))
    assert set(opened(tmp_path / "a.npz").class_names) == set(LABELLED)


OTHER = [("/etc/passwd", 0, 40 * 2 * 16 * 4)]


def _link():
    import h5py

    return h5py.ExternalLink("/dev/zero", "/x")


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (lambda h5, x: h5.create_dataset("samples", (10**9, 3, 64, 64), "f4", chunks=True), "too many"),
        (lambda h5, x: h5.create_dataset("samples", x.shape, "f4", external=OTHER), "other files"),
        (lambda h5, x: h5.create_group("samples"), "holds nothing"),
        (lambda h5, x: h5.__setitem__("samples", _link()), "holds nothing"),
        (lambda h5, x: h5.create_dataset("samples", dtype="f4"), "it is empty"),
    ],
)  # fmt: skip
def test_hdf5_says_what_is_in_it_and_no_more(tmp_path, held, said):
    """Not gigabytes that are not there, nor what other files hold."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        held(file, np.zeros((40, 2, 16), np.float32))
    with pytest.raises(UserError, match=said):
        opened(tmp_path / "a.h5")


def test_pictures_of_all_kinds():
    assert picture_shape(2, (16,)) == (1, 2, 16)
    assert picture_shape(3, (8, 6)) == (3, 8, 6)
    assert picture_shape(1, (4, 8, 6)) == (1, 32, 6)
    video = torch.rand(2, 1, 4, 8, 6)
    assert torch.equal(as_pictures(video)[:, :, 8:16], video[:, :, 1])


def test_of_a_video_a_few_frames_stand_side_by_side():
    """From the first to the last one; pictures of anything else are shown as they are."""
    video = torch.rand(2, 1, 16, 8, 6) * 2 - 1
    shown = side_by_side(to_uint8(video), (16, 8, 6))
    assert shown.shape == (2, 1, 8, 6 * FRAMES_SHOWN)
    for place, frame in enumerate((0, 5, 10, 15)):
        assert torch.equal(shown[..., place * 6 :][..., :6], to_uint8(video[:, :, frame]))
    short = to_uint8(video[:, :, :2])
    assert side_by_side(short, (2, 8, 6)).shape == (2, 1, 8, 12)
    for sides in ((), (16, 6), (3, 8, 6)):
        pictures = to_uint8(video)
        assert side_by_side(pictures, sides) is pictures


PATCH = {"signals": "tiny/4", "images": "tiny/4", "videos": "tiny/4"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_trains_samples_and_is_evaluated(tmp_path, kind, monkeypatch):
    from selfalign.evaluation import classifier

    monkeypatch.setattr(classifier, "STEPS", 3)
    monkeypatch.setenv("SELFALIGN_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "a.npz", kind)
    config = recipe(
        "sra-dts-as",
        {
            **SMALL,
            "model.size": PATCH[kind],
            "data.name": "arrays",
            "data.root": str(tmp_path / "a.npz"),
            "training.steps": 2,
        },
    )
    start_run(config, tmp_path / "run", lambda state, values: None)
    picture = tmp_path / "run/samples/step_00000002.png"
    assert Image.open(picture).size[0] > 100
    out = tmp_path / "out"
    few = ["--num", "6", "--steps", "2", "--labels", "balanced"]
    assert main(["sample", str(tmp_path / "run"), "--out", str(out), *few]) == 0
    samples = np.load(out / "samples.npz")["arr_0"]
    channels, *sides = KINDS[kind][1:]
    assert samples.shape == (6, *sides, channels)
    assert samples.dtype == (np.float32 if kind == "signals" else np.uint8)
    for moving in (out / "grid.gif", picture.with_suffix(".gif")):
        assert moving.exists() == (kind == "videos")
        if kind == "videos":
            assert Image.open(moving).n_frames == sides[0]
    few = ["--num", "20", "--steps", "1", "--metrics", "fd", "denoising"]
    assert main(["evaluate", str(tmp_path / "run"), *few]) in (0, 2)
    reports = list((tmp_path / "run").rglob("evaluation.json"))
    assert reports and "fd_classifier" in json.dumps(json.loads(reports[0].read_text()))
    assert load_run(tmp_path / "run").image_shape == picture_shape(channels, sides)
