"""The benchmark for GPUs takes all of its ways on a processor, so that it works on the day it is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu
import pytest
import torch

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
NOT_NEEDED = """
import importlib.machinery as machinery
names = {"msgspec", "PIL", "xxhash", "tyro", "rich", "torchvision", "timm", "sklearn", "scipy", "matplotlib"}
find = machinery.PathFinder.find_spec.__func__
machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None:
        None if name.split(".")[0] in names else find(cls, name, path, target)
)
"""
"""Hides what machines with a GPU may lack."""


def found(name: str, tmp_path: Path) -> dict[str, Any]:
    gpu.run_part(name, CPU, True, tmp_path / "part.json")
    return json.loads((tmp_path / "part.json").read_text())


def test_a_part_needs_only_torch_and_four_packages_more(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(NOT_NEEDED)
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--dry"]
    done = subprocess.run(
        [*command, "--parts", "waits", "--out", str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert results["parts"]["waits"]["found"].keys() == {"sit", "self-flow", "sra-dts-as"}
    assert results["machine"]["torch"] == torch.__version__
    page = (tmp_path / "out" / "gpu.md").read_text()
    assert "## waits" in page and "sra-dts-as: ran" in page
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"gpu.json", "gpu.md"}


def test_recorded_cases(tmp_path: Path) -> None:
    assert found("recorded", tmp_path)["within_tolerance"] is True


def test_the_same_device_gives_the_same_losses(tmp_path: Path) -> None:
    for name, result in found("devices", tmp_path).items():
        assert result["largest_relative_difference"] == 0, name


def test_steps_repeat_and_resume(tmp_path: Path) -> None:
    for name, result in found("determinism", tmp_path).items():
        assert result == {"repeated": True, "resumed": True}, name


def test_sampling(tmp_path: Path) -> None:
    sampled = found("sampling", tmp_path)
    assert "images_per_second_of_250_steps" in sampled["bf16"]


@pytest.mark.slow
def test_profile(tmp_path: Path) -> None:
    profile = found("profile", tmp_path)
    assert profile.keys() == {"eager", "compiled"}
    for profiled in profile.values():
        assert sum(profiled["kinds"].values()) == pytest.approx(1, abs=1e-3)
        assert 0 < sum(profiled["longest"].values()) <= 1.001 and profiled["kinds"]["matmuls"] > 0.1


def test_steps_are_measured_against_the_reference(tmp_path: Path, monkeypatch: Any) -> None:
    modes = ("eager", "against the reference", "?")
    cases = [gpu.Case("tiny/2", 16, "sra-dts-as", mode) for mode in modes]
    cases.append(gpu.Case("huge", 16, "sit", "eager"))
    monkeypatch.setattr(gpu, "_step_cases", lambda bench: cases)
    rows = found("steps", tmp_path)["rows"]
    assert rows[0]["batch"] == 4 and rows[0]["share_of_peak"] > 0
    assert rows[0]["estimate_over_measured"] > 0
    assert "speed_against_reference" in rows[1]
    assert rows[2]["failed"].startswith("ValueError: mode '?'")
    assert rows[3]["failed"].startswith("UserError: ")
    results = {"machine": {}, "parts": {"steps": {"failure": "", "found": {"rows": rows}}}}
    assert "| size | tokens | recipe | mode |" in gpu.page(results)


ROW = {"size": "tiny/2", "tokens": 16, "recipe": "sit", "mode": "eager", "batch": 2}
FAILED = {**ROW, "mode": "compiled", "failed": "OutOfMemoryError"}


def test_parts_that_were_complete_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {
        "waits": {"seconds": 1.0, "failure": "", "found": {"sit": "waits for nothing"}},
        "steps": {"seconds": 1.0, "failure": "not finished in its time", "found": {"rows": [ROW]}},
    }
    written = {"machine": gpu.describe(CPU), "parts": parts}
    (tmp_path / "gpu.json").write_text(json.dumps(written))
    monkeypatch.setitem(gpu.PARTS, "steps", (gpu.steps, 0))
    results = gpu.run_all(["waits", "steps"], CPU, True, tmp_path)
    assert results["parts"]["waits"] == parts["waits"]
    assert results["parts"]["steps"]["found"] == {"rows": [ROW]}  # with no time for another
    assert "waits: measured before" in capsys.readouterr().out
    written["machine"] = {**written["machine"], "device": "another"}
    (tmp_path / "gpu.json").write_text(json.dumps(written))
    assert gpu.run_all([], CPU, True, tmp_path)["parts"] == {}


def test_steps_that_were_taken_are_not_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = gpu.MODES[::2]
    monkeypatch.setattr(
        gpu, "_step_cases", lambda bench: [gpu.Case("tiny/2", 16, "sit", mode) for mode in modes]
    )
    monkeypatch.setattr(gpu, "_measure", lambda *case: {"batch": 3})
    (tmp_path / "part.json").write_text(json.dumps({"rows": [ROW, FAILED]}))
    assert found("steps", tmp_path)["rows"] == [ROW, {**ROW, "mode": "compiled", "batch": 3}]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["steps", "compiler"])
def test_all_cases(name: str, tmp_path: Path) -> None:
    result = found(name, tmp_path)
    if name == "steps":
        assert not [row for row in result["rows"] if "failed" in row]
    else:
        assert {entry["graphs"] for entry in result.values()} == {1}


def test_a_part_that_fails_or_hangs_is_reported(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(gpu.PARTS, "waits", (gpu.waits, 0))
    results = gpu.run_all(["waits"], CPU, True, tmp_path)
    assert results["parts"]["waits"]["failure"] == "not finished in its time"
    assert "**Not complete**" in (tmp_path / "gpu.md").read_text()


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 2
    assert "torch finds none here" in capsys.readouterr().err
