"""Pictures of samples: names, files, ways from noise to images."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from support import small_model

from selfalign import make_generator, recipe
from selfalign.cli import main
from selfalign.runs.start import start_run
from selfalign.sampling import pictures
from selfalign.sampling.generate import generate, interpolate, slerp
from selfalign.sampling.settings import SamplingConfig


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("sides", [(8, 8), (4, 8, 8)], ids=str)
def test_any_number_of_channels_is_drawn(tmp_path: Path, channels: int, sides) -> None:
    samples = np.random.default_rng(0).integers(0, 255, (20, channels, *sides), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", samples=samples, labels=np.arange(20) % 2)
    settings = {**SMALL, "data.name": "arrays", "data.root": str(tmp_path / "a.npz")}
    config = recipe("sit", {**settings, "model.size": "tiny/4", "training.steps": 1})
    start_run(config, tmp_path / "run", lambda state, values: None)
    assert (tmp_path / "run/samples/step_00000001.png").is_file()
    more = ["--png", "--trajectory", "gif"] if len(sides) == 2 else []
    arguments = ["sample", str(tmp_path / "run"), "--num", "4", "--steps", "1", *more]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/grid.png").is_file()


def overlapping(names: list[str], monkeypatch: pytest.MonkeyPatch, path: Path) -> bool:
    """Whether boxes of neighbouring names, as they are drawn, lie on each other."""
    figures = []
    monkeypatch.setattr(pictures, "save", lambda place, figure: figures.append(figure))
    images = torch.zeros(2 * len(names), 3, 8, 8, dtype=torch.uint8)
    pictures.draw_grids(path, {"unguided": images, "guidance 2": images}, names, "title")
    (figure,) = figures
    FigureCanvasAgg(figure).draw()
    width, height = figure.canvas.get_width_height()
    boxes = []
    for axis in figure.axes:
        for label in axis.get_xticklabels():
            extent = label.get_window_extent()
            assert extent.x0 >= -1 and extent.x1 <= width + 1, label.get_text()
            assert extent.y1 <= height + 1, label.get_text()
            if label.get_rotation():  # what its slanted text covers, on its own line
                corner = np.array([extent.x0, extent.y0])
                boxes.append(corner @ [np.sin(np.radians(50)), -np.cos(np.radians(50))])
            else:
                boxes.append((extent.x0, extent.x1))
    if isinstance(boxes[0], tuple):
        return any(a[1] > b[0] for a, b in itertools.pairwise(boxes))
    return bool(np.diff(boxes[: len(names)]).min() < 8 * 144 / 72)


LONG = ["Animals & Nature", "Smileys & Emotion", "Travel & Places", "Food & Drink", "x" * 60]


@pytest.mark.parametrize("names", [[*"0123456789"], LONG, LONG * 2, ["cat", "a horse with $5"]])
def test_names_never_overlap(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not overlapping(names, monkeypatch, tmp_path / "grid.png")


def test_every_sample_is_shown_where_classes_have_unequal_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[torch.Tensor] = []
    monkeypatch.setattr(pictures, "draw_grids", lambda path, panels, *_: drawn.append(panels[""]))
    images = np.arange(4, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    pictures.draw_samples(tmp_path / "grid.png", images, np.array([2, 0, 2, 2]), "abc")
    white = 255
    assert drawn[0][:, 0, 0, 0].tolist() == [1, 0, white, 2, white, 3]


def test_what_sample_writes_on_request(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--num", "6", "--steps", "5", "--batch-size", "4", "--png", "--interpolate", "4"]
    for kind in ("gif", "webp"):
        place = out / kind
        words_of = [*words, "--trajectory", kind, "--out", str(place)]
        assert main(["sample", str(small_run), *words_of]) == 0
        with Image.open(place / f"trajectory.{kind}") as animation:
            assert getattr(animation, "n_frames", 1) == 6  # noise, four states between, the images
            assert animation.size[0] >= 64
    said = capsys.readouterr().out.split("(ema weights): ")[-1]
    names = ("samples.npz", "grid.png", "images", "trajectory.webp", "interpolation.png")
    assert said.split() == ", ".join(str(place / name) for name in names).split()
    pixels = np.load(place / "samples.npz")["arr_0"]
    for number in range(6):
        image = np.asarray(Image.open(place / "images" / f"{number:06d}.png"))
        assert np.array_equal(image, pixels[number, ..., 0])
    row = np.asarray(Image.open(place / "interpolation.png"))
    assert row.shape == ((3 * 9 + 1) * 8, (4 * 9 + 1) * 8)
    # The ends of a row are the two samples.
    first = row[8:72:8, 8:72:8].astype(int)
    assert np.abs(first - pixels[0, ..., 0]).max() <= 1  # other batches round otherwise


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--interpolate", "1"], "allowed are 0 (none), or 2 to 64"),
        (["--interpolate", "3", "--num", "1"], "needs two samples"),
        (["--trajectory", "mp4"], "invalid choice"),
    ],
)
def test_refusals(
    small_run: Path,
    tmp_path: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["sample", str(small_run), "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_interpolation_begins_and_ends_with_the_samples() -> None:
    model, config = small_model(dtype=torch.float32), SamplingConfig(solver="sde", steps=3)
    (whole,) = generate(model, "linear", config, 4, batch_size=4, labels=(2, 2, 1, 1))
    pairs = [(0, 1, 2), (2, 3, 1)]
    between = interpolate(model, "linear", config, pairs, 5)
    torch.testing.assert_close(between[:, 0], whole.images[::2])
    ode = SamplingConfig(steps=3)
    (whole,) = generate(model, "linear", ode, 4, batch_size=4, labels=(2, 2, 1, 1))
    between = interpolate(model, "linear", ode, pairs, 5)
    torch.testing.assert_close(between[:, -1], whole.images[1::2])


def test_noise_between_is_as_long_as_noise() -> None:
    a, b = (torch.randn(1000, generator=make_generator(0, "x", i)) for i in range(2))
    for share in (0.25, 0.5):
        assert abs(slerp(a, b, share).norm() / a.norm() - 1) < 0.05
    torch.testing.assert_close(slerp(a, a, 0.5), a)


def test_steps_are_watched_in_images() -> None:
    model, seen = small_model(dtype=torch.float32), []
    config = SamplingConfig(solver="heun", steps=3)
    list(
        generate(
            model,
            "linear",
            config,
            5,
            batch_size=3,
            watch=lambda indices, step, x: seen.append((indices, step, len(x))),
        )
    )
    assert seen == [(range(3), s, 3) for s in range(3)] + [(range(3, 5), s, 2) for s in range(3)]
