"""Weights of a DiT are sampled as diffusers' own DiTPipeline samples them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_weights import HEADS, network
from torch import Tensor

from selfalign import SiT, UserError
from selfalign.cli import main
from selfalign.interop.imported import import_run
from selfalign.randomness import make_generator
from selfalign.runs.load import load_run
from selfalign.sampling.generate import check_sampling, generate
from selfalign.sampling.settings import SamplingConfig

diffusers = pytest.importorskip("diffusers")
CLASSES = 1000  # DiTPipeline's null class is label 1000
LABELS = [3, 999, 3]
BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def weights() -> SiT:
    return network(channels=4, out_channels=8, num_classes=CLASSES)


def in_diffusers_layout(model: SiT) -> dict[str, Tensor]:
    """The weights of a DiT by the names of diffusers' DiTTransformer2DModel."""
    state, out = model.state_dict(), {}

    def copy(theirs: str, ours: str) -> None:
        for kind in ("weight", "bias"):
            out[f"{theirs}.{kind}"] = state[f"{ours}.{kind}"]

    copy("pos_embed.proj", "x_embedder.proj")
    copy("proj_out_1", "final_layer.adaLN_modulation.1")
    copy("proj_out_2", "final_layer.linear")
    for number in range(len(model.blocks)):
        block, ours = f"transformer_blocks.{number}", f"blocks.{number}"
        embedder = f"{block}.norm1.emb"
        copy(f"{embedder}.timestep_embedder.linear_1", "t_embedder.mlp.0")
        copy(f"{embedder}.timestep_embedder.linear_2", "t_embedder.mlp.2")
        table = "embedding_table.weight"
        out[f"{embedder}.class_embedder.{table}"] = state[f"y_embedder.{table}"]
        copy(f"{block}.norm1.linear", f"{ours}.adaLN_modulation.1")
        for kind in ("weight", "bias"):
            q, k, v = state[f"{ours}.attn.qkv.{kind}"].chunk(3)
            for name, part in (("q", q), ("k", k), ("v", v)):
                out[f"{block}.attn1.to_{name}.{kind}"] = part
        copy(f"{block}.attn1.to_out.0", f"{ours}.attn.proj")
        copy(f"{block}.ff.net.0.proj", f"{ours}.mlp.fc1")
        copy(f"{block}.ff.net.2", f"{ours}.mlp.fc2")
    return out


def pipeline_of(model: SiT, scheduler: Any) -> Any:
    """diffusers' DiTPipeline of the same weights; what it would decode is kept in `.latents`."""
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=model.hidden_size // HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=len(model.blocks),
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
        norm_eps=1e-6,
    )
    transformer.load_state_dict(in_diffusers_layout(model))
    for block in transformer.transformer_blocks:
        # DiT divides by the number of frequencies; diffusers' copy by one less, which moves them by 1 %.
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    pipeline = diffusers.DiTPipeline(transformer.eval(), vae, scheduler)
    pipeline.set_progress_bar_config(disable=True)

    def decode(latents: Tensor) -> Any:
        pipeline.latents = latents * vae.config.scaling_factor
        return SimpleNamespace(sample=torch.zeros(len(latents), 3, 8, 8))

    vae.decode = decode
    return pipeline


def generators() -> list[torch.Generator]:
    """Those that samples 0 to 2 are drawn from."""
    return [make_generator(0, "sample", i) for i in range(len(LABELS))]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dit")
    torch.save({"ema": weights().state_dict()}, folder / "w.pt")
    import_run(str(folder / "w.pt"), folder / "run", "dit", heads=HEADS, vae="")
    return folder / "run"


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("solver", ["ddim", "dpm-solver", "ddpm"])
def test_samples_are_those_of_dit_pipeline(run_folder: Path, solver: str, scale: float) -> None:
    if solver == "ddim":
        scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False)
    elif solver == "dpm-solver":
        scheduler = diffusers.DPMSolverMultistepScheduler(**BETAS)
    else:
        scheduler = diffusers.DDPMScheduler(**BETAS, clip_sample=False)
    theirs = pipeline_of(weights(), scheduler)
    drawn = generators()
    if solver == "ddpm":  # its pipeline does not hand its generators on to the scheduler
        step = scheduler.step
        copies = 1 if scale == 1 else 2

        def with_generators(output: Tensor, t: Any, sample: Tensor) -> Any:
            torch.manual_seed(0)
            noise = torch.stack([torch.randn(sample.shape[1:], generator=g) for g in drawn])
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    "diffusers.schedulers.scheduling_ddpm.randn_tensor",
                    lambda *_, **__: torch.cat([noise] * copies),
                )
                return step(output, t, sample)

        scheduler.step = with_generators
    theirs(LABELS, guidance_scale=scale, generator=drawn, num_inference_steps=10)
    run = load_run(run_folder)
    config = SamplingConfig(solver=solver, steps=10, guidance_scale=scale)
    check_sampling(run.model, config, 0.1, LABELS)
    (ours,) = generate(run.model, "linear", config, 3, batch_size=3, labels=LABELS)
    expected = theirs.latents
    assert expected.std() > 0.1
    torch.testing.assert_close(ours.images, expected, rtol=1e-4, atol=1e-4)


def test_sra_trains_dits_too(tmp_path: Path) -> None:
    """Its head beside a learned sigma."""
    model = network(out_channels=6, projection_head=True)
    torch.save({"ema": model.state_dict()}, tmp_path / "w.pt")
    for project in (None, "sra", "dit"):
        run = import_run(
            str(tmp_path / "w.pt"), tmp_path / f"{project}", project, heads=HEADS, vae=""
        )
        assert run.config.model.backbone == "dit" and run.told == ("ap_head is left out",)


def test_a_dit_takes_its_own_solvers_and_is_not_trained(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], small_run: Path
) -> None:
    words = ["--out", str(tmp_path / "out"), "--num", "2"]
    assert main(["sample", str(run_folder), *words]) == 2
    assert "allowed are ddim, ddpm, dpm-solver" in capsys.readouterr().err
    assert main(["sample", str(small_run), *words, "--solver", "ddim"]) == 2
    assert "allowed are dopri5, euler, heun, sde" in capsys.readouterr().err
    config = SamplingConfig(solver="ddim", steps=1001)
    with pytest.raises(UserError, match="knows 1000 diffusion steps"):
        next(generate(load_run(run_folder).model, "linear", config, 1, batch_size=1))
    train = ["train", "sit", "--out", str(tmp_path / "out"), "--model.backbone", "dit"]
    assert main([*train, "--model.size", "tiny/2"]) == 2
    assert "model.backbone is 'dit'" in capsys.readouterr().err
    init = ["train", "sit", "--out", str(tmp_path / "out"), "--data.name", "digits", "--init"]
    torch.save(network(out_channels=6, projection_head=True).state_dict(), tmp_path / "dit.pt")
    for start in (run_folder, tmp_path / "dit.pt"):
        assert main([*init, str(start), "--model.size", "24x2x2/2"]) == 2
        assert "allowed are models that predict velocities" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="has no velocity"):
        load_run(run_folder).model.velocity(torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1))


def test_a_dit_is_evaluated_and_not_looked_into(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = network(channels=1, out_channels=2, num_classes=10)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    data = {"name": "digits"}
    import_run(str(tmp_path / "w.pt"), tmp_path / "run", "dit", heads=HEADS, data=data)
    words = ["--num", "20", "--metrics", "precision-recall", "--solver", "ddim", "--steps", "2"]
    assert main(["evaluate", str(tmp_path / "run"), *words]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "run")]) == 2
    assert "predicts noise at diffusion steps of its own" in capsys.readouterr().err
