"""The method as research code writes it: the other side of the benchmarks, and an oracle of the tests.

Conditions go through every adaLN layer per token, attention is softmax(QKᵀ + mask)V written out with a
dense boolean mask, the teacher runs all its blocks, EMA is a loop over parameters. Parameter names are
DiT's and SiT's, so that weights load into either side.
"""

import itertools
import math
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
        angles = t[:, None].float() * frequencies.to(t.device)[None]
        return self.mlp(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = (self.q_norm(q) @ self.k_norm(k).transpose(-2, -1)) * self.scale
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)
        out = scores.softmax(dim=-1) @ v
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor, mask: Tensor | None) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, -1)
        x = x + gate_a * self.attn(modulate(self.norm1(x), shift_a, scale_a), mask)
        return x + gate_m * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class Head(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.silu(self.linear1(x)))


class Embedder(nn.Module):
    def __init__(self, patch: int, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class LabelEmbedder(nn.Module):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class ReferenceSiT(nn.Module):
    """SiT with a timestep per token."""

    def __init__(
        self,
        *,
        channels: int,
        image_size: tuple[int, int],
        patch_size: int,
        hidden_size: int,
        depth: int,
        heads: int,
        num_classes: int,
        qk_norm: bool = False,
        projection_head: bool = True,
    ) -> None:
        super().__init__()
        self.patch_size, self.channels, self.image_size = patch_size, channels, image_size
        self.x_embedder = Embedder(patch_size, channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes + 1, hidden_size)
        tokens = image_size[0] * image_size[1] // patch_size**2
        self.register_buffer("pos_embed", torch.zeros(1, tokens, hidden_size))
        self.blocks = nn.ModuleList([Block(hidden_size, heads, qk_norm) for _ in range(depth)])
        if projection_head:
            self.ap_head = Head(hidden_size)
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * channels)

    def forward(
        self,
        images: list[Tensor],
        t: Tensor,
        y: Tensor,
        group_ids: Tensor,
        mask: Tensor | None,
        block: int,
    ) -> tuple[Tensor, Tensor]:
        """One noised image per group, mixed by token; t is (B, N). Returns tokens and features."""
        tokens = [self.x_embedder(image) + self.pos_embed for image in images]
        x = mix(tokens, group_ids)
        batch, count, _width = x.shape
        t_embed = self.t_embedder(t.reshape(-1)).reshape(batch, count, -1)
        c = t_embed + self.y_embedder(y).unsqueeze(1).expand(-1, count, -1)
        features = x
        for index, layer in enumerate(self.blocks):
            x = layer(x, c, mask)
            if index + 1 == block:
                features = x
        return self.final_layer(x, c), features

    def velocity(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Whole images at one timestep each, conditioned per token all the same."""
        tokens = self.pos_embed.shape[1]
        group_ids = torch.zeros(len(x), tokens, dtype=torch.long, device=x.device)
        out, _ = self([x], t[:, None].expand(-1, tokens), y, group_ids, None, 0)
        return unpatchify(out, self.patch_size, self.image_size)


def mix(values: list[Tensor], group_ids: Tensor) -> Tensor:
    """Token by token, the value of the token's group."""
    mixed = values[0]
    for group, value in enumerate(values[1:], start=1):
        mixed = torch.where((group_ids == group)[..., None], value, mixed)
    return mixed


def patchify(x: Tensor, p: int) -> Tensor:
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // p, p, width // p, p)
    return torch.einsum("nchpwq->nhwpqc", x).reshape(batch, -1, p * p * channels)


def unpatchify(x: Tensor, p: int, image_size: tuple[int, int]) -> Tensor:
    height, width = image_size
    x = x.reshape(len(x), height // p, width // p, p, p, -1)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), -1, height, width)


def coefficients(t: Tensor, path: str) -> tuple[Tensor, Tensor, Tensor | float, Tensor | float]:
    if path == "linear":
        return 1 - t, t, -1.0, 1.0
    half = math.pi / 2
    return (
        torch.cos(t * half),
        torch.sin(t * half),
        -half * torch.sin(t * half),
        half * torch.cos(t * half),
    )


def align(a: Tensor, b: Tensor, distance: str) -> Tensor:
    if distance == "cosine":
        return (1 - F.cosine_similarity(a, b, dim=-1)).mean()
    if distance == "cosine-over-tokens":
        return (1 - F.cosine_similarity(a, b)).mean()
    if distance == "smooth-l1":
        return F.smooth_l1_loss(a, b, beta=0.05)
    return F.l1_loss(a, b) if distance == "l1" else F.mse_loss(a, b)


def reference_losses(
    student: ReferenceSiT,
    teacher: ReferenceSiT,
    x0: Tensor,
    labels: Tensor,
    *,
    noise: Tensor,
    timesteps: Tensor,
    teacher_interval: Tensor,
    group_ids: Tensor,
    teacher_labels: Tensor,
    method: dict[str, Any],
) -> dict[str, Tensor]:
    """Losses and what they are made of, in image order.

    Args:
        student, teacher: models.
        x0, labels: the batch; labels as the student sees them.
        noise: epsilon.
        timesteps, teacher_interval: (B, K).
        group_ids: (B, N); whole images carry one group's number throughout.
        teacher_labels: labels as the teacher sees them.
        method: path, separate, teacher_timestep, teacher_groups, student_block, teacher_block,
            distance, weight.
    """
    groups = timesteps.shape[1]
    same = group_ids[:, :, None] == group_ids[:, None, :]

    def noised(t: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        images, targets = [], []
        for k in range(groups):
            alpha, sigma, d_alpha, d_sigma = coefficients(t[:, k, None, None, None], method["path"])
            images.append(alpha * x0 + sigma * noise)
            targets.append(d_alpha * x0 + d_sigma * noise)
        return images, targets

    images, targets = noised(timesteps)
    velocity, features = student(
        images,
        timesteps.gather(1, group_ids),
        labels,
        group_ids,
        same if method["separate"] else None,
        method["student_block"],
    )
    target = mix([patchify(t, student.patch_size) for t in targets], group_ids)
    denoising = ((velocity - target) ** 2).mean(dim=(1, 2))

    if method["teacher_timestep"] == "below":
        below = (timesteps - teacher_interval).clamp(0, 1)
    elif method["teacher_timestep"] == "minimum":
        below = timesteps.min(dim=1, keepdim=True).values.expand(-1, groups)
    else:
        below = timesteps
    separate = method["separate"] and method["teacher_groups"]
    with torch.no_grad():
        _, teacher_features = teacher(
            noised(below)[0],
            below.gather(1, group_ids),
            teacher_labels,
            group_ids,
            same if separate else None,
            method["teacher_block"],
        )
    student_features = student.ap_head(features)
    alignment = align(student_features, teacher_features, method["distance"])
    return {
        "velocity": velocity,
        "target": target,
        "student_features": student_features,
        "teacher_features": teacher_features,
        "denoising": denoising,
        "alignment": alignment,
        "total": denoising.mean() + method["weight"] * alignment,
    }


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """A loop over parameters."""
    averages = OrderedDict(ema.named_parameters())
    for name, parameter in model.named_parameters():
        averages[name].mul_(decay).add_(parameter.data, alpha=1 - decay)


@torch.no_grad()
def reference_sde(
    model: ReferenceSiT,
    noise: Tensor,
    labels: Tensor,
    null_label: int,
    steps: int,
    scale: float,
    interval: tuple[float, float],
    step_noise: Any,
) -> Tensor:
    """Euler–Maruyama with guidance in an interval, on the linear path."""
    times = [*torch.linspace(1, 0.04, steps, dtype=torch.float64).tolist(), 0.0]
    x = noise.double()
    nulls = torch.full_like(labels, null_label)
    for step, (t, t_next) in enumerate(itertools.pairwise(times)):
        guided = scale > 1 and interval[0] <= t <= interval[1]
        model_in = torch.cat([x, x]) if guided else x
        y = torch.cat([labels, nulls]) if guided else labels
        time = torch.full((len(model_in),), t, dtype=torch.float32, device=x.device)
        v = model.velocity(model_in.float(), time, y).double()
        ratio = (1 - t) / -1.0
        score = (ratio * v - model_in) / (t**2 - ratio * t)
        drift = v - t * score
        if guided:
            conditional, unconditional = drift.chunk(2)
            drift = unconditional + scale * (conditional - unconditional)
        x_next = x + (t_next - t) * drift
        if step < steps - 1:
            x_next = x_next + math.sqrt(2 * t) * math.sqrt(t - t_next) * step_noise(step)
        x = x_next
    return x
