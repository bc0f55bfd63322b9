"""The benchmarks' reference agrees with the recorded behaviour too, so it is an oracle."""

from pathlib import Path

import pytest
import torch
from golden.check import LOSS_NAMES, TEACHER_TIMESTEPS, TOLERANCE, read, weights
from reference import ReferenceSiT, reference_losses, reference_sde

FOLDER = Path(__file__).parent
OBJECTIVES = [f for f in sorted(FOLDER.glob("s*.safetensors")) if "sampler" not in f.name]


@pytest.mark.parametrize("file", OBJECTIVES, ids=lambda file: file.stem)
def test_reference_objective(file: Path) -> None:
    meta, tensors = read(file)
    models = []
    for role in ("student", "teacher"):
        model = ReferenceSiT(
            channels=meta["channels"],
            image_size=(meta["input_size"],) * 2,
            patch_size=meta["patch"],
            hidden_size=meta["hidden"],
            depth=meta["depth"],
            heads=meta["heads"],
            num_classes=meta["num_classes"],
            qk_norm=meta["qk_norm"],
        )
        model.load_state_dict(weights(tensors, f"{role}."))
        models.append(model)
    out = reference_losses(
        *models,
        tensors["x0"],
        tensors["labels"],
        noise=tensors["noise"],
        timesteps=tensors["timesteps"],
        teacher_interval=tensors["teacher_interval"],
        group_ids=tensors["group_ids"],
        teacher_labels=tensors["labels"],
        method={
            "path": meta["path"],
            "separate": meta["attention_separation"],
            "teacher_timestep": TEACHER_TIMESTEPS[meta["teacher_t"]],
            "teacher_groups": meta["teacher_mask"],
            "student_block": meta["student_block"],
            "teacher_block": meta["teacher_block"],
            "distance": LOSS_NAMES[meta["loss_type"]],
            "weight": meta["align_weight"],
        },
    )
    out["total"].backward()
    names = {
        "out.velocity_tokens": out["velocity"],
        "out.target_tokens": out["target"],
        "out.student_features": out["student_features"],
        "out.teacher_features": out["teacher_features"],
        "out.denoising_loss": out["denoising"],
        "out.total_released": out["total"][None],
        "out.align_released": out["alignment"][None],
    }
    names |= {f"grad.{name}": p.grad for name, p in models[0].named_parameters()}
    for name, recorded in tensors.items():
        if name in names:
            assert (names[name] - recorded).abs().max() <= TOLERANCE, name


def test_reference_sampler() -> None:
    meta, tensors = read(FOLDER / "sampler_sde_cfg.safetensors")
    model = ReferenceSiT(
        channels=4,
        image_size=(meta["input_size"],) * 2,
        patch_size=meta["patch"],
        hidden_size=meta["hidden"],
        depth=meta["depth"],
        heads=meta["heads"],
        num_classes=meta["null_class"],
        projection_head=False,
    )
    model.load_state_dict(weights(tensors, "model."))
    samples = reference_sde(
        model,
        tensors["z"],
        tensors["labels"],
        meta["null_class"],
        meta["steps"],
        meta["cfg_scale"],
        (meta["guidance_low"], meta["guidance_high"]),
        lambda step: tensors["step_noise"][step],
    )
    assert (samples - tensors["out.samples"]).abs().max() <= TOLERANCE
    assert torch.isfinite(samples).all()
