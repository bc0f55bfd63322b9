"""The files of examples/ run, and what they leave is a model."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from selfalign import SiT, evaluate, load_run, sample
from selfalign.cli import main

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_example(name: str, *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def velocity(model: SiT) -> Tensor:
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return model.velocity(x, torch.tensor([0.3, 0.8]), torch.tensor([1, 9]))


@pytest.mark.parametrize("name", ["plain_loop", "with_accelerate", "lightning_module"])
def test_loops(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "lightning_module":
        pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    run_example(name, 3)
    assert velocity(SiT.from_pretrained(tmp_path / name)).abs().max() > 0  # it begins as zero


def test_adapters(tmp_path: Path, small_run: Path) -> None:
    peft = pytest.importorskip("peft")
    out = tmp_path / "lora"
    run_example("lora", small_run, out, 3)
    base, merged = load_run(small_run).model, SiT.from_pretrained(out / "merged")
    assert not torch.equal(velocity(base), velocity(merged))
    adapted = peft.PeftModel.from_pretrained(base, out / "adapter")
    torch.testing.assert_close(velocity(adapted.merge_and_unload()), velocity(merged))
    # The merged weights are where another run starts.
    words = ["--init", str(out / "merged" / "model.safetensors"), "--out", str(tmp_path / "next")]
    words += ["--training.steps", "1", "--training.batch-size", "4", "--training.trackers"]
    assert main(["train", "sra-dts-as", "--model.size", "tiny/2", *words]) == 0


def test_three_lines_of_python(tmp_path: Path, small_run: Path) -> None:
    run = load_run(small_run)
    images, labels = sample(run, 4, labels="balanced", steps=2, guidance_scale=2.0)
    assert images.shape == (4, 1, 8, 8) and labels.tolist() == [0, 1, 2, 3]
    found = evaluate(run, num=20, steps=2, metrics=("precision-recall",), out=tmp_path)
    assert found.metrics
