"""Eq. 4 against an independent implementation: per token, in image order, with a dense mask."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from support import RECIPE_NAMES, float64_draw, resolved, small_model
from torch import Tensor
from torch.nn import functional

from selfalign import Objective, build_student, draw_views, make_generator
from selfalign.network import Output
from selfalign.tokens import group_sizes, patchify

# --- The oracle: plain functions of a state dict, nothing from the package ----------------------


def oracle_positions(hidden_size: int, rows: int, columns: int) -> Tensor:
    """DiT's get_2d_sincos_pos_embed, in which the column comes first."""
    quarter = hidden_size // 4
    features = []
    for row in range(rows):
        for column in range(columns):
            token = []
            for position in (column, row):
                angles = [position / 10_000 ** (i / quarter) for i in range(quarter)]
                token += [math.sin(angle) for angle in angles]
                token += [math.cos(angle) for angle in angles]
            features.append(token)
    return torch.tensor(features, dtype=torch.float64)


def oracle_layer_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def oracle_linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def oracle_forward(
    state: dict[str, Tensor],
    x: Tensor,
    t: Tensor,
    labels: Tensor,
    allowed: Tensor,
    heads: int,
) -> tuple[Tensor, list[Tensor]]:
    """SiT as its authors wrote it, but with a timestep per token and a dense attention mask.

    Args: x (B, C, H, W), t (B, N), labels (B,), allowed (B, N, N) as booleans.
    Returns: velocity (B, C, H, W) and the output of every block, (B, N, D).
    """
    kernel = state["x_embedder.proj.weight"]
    patch, channels = kernel.shape[-1], kernel.shape[1]
    embedded = functional.conv2d(x, kernel, state["x_embedder.proj.bias"], stride=patch)
    batch, width, rows, columns = embedded.shape
    h = embedded.flatten(2).transpose(1, 2) + oracle_positions(width, rows, columns)

    frequencies = torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float64) / 128)
    angles = t[..., None] * frequencies
    c = torch.cat([angles.cos(), angles.sin()], -1)
    c = oracle_linear(
        state, "t_embedder.mlp.2", functional.silu(oracle_linear(state, "t_embedder.mlp.0", c))
    )
    if "y_embedder.embedding_table.weight" in state:
        c = c + state["y_embedder.embedding_table.weight"][labels][:, None]
    c = functional.silu(c)

    outputs = []
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    for i in range(depth):
        name = f"blocks.{i}"
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = oracle_linear(
            state, f"{name}.adaLN_modulation.1", c
        ).chunk(6, -1)
        y = oracle_layer_norm(h) * (1 + scale_a) + shift_a
        qkv = oracle_linear(state, f"{name}.attn.qkv", y)
        q, k, v = qkv.reshape(batch, -1, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(width // heads)
        weights = scores.masked_fill(~allowed[:, None], -math.inf).softmax(-1)
        y = (weights @ v).transpose(1, 2).reshape(batch, -1, width)
        h = h + gate_a * oracle_linear(state, f"{name}.attn.proj", y)
        y = oracle_layer_norm(h) * (1 + scale_m) + shift_m
        y = oracle_linear(state, f"{name}.mlp.fc1", y)
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        h = h + gate_m * oracle_linear(state, f"{name}.mlp.fc2", y)
        outputs.append(h)

    shift, scale = oracle_linear(state, "final_layer.adaLN_modulation.1", c).chunk(2, -1)
    y = oracle_layer_norm(h) * (1 + scale) + shift
    y = oracle_linear(state, "final_layer.linear", y).reshape(
        batch, rows, columns, patch, patch, channels
    )
    return torch.einsum("bhwpqc->bchpwq", y).reshape(x.shape), outputs


def oracle_objective(config, student, teacher, x0, labels, draw, heads):
    """(total, denoising per sample, alignment) of one batch, in image order."""
    batch, _, height, width = x0.shape
    patch = config.model.patch_size
    rows, columns = height // patch, width // patch
    sizes = group_sizes(config.views.mask_ratios, rows * columns)
    whole = round(config.views.whole_image_fraction * batch)

    group = torch.zeros(batch, rows * columns, dtype=torch.long)
    for b in range(batch if draw.order is not None else 0):
        start = 0
        for k, size in enumerate(sizes):
            group[b, draw.order[b, start : start + size]] = k
            start += size
    group[:whole] = 1  # whole images carry the second group's timestep on every token
    everything = torch.ones(batch, rows * columns, rows * columns, dtype=torch.bool)
    block_diagonal = group[:, :, None] == group[:, None, :]
    mask = block_diagonal if config.views.attention == "separated" else everything

    def noised(t):
        pixels = t.reshape(batch, 1, rows, columns)
        pixels = pixels.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
        if config.flow.path == "linear":
            return (1 - pixels) * x0 + pixels * draw.noise, draw.noise - x0
        angle = math.pi / 2 * pixels
        speed = math.pi / 2 * (angle.cos() * draw.noise - angle.sin() * x0)
        return angle.cos() * x0 + angle.sin() * draw.noise, speed

    t = draw.timesteps.gather(1, group)
    xt, target = noised(t)
    seen = torch.where(draw.label_dropout, config.model.num_classes, labels)
    velocity, outputs = oracle_forward(student, xt, t, seen, mask, heads)
    denoising = (velocity - target).square().mean((1, 2, 3))
    alignment, ema = config.terms["alignment"], config.targets["ema"]
    if alignment.target == "none":
        return denoising.mean(), denoising, None

    if ema.timestep == "below":
        # A teacher without groups sees the whole image at one timestep, the first one drawn.
        teacher_group = group if ema.groups else torch.zeros_like(group)
        t = (draw.timesteps - draw.teacher_interval).clamp(0, 1).gather(1, teacher_group)
    elif ema.timestep == "minimum":
        t = draw.timesteps.min(1, keepdim=True).values.expand_as(t)
    with torch.no_grad():
        _, targets = oracle_forward(
            teacher,
            noised(t)[0],
            t,
            seen if ema.labels == "dropped" else labels,
            mask if ema.groups else everything,
            heads,
        )
    h = oracle_linear(student, "ap_head.linear1", outputs[alignment.block - 1])
    a, b = (
        oracle_linear(student, "ap_head.linear2", functional.silu(h)),
        targets[ema.block - 1],
    )
    difference = (a - b).abs()
    if alignment.distance.startswith("cosine"):
        dim = 2 if alignment.distance == "cosine" else 1
        cosine = (a * b).sum(dim) / (a.square().sum(dim) * b.square().sum(dim)).sqrt()
        distance = 1 - cosine.mean()
    elif alignment.distance == "smooth-l1":
        small = difference.square() / 0.1
        distance = torch.where(difference < 0.05, small, difference - 0.025).mean()
    else:
        distance = (difference if alignment.distance == "l1" else difference.square()).mean()
    return denoising.mean() + alignment.weight * distance, denoising, distance


# --- The package against it ---------------------------------------------------------------------

BLOCKS = {"terms.alignment.block": 1, "targets.ema.block": 2}
POINTS = [
    *((name, {}) for name in RECIPE_NAMES),
    *(("sra-dts-as", {"alignment.distance": d}) for d in ("cosine-over-tokens", "smooth-l1", "l1")),
    ("sra", {"terms.alignment.distance": "l2", "terms.alignment.weight": 2.0}),
    ("sra-dts-as", {"views.whole_image_fraction": 0.5}),
    ("sra-as", {"views.whole_image_fraction": 0.25, "flow.path": "cosine"}),
    ("sra-dts", {"views.whole_image_fraction": 1.0}),
    ("sra-dts-as", {"views.whole_image_fraction": 1.0}),
    ("sra-dts-as", {"views.mask_ratios": (0.2, 0.5, 0.3)}),
    ("sra-dts-as", {"views.mask_ratios": (1.0,) * 6, "flow.path": "cosine"}),
    ("sra-dts-as", {"targets.ema.timestep": "same"}),
    ("sra-dts-as", {"targets.ema.timestep": "minimum"}),
    ("sra-dts-as", {"alignment.teacher_timestep": "self-flow", "alignment.teacher_groups": False}),
    ("sra-as", {"alignment.teacher_groups": False}),
    ("self-flow", {"alignment.teacher_labels": "dropped", "flow.path": "cosine"}),
    ("sra", {"alignment.teacher_labels": "dropped"}),
    ("sra-dts-as", {"alignment.student_block": 3, "alignment.teacher_block": 3}),
    ("sra", {"terms.alignment.block": 3, "targets.ema.block": 1}),
    ("sra-dts-as", {"model.size": "tiny/2"}),
    ("sra-dts-as", {"model.num_classes": 0}),
]


@pytest.mark.parametrize(("name", "changes"), POINTS, ids=str)
def test_losses_and_gradients_are_the_oracles(name, changes):
    changes = {**BLOCKS, "views.class_dropout": 0.5, **changes}
    config = resolved(name, changes, channels=2, image_size=(4, 6))
    settings = {
        "patch_size": config.model.patch_size,
        "num_classes": config.model.num_classes,
        "head_after": config.terms["alignment"].block,
    }
    student, teacher = small_model(0, **settings), small_model(1, **settings)
    draw = float64_draw(config, (4, 2, 4, 6), seed=2)
    assert 0 < draw.label_dropout.sum() < 4
    x0 = torch.randn(4, 2, 4, 6, dtype=torch.float64, generator=make_generator(0, "x0"))
    labels = torch.tensor([0, 4, 2, 1])

    losses = Objective(config)(student, teacher, x0, labels, draw)
    losses.total.backward()

    weights = {k: v.detach().clone().requires_grad_() for k, v in student.named_parameters()}
    frozen = {k: v.detach() for k, v in teacher.named_parameters()}
    total, denoising, alignment = oracle_objective(
        config, weights, frozen, x0, labels, draw, heads=3
    )
    total.backward()

    # Positions and frequencies are float32 constants in the model: hence not 1e-12.
    assert torch.allclose(losses.terms["denoising"], denoising, rtol=1e-6)
    assert ("alignment" in losses.terms) == (alignment is not None)
    if alignment is not None:
        assert torch.allclose(losses.terms["alignment"], alignment, rtol=1e-6, atol=1e-9)
    assert torch.allclose(losses.total, total, rtol=1e-6)
    scale = max(w.grad.abs().max() for w in weights.values() if w.grad is not None)
    for parameter_name, parameter in student.named_parameters():
        expected = weights[parameter_name].grad
        found = parameter.grad
        if expected is None:
            assert found is None or not found.any(), parameter_name
        else:
            assert (found - expected).abs().max() < 2e-6 * scale, parameter_name


def setup(name, changes=None, batch=4, **data):
    """A resolved config, student, teacher, images, labels and a draw."""
    config = resolved(name, changes, **data)
    student = build_student(config)
    height, width = config.model.image_size
    shape = (batch, config.model.channels, height, width)
    x0 = torch.randn(shape, generator=make_generator(0, "x0"))
    labels = torch.arange(batch) % max(1, config.model.num_classes)
    draw = draw_views(config, shape, make_generator(0, "draw"))
    return config, student, copy.deepcopy(student), x0, labels, draw


SHAPES = [
    {"channels": 1, "image_size": (8, 8)},
    {"channels": 3, "image_size": (4, 6), "num_classes": 1},
    {"channels": 4, "image_size": (8, 4), "num_classes": 0},
    {"patch": 2, "channels": 4, "image_size": (12, 8)},
    {"patch": 2, "channels": 1, "image_size": (8, 8), "qk_norm": True},
    {"patch": 4, "channels": 3, "image_size": (16, 24), "checkpointing": True},
    {"patch": 8, "channels": 3, "image_size": (16, 24), "num_classes": 0, "qk_norm": True},
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: ",".join(f"{k}={v}" for k, v in s.items()))
@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_trains_a_step_with_finite_gradients(name, shape):
    shape = dict(shape)
    changes = {
        "model.size": f"tiny/{shape.pop('patch', 1)}",
        "model.qk_norm": shape.pop("qk_norm", False),
        "model.gradient_checkpointing": shape.pop("checkpointing", False),
    }
    config, student, teacher, x0, labels, draw = setup(name, changes, **shape)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0)
    objective = Objective(config)
    before = objective(student, teacher, x0, labels, draw)
    assert before.terms["denoising"].shape == (4,)
    expected = before.terms["denoising"].mean()
    if name != "sit":
        expected = expected + config.terms["alignment"].weight * before.terms["alignment"]
    assert torch.allclose(before.total, expected)
    before.total.backward()
    for parameter_name, parameter in student.named_parameters():
        assert parameter.grad is not None, parameter_name  # or DDP would wait for it
        assert parameter.grad.isfinite().all(), parameter_name
    assert all(parameter.grad is None for parameter in teacher.parameters())
    optimizer.step()
    for _ in range(2):
        optimizer.zero_grad()
        objective(student, teacher, x0, labels, draw).total.backward()
        optimizer.step()
    after = objective(student, teacher, x0, labels, draw)
    assert after.total < before.total


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_is_pure_given_the_draw(name):
    config, student, teacher, x0, labels, draw = setup(name)
    objective = Objective(config)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = objective(student, teacher, x0, labels, draw)
    assert torch.equal(torch.get_rng_state(), state)
    again = objective(student, teacher, x0, labels, draw)
    assert torch.equal(first.total, again.total)
    assert first.terms.keys() == again.terms.keys()
    for term, value in first.terms.items():
        assert torch.equal(value, again.terms[term])


def test_sit_needs_no_teacher_and_no_head():
    config, student, _, x0, labels, draw = setup("sit")
    assert not student.head_taps and not hasattr(student, "ap_head")
    losses = Objective(config)(student, None, x0, labels, draw)
    assert losses.terms.keys() == {"denoising"}
    assert torch.equal(losses.total, losses.terms["denoising"].mean())


def test_a_wrapped_student_is_called_through_its_wrapper():
    config, student, teacher, x0, labels, draw = setup("sra-dts-as")
    calls = []

    def wrapper(*arguments):  # as DistributedDataParallel and torch.compile wrap a model
        calls.append(arguments)
        return student(*arguments)

    losses = Objective(config)(wrapper, teacher, x0, labels, draw)
    assert len(calls) == 1
    assert torch.equal(losses.total, Objective(config)(student, teacher, x0, labels, draw).total)


class TestLabels:
    """The student sees dropped labels; the teacher what the config says."""

    def run(self, teacher_labels, dropout, labels, num_classes=5):
        config = resolved(
            "sra",
            {**BLOCKS, "targets.ema.labels": teacher_labels},
            channels=2,
            image_size=(4, 6),
            num_classes=num_classes,
        )
        draw = replace(float64_draw(config, (3, 2, 4, 6)), label_dropout=torch.tensor(dropout))
        x0 = torch.ones(3, 2, 4, 6, dtype=torch.float64)
        forward = Objective(config).predict(
            small_model(0, head_after=1), small_model(1), x0, torch.tensor(labels), draw
        )
        return forward.output.velocity, forward.output.projected["ap_head"], forward.targets["ema"]

    @pytest.mark.parametrize("teacher_labels", ["dropped", "undropped"])
    def test_a_dropped_label_is_the_null_class_to_the_student(self, teacher_labels):
        velocity, features, _ = self.run(teacher_labels, [True, False, False], [0, 1, 2])
        null, null_features, _ = self.run(teacher_labels, [False, False, False], [5, 1, 2])
        assert torch.equal(velocity, null)
        assert torch.equal(features, null_features)
        given, _, _ = self.run(teacher_labels, [False, False, False], [0, 1, 2])
        assert not torch.allclose(velocity[0], given[0])
        assert torch.equal(velocity[1:], given[1:])

    def test_the_teacher_sees_every_label_when_undropped(self):
        _, _, dropped = self.run("undropped", [True, True, True], [0, 1, 2])
        _, _, given = self.run("undropped", [False, False, False], [0, 1, 2])
        assert torch.equal(dropped, given)

    def test_the_teacher_sees_the_students_labels_when_dropped(self):
        _, _, dropped = self.run("dropped", [True, False, True], [0, 1, 2])
        _, _, null = self.run("dropped", [False, False, False], [5, 1, 5])
        _, _, given = self.run("dropped", [False, False, False], [0, 1, 2])
        assert torch.equal(dropped, null)
        assert not torch.allclose(dropped[0], given[0])


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for checkpointing in (False, True):
        config = resolved("sra-dts-as", BLOCKS, channels=2, image_size=(4, 6))
        student = small_model(0, gradient_checkpointing=checkpointing, head_after=1)
        draw = float64_draw(config, (3, 2, 4, 6))
        x0 = torch.ones(3, 2, 4, 6, dtype=torch.float64)
        losses = Objective(config)(student, small_model(1), x0, torch.tensor([0, 1, 2]), draw)
        losses.total.backward()
        gradients.append([losses.total, *(p.grad for p in student.parameters())])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_a_perfect_student_has_no_denoising_loss():
    config = resolved("sit")
    x0 = torch.randn(3, 1, 8, 8)
    draw = draw_views(config, x0.shape, make_generator(0, "draw"))

    def perfect(*arguments):
        return Output(patchify(draw.noise - x0, 1), {}, {})

    losses = Objective(config)(perfect, None, x0, torch.zeros(3, dtype=torch.long), draw)
    assert losses.total == 0


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_predictions_restore_to_image_order(name):
    config, student, teacher, x0, labels, draw = setup(name)
    views = Objective(config).predict(student, teacher, x0, labels, draw).views
    target = views.groups.restore(views.target)
    assert torch.allclose(target, (draw.noise - x0).flatten(2).transpose(1, 2))
