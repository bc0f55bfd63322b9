"""Every parser of a file from outside, with contents that nobody would write: a value, or one line.

What is valid is changed: bytes are flipped, cut and doubled, and of JSON and YAML single values are replaced
by others. `make test` tries some dozens per parser, always the same ones; `make test-all` many more.
"""

import contextlib
import gzip
import json
import os
import pickle
import shutil
import signal
import struct
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from study.synthetic import write_synthetic_study

from selfalign.arrays import Npz, read_npy
from selfalign.backbones.diffusers.folder import DIT, read_settings
from selfalign.backbones.diffusers.model import load_folder
from selfalign.cli import main
from selfalign.config_file import read_config
from selfalign.data.contents import Contents, read_contents, write_contents
from selfalign.data.files import read_cifar10, read_mnist
from selfalign.data.images import read_image
from selfalign.data.latents.prepare import prepare
from selfalign.data.latents.reader import open_latents
from selfalign.data.latents.settings import PrepareConfig
from selfalign.data.latents.sources import open_source
from selfalign.data.latents.store import Layout
from selfalign.data.latents.workers import finished_shard
from selfalign.errors import UserError
from selfalign.evaluation.inputs import open_images
from selfalign.evaluation.record import _read_sampling
from selfalign.evaluation.reference import open_reference
from selfalign.interop.card import _metrics
from selfalign.records import read_json
from selfalign.runs.folder import read_origin, read_record
from selfalign.sections import DataConfig
from selfalign.study.grid_file import load_grid
from selfalign.study.plan import read_study
from selfalign.study.power import read_pilot
from selfalign.study.results import ERRORS_FILE, StudyResults, read_results
from selfalign.training.checkpoint import is_monitored, latest_checkpoint, verify
from selfalign.training.tracking import read_metrics
from selfalign.weights import read_safetensors


@dataclass(frozen=True)
class Border:
    """A file from outside, and what reads it."""

    file: Path
    read: Callable[[], object]
    plain: bool = False
    """Whether it is JSON or YAML, whose values are replaced too."""


def _npz_arrays(path: Path) -> None:
    arrays = Npz(path)
    for name in arrays:
        arrays[name].sum()


def _images(path: Path) -> None:
    images = open_images(path)
    images.read(range(len(images)))


NARROW = {"num_attention_heads": 2, "attention_head_dim": 8, "norm_num_groups": 2}


def _diffusers(folder: Path) -> None:
    read_settings.__wrapped__(str(folder), "folder")
    load_folder(str(folder), DIT)


def _variance(results: StudyResults) -> None:
    found = results.pair_errors(results.done, "heldout_loss")
    if found is not None:
        found.variance({results.done[0].variant: 1.0}, (0, 1))


def make_borders(folder: Path, run: Path) -> Iterator[tuple[str, Border]]:
    """A valid file for every parser."""
    run = shutil.copytree(run, folder / "run")
    checkpoints = run / "checkpoints"
    checkpoint = latest_checkpoint(checkpoints)
    yield "config.json", Border(run / "config.json", lambda: read_record(run), True)
    yield "latest", Border(checkpoints / "latest", lambda: latest_checkpoint(checkpoints))
    yield "monitored", Border(checkpoints / "monitored", lambda: is_monitored(checkpoint))
    yield "state.json", Border(checkpoint / "state.json", lambda: verify(checkpoint), True)
    sums = checkpoint / "checksums.json"
    yield "checksums.json", Border(sums, lambda: verify(checkpoint), True)
    weights = folder / "weights.safetensors"
    shutil.copy(checkpoint / "ema.safetensors", weights)
    yield "weights", Border(weights, lambda: read_safetensors(weights))
    yield "metrics.jsonl", Border(run / "metrics.jsonl", lambda: read_metrics(run))
    origin, measured = run / "imported.json", run / "evaluation.json"
    origin.write_text('{"file": "a.pt", "sha256": "0", "from": "sit", "licence": ""}')
    yield "imported.json", Border(origin, lambda: read_origin(run), True)
    measured.write_text('{"metrics": {"fd": {"value": 1.5}}}')
    yield "evaluation.json", Border(measured, lambda: _metrics(run), True)
    settings_file = folder / "settings.yaml"
    settings_file.write_text("recipe: sra\nseed: 3\ntraining: {steps: 5, learning_rate: 0.1}\n")
    yield "settings", Border(settings_file, lambda: read_config(settings_file), True)
    theirs = folder / "dit" / "config.json"
    theirs.parent.mkdir()
    theirs.write_text(json.dumps({"_class_name": DIT, "num_layers": 2, "sample_size": 8, **NARROW}))
    yield "diffusers", Border(theirs, lambda: _diffusers(theirs.parent), True)

    images = folder / "images"
    for number in range(8):
        path = images / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    for suffix in ("png", "jpg", "gif", "bmp", "tif", "webp"):
        image = folder / f"image.{suffix}"
        Image.open(images / "a" / "0.png").save(image)
        yield suffix, Border(image, lambda image=image: read_image(image, 8))  # type: ignore[misc]

    store = folder / "store"
    prepare(str(images), store, PrepareConfig(image_size=16, vae="none"))
    layout = json.loads((store / "manifest.json").read_text())
    opened = DataConfig(name="latents", root=str(store))
    for name in ("manifest.json", "index.npy", "shard-00000.xxh3"):
        yield name, Border(store / name, lambda: open_latents(opened), name.endswith("json"))
    plan, record = folder / "plan.json", folder / "shard-00000.json"
    plan.write_text(json.dumps(layout["layout"]))
    yield "plan.json", Border(plan, lambda: read_json(plan, Layout), True)
    record.write_text(json.dumps(layout["shards"][0]))
    shutil.copy(store / "shard-00000.bin", folder)
    shutil.copy(store / "shard-00000.xxh3", folder)
    known = read_json(plan, Layout)
    yield "shard.json", Border(record, lambda: finished_shard(folder, 0, known), True)

    listed = folder / "listed"
    listed.mkdir()
    for number in range(3):
        shutil.copy(images / "a" / "0.png", listed / f"{number}.png")
    entries = {"labels": [[f"{number}.png", number % 2] for number in range(3)]}
    (listed / "dataset.json").write_text(json.dumps(entries))
    yield (
        "dataset.json",
        Border(listed / "dataset.json", lambda: open_source(str(listed)), True),
    )
    contents = folder / "data.json.gz"
    write_contents(contents, Contents(("a",), ("x.png", "y.png"), (0, 0), (1, 2)))
    yield "data.json.gz", Border(contents, lambda: read_contents(contents))
    tar = folder / "images.tar"
    with tarfile.open(tar, "w") as archive:
        for path in sorted(images.rglob("*.png")):
            archive.add(path, path.relative_to(images))
    yield "tar", Border(tar, lambda: open_source(str(tar)))

    sampling = folder / "sampling.json"
    sampling.write_text('{"steps": 3, "labels": [1, 2], "guidance": {"scale": 1.5}}')
    yield "sampling.json", Border(sampling, lambda: _read_sampling(sampling), True)
    npy, npz, statistics = folder / "a.npy", folder / "a.npz", folder / "statistics.npz"
    np.save(npy, np.arange(6.0).reshape(2, 3))
    yield "npy", Border(npy, lambda: read_npy(npy))
    np.savez_compressed(npz, arr_0=np.zeros((2, 8, 8, 1), np.uint8), arr_1=np.arange(2))
    yield "npz", Border(npz, lambda: (_npz_arrays(npz), _images(npz)))
    np.savez(statistics, mu=np.zeros(4), sigma=np.eye(4))
    yield "statistics", Border(statistics, lambda: open_reference(statistics))

    digits = folder / "digits"
    digits.mkdir()
    for part in ("train", "t10k"):
        for kind, shape in (("images-idx3", (3, 28, 28)), ("labels-idx1", (3,))):
            header = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
            content = header + bytes(int(np.prod(shape)))
            (digits / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
    yield (
        "idx.gz",
        Border(digits / "t10k-images-idx3-ubyte.gz", lambda: read_mnist(digits, "mnist")),
    )
    colours = folder / "colours"
    colours.mkdir()
    batch = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]}
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        (colours / name).write_bytes(pickle.dumps(batch, 2))
    yield "cifar", Border(colours / "test_batch", lambda: read_cifar10(colours))

    study = folder / "study"
    write_synthetic_study(study, seeds=(0, 1))
    result = next(study.rglob("result.json"))
    yield "study.json", Border(study / "study.json", lambda: read_study(study), True)
    yield "result.json", Border(result, lambda: read_results(study), True)
    errors = np.arange(20.0).astype("f4")
    for done in study.glob("runs/*/*"):
        arrays = {"heldout_loss": errors, "images": np.arange(20), "bins": np.arange(20) % 10}
        np.savez(done / ERRORS_FILE, **arrays)
    results = read_results(study)
    errors_file = study / results.done[0].folder / ERRORS_FILE
    yield "errors", Border(errors_file, lambda: _variance(results))
    pilot = folder / "pilot"
    pilot.mkdir()
    means = {v: {"heldout_loss": {"by_seed": {"0": 1.0, "1": 1.0 + k}}} for k, v in enumerate("ab")}
    (pilot / "report.json").write_text(json.dumps({"means": means}))
    yield "report.json", Border(pilot / "report.json", lambda: read_pilot(pilot), True)
    grid = folder / "grid.yaml"
    grid.write_text(
        "name: g\nbaseline: a\nvariants:\n  a: {recipe: sit}\n"
        "  b: {recipe: sra, settings: {training.steps: 3, views.class_dropout: 0.1}}\n"
        "tables: [{title: t, rows: [a, {variant: b, factors: {x: y}, paper: {FID: 1.5}}], note: n}]\n"
        "effects: [{title: e, question: q, contrasts: [[b, a]], claim: 'Yes'}]\n"
    )
    yield "grid", Border(grid, lambda: load_grid(grid), True)


BORDERS = (
    *("config.json", "latest", "monitored", "state.json", "checksums.json", "weights"),
    *(
        "metrics.jsonl",
        "imported.json",
        "evaluation.json",
        "settings",
        "diffusers",
        "png",
        "jpg",
        "gif",
        "bmp",
        "tif",
        "webp",
        "manifest.json",
        "index.npy",
    ),
    *("shard-00000.xxh3", "plan.json", "shard.json", "dataset.json", "data.json.gz", "tar"),
    *("sampling.json", "npy", "npz", "statistics", "idx.gz", "cifar", "study.json", "result.json"),
    *("errors", "report.json", "grid"),
)
JUNK: st.SearchStrategy[Any] = st.sampled_from(
    [
        *(None, True, False, 0, -1, 1.5, 2**31, 2**63, 10**30, -(10**18), 1e308, "", "x", "\0"),
        *("../x", "/etc/passwd", "$\\frac{", "[/x]", "<b>", "a\nb", "\ud800", "\u202e", "n" * 300),
        *([], {}, [[]], [None], {"a": 1}, {"": {}}, ["x"], [1, 2, 3, 4, 5]),
        *(float("nan"), float("inf")),
    ]
)


@pytest.fixture(scope="module")
def borders(tmp_path_factory: pytest.TempPathFactory, small_run: Path) -> dict[str, Border]:
    """All of them, by name."""
    return dict(make_borders(tmp_path_factory.mktemp("borders"), small_run))


def test_none_is_forgotten(borders: dict[str, Border]) -> None:
    assert tuple(borders) == BORDERS
    for border in borders.values():
        border.read()


def _replaced(content: bytes, data: st.DataObject) -> bytes:
    """The content with one of its values replaced, dropped or added."""
    values = yaml.safe_load(content)
    place = values
    for _ in range(data.draw(st.integers(0, 6))):
        inner = list(place.values()) if isinstance(place, dict) else place
        deeper = [value for value in inner if isinstance(value, dict | list) and value]
        if not deeper:
            break
        place = data.draw(st.sampled_from(deeper))
    key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
    match data.draw(st.sampled_from(["replace", "replace", "drop", "add"])):
        case "drop":
            del place[key]
        case "add" if isinstance(place, dict):
            place[data.draw(st.text(max_size=5))] = data.draw(JUNK)
        case _:
            place[key] = data.draw(JUNK)
    return json.dumps(values).encode()


def _damaged(content: bytes, data: st.DataObject) -> bytes:
    """The content with some bytes changed, cut off, or doubled."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(0, 4))):
        # Headers are where the interesting numbers are.
        place = data.draw(
            st.integers(0, len(changed) - 1) | st.integers(0, min(200, len(changed) - 1))
        )
        changed[place] = data.draw(st.integers(0, 255))
    match data.draw(st.sampled_from(["", "", "cut", "double", "empty", "more"])):
        case "cut":
            del changed[data.draw(st.integers(0, len(changed))) :]
        case "double":
            changed *= 2
        case "empty":
            changed.clear()
        case "more":
            changed += data.draw(st.binary(min_size=1, max_size=20))
    return bytes(changed)


def _try(border: Border, data: st.DataObject) -> None:
    valid = border.file.read_bytes()
    content = _damaged(valid, data)
    if border.plain and data.draw(st.integers(0, 3)):
        content = _replaced(valid, data)
    border.file.write_bytes(content)
    try:
        with contextlib.suppress(UserError):
            border.read()
    finally:
        border.file.write_bytes(valid)


FUZZ: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


@pytest.mark.parametrize("name", BORDERS)
@settings(max_examples=25, derandomize=True, **FUZZ)
@given(data=st.data())
def test_no_content_is_a_traceback(
    borders: dict[str, Border], name: str, data: st.DataObject
) -> None:
    _try(borders[name], data)


@pytest.mark.slow
@pytest.mark.parametrize("name", BORDERS)
@settings(max_examples=1000, **FUZZ)
@given(data=st.data())
def test_no_content_is_a_traceback_of_many(
    borders: dict[str, Border], name: str, data: st.DataObject
) -> None:
    _try(borders[name], data)


@pytest.mark.slow
@settings(max_examples=150, **FUZZ)
@given(data=st.data())
def test_no_config_is_a_traceback_of_the_commands(
    borders: dict[str, Border], data: st.DataObject, tmp_path: Path
) -> None:
    """What is a config tree, and still not that of the run, is found further on."""
    border = borders["config.json"]
    valid = border.file.read_bytes()
    border.file.write_bytes(_replaced(valid, data))
    try:
        torch.manual_seed(0)
        words = ["sample", str(border.file.parent), "--out", str(tmp_path / "x"), "--num", "2"]
        assert main([*words, "--steps", "1"]) in (0, 2)
    finally:
        border.file.write_bytes(valid)


@pytest.fixture
def _no_waiting() -> Iterator[None]:
    """SIGALRM fails a test that waits for a writer of a pipe."""

    def waits(number: int, frame: object) -> None:
        pytest.fail("it waits")

    before = signal.signal(signal.SIGALRM, waits)
    yield
    signal.signal(signal.SIGALRM, before)


PASSED_OVER = (
    *("shard.json", "result.json", "errors", "monitored", "metrics.jsonl", "latest", "tar"),
    "idx.gz",
)
"""A link to nothing in the place of these is as if they were missing, which they may be."""


@pytest.mark.parametrize("name", BORDERS)
@pytest.mark.usefixtures("_no_waiting")
def test_a_files_place_taken_by_something_else(borders: dict[str, Border], name: str) -> None:
    """A folder, a pipe, a device without end, a link to itself: told, and waited for by nobody."""
    path = borders[name].file
    valid = path.read_bytes()
    for make in (
        path.mkdir,
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to(path.name),
    ):
        path.unlink()
        make()
        signal.alarm(20)
        try:
            borders[name].read()
            told = False
        except UserError:
            told = True
        finally:
            signal.alarm(0)
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            path.write_bytes(valid)
        assert told or name in PASSED_OVER
