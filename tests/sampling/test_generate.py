"""Numbered sets: what a sample depends on, and what is refused."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from selfalign import UserError
from selfalign.cli import main
from selfalign.runs.load import LoadedRun, load_run
from selfalign.sampling.generate import check_sampling, generate, random_labels
from selfalign.sampling.settings import SamplingConfig
from selfalign.tokens import group_sizes


@pytest.fixture(scope="module")
def run(small_run: Path) -> LoadedRun:
    """A trained model."""
    return load_run(small_run)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(steps=4),
        SamplingConfig("heun", steps=3, guidance_scale=2.0, guidance_interval=(0.0, 0.7)),
        SamplingConfig("sde", steps=4, seed=3),
        SamplingConfig("sde", steps=4, mask_ratio=0.25, mask_type="per-step"),
        SamplingConfig("euler", steps=4, mask_ratio=0.5),
    ],
    ids=["euler", "heun-guided", "sde", "sde-groups", "euler-groups"],
)
def test_a_sample_does_not_depend_on_the_batch(run: LoadedRun, sampling: SamplingConfig) -> None:
    def samples(batch_size: int, first: int, num: int) -> torch.Tensor:
        parts = generate(run.model, "linear", sampling, num, batch_size=batch_size, first=first)
        return torch.cat([part.images for part in parts])

    whole = samples(8, 0, 8)
    assert torch.allclose(samples(3, 0, 8), whole, atol=1e-5)
    assert torch.allclose(samples(1, 5, 2), whole[5:7], atol=1e-5)
    assert not torch.allclose(whole[0], whole[1], atol=0.1)


@pytest.mark.parametrize("solver", ["euler", "heun", "sde", "dopri5"])
def test_no_gradient_is_kept(run: LoadedRun, solver: str) -> None:
    model = copy.deepcopy(run.model).requires_grad_(True)
    (part,) = generate(model, "linear", SamplingConfig(solver, steps=2), 2, batch_size=2)
    assert not part.images.requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("ratio", [0.25, 0.3, 0.35, 0.5])
def test_groups_have_the_sizes_that_training_gives_them(run: LoadedRun, ratio: float) -> None:
    seen = []
    blocks = run.model.blocks

    def note(module: torch.nn.Module, inputs: tuple[object, ...]) -> None:
        seen.append(inputs[2])

    handle = blocks[0].register_forward_pre_hook(note)
    try:
        config = SamplingConfig(steps=2, mask_ratio=ratio)
        list(generate(run.model, "linear", config, 2, batch_size=2))
    finally:
        handle.remove()
    expected = group_sizes((ratio, 1 - ratio), run.model.num_tokens)
    assert {groups.sizes for groups in seen} == {expected}  # type: ignore[attr-defined]
    assert all(groups.separate for groups in seen)  # type: ignore[attr-defined]


def test_groups_in_sampling_matter_only_where_attention_is_separated(run: LoadedRun) -> None:
    def sample(separate: bool, **settings: object) -> torch.Tensor:
        config = SamplingConfig(steps=3, **settings)  # type: ignore[arg-type]
        (part,) = generate(
            run.model, "linear", config, 4, batch_size=4, separate=separate, labels=[1]
        )
        return part.images

    whole = sample(True)
    assert torch.allclose(sample(False, mask_ratio=0.5), whole, atol=1e-5)
    # Six steps of training move the attention only so much.
    assert not torch.allclose(sample(True, mask_ratio=0.5), whole, atol=5e-5)


def test_random_labels_are_uniform_and_numbered() -> None:
    labels = random_labels(10, 0, range(5000))
    counts = torch.bincount(labels, minlength=10)
    assert (counts - 500).abs().max() < 110  # five standard deviations
    assert torch.equal(random_labels(10, 0, range(100, 110)), labels[100:110])
    assert not torch.equal(random_labels(10, 1, range(100)), labels[:100])


@pytest.mark.parametrize(
    ("settings", "labels", "message"),
    [
        ({"guidance_scale": 0.5}, None, "guidance scale is 0.5: allowed is 1"),
        ({"guidance_interval": (0.7, 0.2)}, None, "0 <= low <= high <= 1"),
        ({"steps": 0}, None, "steps is 0"),
        ({"mask_ratio": 1.5}, None, "mask_ratio is 1.5"),
        ({"mask_ratio": 0.01}, None, "leaves a group of the 16 tokens empty"),
        ({}, [3, 12], "labels are .*: the model's classes are 0 to 9"),
    ],
)
def test_what_cannot_be_sampled_is_refused(
    run: LoadedRun, settings: dict[str, object], labels: list[int] | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_sampling(run.model, SamplingConfig(**settings), 0.1, labels)  # type: ignore[arg-type]


def test_guidance_needs_dropped_labels(run: LoadedRun) -> None:
    with pytest.raises(UserError, match="trained without dropped labels"):
        check_sampling(run.model, SamplingConfig(guidance_scale=2.0), 0.0, None)


def test_the_command_writes_the_files(small_run: Path, tmp_path: Path) -> None:
    def sample(name: str, *options: str) -> Path:
        base = ["sample", str(small_run), "--out", str(tmp_path / name), "--steps", "2"]
        assert main([*base, *options]) == 0
        return tmp_path / name

    one = sample("one", "--num", "7", "--batch-size", "7", "--labels", "3", "5")
    two = sample("two", "--num", "7", "--batch-size", "3", "--labels", "3", "5")
    first, second = (np.load(folder / "samples.npz") for folder in (one, two))
    assert first["arr_0"].shape == (7, 8, 8, 1)
    assert first["arr_0"].dtype == np.uint8
    assert first["arr_1"].tolist() == [3, 5, 3, 5, 3, 5, 3]
    assert np.abs(first["arr_0"].astype(int) - second["arr_0"]).max() <= 1
    assert json.loads((one / "sampling.json").read_text())["steps"] == 2
    assert (one / "grid.png").stat().st_size > 500
    raw = np.load(sample("raw", "--num", "3", "--weights", "raw") / "samples.npz")
    assert raw["arr_0"].shape == (3, 8, 8, 1)
