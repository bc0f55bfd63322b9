"""Term cases with other settings, made by the benchmarks' reference, through the checker.

The reference knows nothing of the package; projectors and losses are written out here.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden.check import TOLERANCE, check
from reference import ReferenceSiT, coefficients
from safetensors.torch import save_file
from torch import Tensor, nn

BATCH, CHANNELS, CLASSES = 4, 3, 7
SHAPE = {"depth": 5, "heads": 2, "hidden": 32, "input_size": 12, "patch": 2, "num_classes": CLASSES}
CASES: dict[str, dict[str, Any]] = {
    "repa, cosine path, two encoders": {
        "system": "repa",
        "path": "cosine",
        "weight": 0.7,
        "student_block": 3,
        "projector": "mlp3",
        "projector_dim": 24,
        "encoder_dims": [12, 20],
        "spatial_norm": "none",
        "qk_norm": True,
    },
    "irepa, 5×5, two encoders": {
        "system": "irepa",
        "path": "cosine",
        "weight": 1.5,
        "student_block": 1,
        "projector": "conv",
        "kernel": 5,
        "encoder_dims": [20, 6],
        "spatial_norm": "zscore",
    },
    "irepa, 1×1, last block": {
        "system": "irepa",
        "path": "linear",
        "weight": 0.25,
        "student_block": 5,
        "projector": "conv",
        "kernel": 1,
        "encoder_dims": [10],
        "spatial_norm": "zscore",
    },
    "layersync, cosine path, other blocks": {
        "system": "layersync",
        "path": "cosine",
        "weight": 0.05,
        "student_block": 1,
        "teacher_block": 4,
        "t_convention": "weights are SiT's",
    },
    "contrastive, cosine path": {
        "system": "contrastive-flow-matching",
        "path": "cosine",
        "weight": 0.3,
        "patch": 4,
    },
}


def _projector(meta: dict[str, Any], width: int) -> nn.Module:
    if meta["projector"] == "conv":
        return nn.Conv2d(meta["hidden"], width, meta["kernel"], padding=meta["kernel"] // 2)
    inner = meta["projector_dim"]
    return nn.Sequential(
        nn.Linear(meta["hidden"], inner),
        nn.SiLU(),
        nn.Linear(inner, inner),
        nn.SiLU(),
        nn.Linear(inner, width),
    )


def _project(projector: nn.Module, features: Tensor) -> Tensor:
    if not isinstance(projector, nn.Conv2d):
        return projector(features)
    side = int(features.shape[1] ** 0.5)
    grid = features.transpose(1, 2).reshape(len(features), -1, side, side)
    return projector(grid).flatten(2).transpose(1, 2)


def _record(meta: dict[str, Any], file: Path) -> None:
    """Write a case as the released implementations' were written."""
    generator = torch.Generator().manual_seed(0)
    side = meta["input_size"]
    model = ReferenceSiT(
        channels=CHANNELS,
        image_size=(side, side),
        patch_size=meta["patch"],
        hidden_size=meta["hidden"],
        depth=meta["depth"],
        heads=meta["heads"],
        num_classes=CLASSES,
        qk_norm=meta.get("qk_norm", False),
        projection_head=False,
    )
    dims = meta.get("encoder_dims", [])
    if dims:
        model.projectors = nn.ModuleList([_projector(meta, width) for width in dims])
    for tensor in model.state_dict().values():
        tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    x0, noise = (torch.randn(BATCH, CHANNELS, side, side, generator=generator) for _ in range(2))
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    timesteps = torch.rand(BATCH, 1, generator=generator)
    tokens = (side // meta["patch"]) ** 2
    tensors: dict[str, Tensor] = {
        "x0": x0,
        "noise": noise,
        "labels": labels,
        "timesteps": timesteps,
        **{f"student.{name}": value.clone() for name, value in model.state_dict().items()},
    }
    alpha, sigma, d_alpha, d_sigma = coefficients(timesteps[..., None, None], meta["path"])
    xt, target = alpha * x0 + sigma * noise, d_alpha * x0 + d_sigma * noise
    turned = "t_convention" in meta
    t = (1 - timesteps if turned else timesteps).expand(-1, tokens)
    whole = torch.zeros(BATCH, tokens, dtype=torch.long)

    def run(block: int) -> tuple[Tensor, Tensor]:
        out, features = model([xt], t, labels, whole, None, block)
        return -out if turned else out, features

    out, features = run(meta.get("student_block", 1))
    patches = out.reshape(BATCH, side // meta["patch"], -1, meta["patch"], meta["patch"], CHANNELS)
    velocity = torch.einsum("nhwpqc->nchpwq", patches).reshape(x0.shape)
    denoising = (velocity - target).square().mean(dim=(1, 2, 3))
    recorded = {"velocity": velocity, "denoising_loss": denoising}
    if meta["system"] == "contrastive-flow-matching":
        tensors["negatives"] = torch.arange(BATCH).roll(1)
        contrastive = (velocity - target[tensors["negatives"]]).square().mean(dim=(1, 2, 3))
        recorded["contrastive_loss"] = contrastive
        total = denoising.mean() - meta["weight"] * contrastive.mean()
    else:
        losses = []
        if dims:
            for index, (width, projector) in enumerate(zip(dims, model.projectors, strict=True)):
                z = torch.randn(BATCH, tokens, width, generator=generator)
                tensors[f"encoder.{index}"] = z
                if meta["spatial_norm"] == "zscore":
                    z = (z - z.mean(dim=1, keepdim=True)) / (z.std(dim=1, keepdim=True) + 1e-6)
                    recorded[f"normalised.{index}"] = z
                made = recorded[f"projected.{index}"] = _project(projector, features)
                losses.append(-(F.normalize(made, dim=2) * F.normalize(z, dim=2)).sum(2).mean())
        else:
            later = run(meta["teacher_block"])[1].detach()
            recorded |= {"student_features": features, "target_features": later}
            losses = [-(F.normalize(features, dim=2) * F.normalize(later, dim=2)).sum(2).mean()]
        alignment = torch.stack(losses).mean()
        recorded["alignment_loss"] = alignment[None]
        total = denoising.mean() + meta["weight"] * alignment
    total.backward()
    recorded["total"] = total[None]
    tensors |= {f"out.{name}": value.detach() for name, value in recorded.items()}
    tensors |= {f"grad.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    contents = {name: value.contiguous() for name, value in tensors.items()}
    save_file(contents, file, {"meta": json.dumps({**meta, "kind": "term"})})


@pytest.mark.parametrize("name", CASES)
def test_other_settings_through_the_checker(name: str, tmp_path: Path) -> None:
    file = tmp_path / "term.safetensors"
    _record({**SHAPE, **CASES[name]}, file)
    errors = dict(check(file))
    assert len(errors) > 40, "outputs, and the gradients of every weight"
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}
