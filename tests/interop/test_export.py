"""`selfalign export`, `save_pretrained` and `from_pretrained`: models leave, and say the same elsewhere."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from golden.check import read, weights
from safetensors.torch import load_file, save_file
from small_weights import HEADS, network
from torch import Tensor

from selfalign import SiT, UserError
from selfalign.card import model_card
from selfalign.cli import main
from selfalign.interop.card import card_facts
from selfalign.interop.export import export_run, sit_weights
from selfalign.interop.imported import import_run
from selfalign.interop.released import build_sit
from selfalign.runs.load import LoadedRun, load_run
from selfalign.sampling.generate import generate
from selfalign.sampling.settings import SamplingConfig


def imported(place: Path, file: str = "w.pt", **changes: Any) -> LoadedRun:
    torch.save({"ema": network(**changes).state_dict()}, place / file)
    data = {"name": "digits"} if changes.get("channels") == 1 else {}
    import_run(
        str(place / file), place / "run", "sra", heads=HEADS, vae="", data=data, licence="MIT"
    )
    return load_run(place / "run")


OUTSIDE = """
import sys
sys.modules["selfalign"] = None  # any import of it fails
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
folder, file = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
given = load_file(file)
found = {}
for solver in ("euler", "heun"):
    for scale in (1.0, 2.5):
        found[f"{solver} {scale}"] = pipeline(
            given["labels"].tolist(), num_inference_steps=7, guidance_scale=scale, solver=solver,
            guidance_interval=(0.2, 0.9), latents=given["noise"], output_type="latent",
        ).images.contiguous()
torch.manual_seed(0)
found["sde"] = pipeline(given["labels"].tolist(), num_inference_steps=5, solver="sde",
                        latents=given["noise"], output_type="pt").images.contiguous()
save_file(found, file)
assert pipeline(given["labels"].tolist()[:1], num_inference_steps=1).images[0].size == (8, 8)
assert pipeline.labels_of(["7"]) == [7]
"""


def outside(folder: Path, noise: Tensor, labels: Tensor, tmp_path: Path) -> dict[str, Tensor]:
    """What the folder's own pipeline makes of noise, in a process that cannot import selfalign."""
    file = tmp_path / "given.safetensors"
    save_file({"noise": noise, "labels": labels}, file)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run(
        [sys.executable, "-c", OUTSIDE, str(folder), str(file)],
        env=environment,
        check=True,
        cwd=tmp_path,
    )
    return load_file(file)


def test_a_diffusers_folder_samples_the_same_without_this_package(tmp_path: Path) -> None:
    run = imported(tmp_path, channels=1, num_classes=10, projection_head=True, qk_norm=True)
    folder = export_run(run, tmp_path / "out", "diffusers")
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "model_index.json",
        "pipeline_selfalign.py",
        "transformer",
    ]
    assert "library_name: diffusers" in (folder / "README.md").read_text()
    labels = torch.tensor([1, 9, 3])
    settings = {"steps": 7, "guidance_interval": (0.2, 0.9)}
    noises = []

    class Recorded(SamplingConfig):
        """Keeps the noise that samples start from."""

        def make_solver(self) -> Any:
            solver = super().make_solver()

            class Recording(type(solver)):  # type: ignore[misc]
                def solve(self, velocity: Any, noise: Tensor, *rest: Any) -> Tensor:
                    noises.append(noise.float())
                    return super().solve(velocity, noise, *rest)

            return Recording()

    ours = {}
    for solver in ("euler", "heun"):
        for scale in (1.0, 2.5):
            config = Recorded(solver=solver, guidance_scale=scale, **settings)  # type: ignore[arg-type]
            (batch,) = generate(
                run.model, "linear", config, 3, batch_size=3, labels=labels.tolist()
            )
            ours[f"{solver} {scale}"] = batch.images
    theirs = outside(folder, noises[0], labels, tmp_path)
    assert theirs.pop("sde").isfinite().all()
    for name, images in ours.items():
        torch.testing.assert_close(theirs[name], images, rtol=0, atol=1e-4)


def test_weights_in_sits_form_are_sits() -> None:
    meta, tensors = read(Path(__file__).parents[1] / "golden" / "checkpoint_sit.safetensors")
    theirs, heads = weights(tensors, "model."), meta["heads"]
    back = sit_weights(build_sit(theirs, "sit", heads=heads))
    assert back.keys() == theirs.keys()
    for name, value in theirs.items():
        if not name.startswith("final_layer.linear"):
            torch.testing.assert_close(back[name], value, rtol=0, atol=1e-5)
    # What SiT's own code recorded for its weights, it would say of these.
    again = build_sit(back, "sit", heads=heads)
    expected = build_sit(theirs, "sit", heads=heads)
    x, t, y = tensors["x"], tensors["t"], tensors["labels"]
    torch.testing.assert_close(
        again.velocity(x, t, y), expected.velocity(x, t, y), rtol=0, atol=2e-5
    )


def test_formats_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = imported(tmp_path, projection_head=True)
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.9]), torch.tensor([4, 5])
    expected = run.model.velocity(x, t, y)
    words = ["export", str(run.folder)]
    assert main([*words, str(tmp_path / "hub"), "--format", "safetensors"]) == 0
    again = SiT.from_pretrained(tmp_path / "hub")
    assert not again.training and again.head_taps == {}
    assert torch.equal(again.velocity(x, t, y), expected)
    assert main([*words, str(tmp_path / "sit"), "--format", "sit"]) == 0
    theirs = build_sit(load_file(tmp_path / "sit" / "model.safetensors"), "sit", heads=HEADS)
    torch.testing.assert_close(theirs.velocity(x, t, y), expected, rtol=0, atol=2e-5)
    capsys.readouterr()
    assert main([*words, str(tmp_path / "sit"), "--format", "sit"]) == 2
    assert "allowed is a new or an empty folder" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "x"), "--format", "onnx"]) == 2
    assert not (tmp_path / "x").exists()


def test_the_card_says_what_the_weights_are(tmp_path: Path, small_run: Path) -> None:
    run = imported(tmp_path, projection_head=True)
    folder = export_run(run, tmp_path / "out", "safetensors")
    card = (folder / "README.md").read_text()
    for word in (
        "license: mit",
        "`sra`",
        "none here",
        "w.pt (from sra",
        "SiT.from_pretrained",
        "5 classes",
    ):
        assert word in card
    trained = model_card(**card_facts(load_run(small_run), "CC0-1.0"))
    for word in ("`sra-dts-as`", "digits (fingerprint", "6 of batch 8", "held-out denoising loss"):
        assert word in trained
    assert '"mask_ratios"' in trained and "| licence | CC0-1.0 |" in trained
    assert "not stated" in model_card()
    odd = model_card(licence="a|b\n<b>", data="x\ny | z")
    assert "| data | x y \\| z |" in odd and "| licence | a\\|b &lt;b> |" in odd


def test_push_to_hub_sends_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, Any] = {}

    class Api:
        """Stands in for the hub."""

        def __init__(self, **_: Any) -> None: ...

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("Repository", (), {"repo_id": repo_id})

        def upload_folder(self, *, folder_path: Any, **_: Any) -> str:
            for path in Path(folder_path).iterdir():
                sent[path.name] = path.read_bytes()
            return "sent"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    run = imported(tmp_path)
    model = run.model
    assert isinstance(model, SiT)
    assert model.push_to_hub("me/mine", model_card_kwargs=card_facts(run)) == "sent"
    assert sent.keys() == {"README.md", "config.json", "model.safetensors"}
    assert json.loads(sent["config.json"])["hidden_size"] == 24
    assert 'SiT.from_pretrained("me/mine")' in sent["README.md"].decode()


def test_what_a_form_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="SiT's code has classes"):
        sit_weights(network(num_classes=0))
    torch.save(network(out_channels=6).state_dict(), tmp_path / "dit.pt")
    import_run(str(tmp_path / "dit.pt"), tmp_path / "dit", "dit", heads=HEADS)
    with pytest.raises(UserError, match="has the backbone 'dit'"):
        export_run(load_run(tmp_path / "dit"), tmp_path / "out", "diffusers")


def test_weights_that_do_not_fit_their_config_are_refused(tmp_path: Path) -> None:
    network().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"depth": 1}))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        SiT.from_pretrained(tmp_path)
