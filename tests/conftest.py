"""Shared by all tests: small runs, made once."""

import copy
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from reading import chromium

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
os.environ["HF_HUB_OFFLINE"] = "1"  # what is not on the machine is missing, at once

from selfalign import RunConfig, parts, recipe
from selfalign.runs import monitors
from selfalign.runs.start import start_run

SMALL = {
    "model.size": "tiny/2",
    "training.steps": 6,
    "training.batch_size": 8,
    "training.learning_rate": 1e-3,
    "training.log_every": 2,
    "training.heldout_samples": 20,
    "training.trackers": (),
}
"""A run of a few seconds: digits, 16 tokens."""

# How long an example takes is the machine's business.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def _one_thread_per_test() -> None:
    """Small models gain nothing from threads, and bitwise comparisons need their number fixed."""
    torch.set_num_threads(1)
    monitors.GRID_STEPS = 2


@pytest.fixture(scope="session")
def small_config() -> RunConfig:
    """The paper's recipe as a run of a few seconds."""
    return recipe("sra-dts-as", SMALL)


@pytest.fixture(scope="session")
def small_run(small_config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished small run. Do not write into it."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    start_run(small_config, folder, lambda state, values: None)
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def forget_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    for kind in parts.HOMES:
        parts.names(kind)  # the package's own parts stay
    for name in ("_registered", "_aliases", "_plugins"):
        monkeypatch.setattr(parts, name, copy.deepcopy(getattr(parts, name)))


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    """Headless Chromium."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(
            executable_path=chromium(playwright), args=options, timeout=120_000
        )
        yield browser
        browser.close()


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes may hold the time, in gzip's header: processes that share the tests must name them alike."""
    return argname if isinstance(val, bytes) else None
