"""Targets beside the EMA teacher: what they are made of, in group order, and what is not run for them."""

import dataclasses
import math
from typing import ClassVar

import pytest
import torch
from support import float64_draw, resolved, small_model
from torch.nn import functional

from selfalign import Objective, TokenGrid, UserError, build_student, load_plugin
from selfalign.network import EARLY_VELOCITY
from selfalign.objective import Pass
from selfalign.targets.encoder_attention import RunningAttention
from selfalign.targets.frozen_encoder import RunningEncoders, over_tokens
from selfalign.targets.frozen_run import FrozenRun, FrozenRunTarget
from selfalign.terms.alignment import distance, normalised
from selfalign.views import make_views
from selfalign.vision import open_encoder

SHAPE = (3, 2, 4, 6)
VIEWS = {
    "single": {},
    "both": {
        "views.timesteps": "independent",
        "views.attention": "separated",
        "views.mask_ratios": (0.25, 0.75),
        "views.whole_image_fraction": 0.34,
    },
}
"""One timestep and full attention, and both of the paper's switches with a whole image."""


def step_of(changes, views="both", stored=None, **settings):
    """A step of a small model in float64: its pass and its losses."""
    config = resolved("sit", {**VIEWS[views], **changes}, channels=2, image_size=SHAPE[2:])
    student = small_model(0, head_after=None, **settings)
    for term in config.used_terms().values():
        for name, (tap, head) in term.heads(config, student).items():
            student.add_head(name, head.double(), tap)
    x0, labels = torch.randn(SHAPE, dtype=torch.float64), torch.tensor([0, 3, 4])
    objective = Objective(config)
    draw = float64_draw(config, SHAPE)
    forward = objective.predict(student, None, x0, labels, draw, stored=stored)
    return student, objective, forward, objective.losses(forward)


@pytest.mark.parametrize("views", VIEWS)
class TestSamePass:
    CHANGES: ClassVar = {
        "terms.alignment.target": "same-pass",
        "terms.alignment.projector": "none",
        "terms.alignment.block": 1,
        "targets.same-pass.block": 3,
    }

    def test_is_the_cosine_of_two_blocks_without_a_gradient_at_the_second(self, views):
        student, _, forward, losses = step_of(self.CHANGES, views)
        view = forward.views.student
        arguments = (view.tokens, view.timesteps, forward.seen, view.groups)
        features = student(*arguments, taps=(1, 3)).features
        expected = distance("cosine", features[1], features[3].detach())
        assert torch.allclose(losses.terms["alignment"], expected)
        (losses.terms["alignment"]).backward()
        assert student.blocks[0].attn.qkv.weight.grad.any()
        assert student.blocks[2].attn.qkv.weight.grad is None

    def test_runs_every_block_once(self, views):
        config = resolved("sit", {**VIEWS[views], **self.CHANGES}, channels=2, image_size=SHAPE[2:])
        student, ran = small_model(0, head_after=None), []
        for number, block in enumerate(student.blocks, 1):
            block.register_forward_hook(lambda *_, number=number: ran.append(number))
        x0, labels = torch.randn(SHAPE, dtype=torch.float64), torch.tensor([0, 3, 4])
        Objective(config)(student, None, x0, labels, float64_draw(config, SHAPE))
        assert ran == [1, 2, 3]


@pytest.mark.parametrize("views", VIEWS)
def test_latents_are_the_clean_patches(views):
    changes = {"terms.alignment.target": "latent", "terms.alignment.distance": "smooth-l1"}
    _, _, forward, losses = step_of({**changes, "terms.alignment.block": 2}, views)
    clean = forward.views.groups.restore(forward.targets["latent"])
    assert torch.equal(clean, forward.config.grid.patchify(forward.x0))
    projected = forward.output.projected["ap_head"]
    assert projected.shape == forward.targets["latent"].shape == (3, 24, 2)
    expected = functional.smooth_l1_loss(projected, forward.targets["latent"], beta=0.05)
    assert torch.allclose(losses.terms["alignment"], expected)


class TestFrozenEncoder:
    WORDS = ("timm:a", "timm:b")
    CHANGES: ClassVar = {
        "terms.alignment.target": "frozen-encoder",
        "terms.alignment.projector": "conv",
        "terms.alignment.spatial_norm": "zscore",
        "terms.alignment.block": 2,
        "targets.frozen-encoder.encoders": WORDS,
        "targets.frozen-encoder.widths": (5, 7),
    }

    def stored(self, shape=SHAPE[2:]):
        return {
            word: torch.randn(3, *shape, width, dtype=torch.float64)
            for word, width in zip(self.WORDS, (5, 7), strict=True)
        }

    @pytest.mark.parametrize("views", VIEWS)
    def test_is_the_mean_over_encoders_token_by_token(self, views):
        stored = self.stored()
        student, _, forward, losses = step_of(self.CHANGES, views, stored)
        view, groups = forward.views.student, forward.views.groups
        features = student(view.tokens, view.timesteps, forward.seen, groups, taps=(2,)).features[2]
        image = groups.restore(features).transpose(1, 2).unflatten(2, SHAPE[2:])
        expected = 0.0
        for head, raw in zip(student.projectors, stored.values(), strict=True):
            projected = functional.conv2d(image, head.weight, head.bias, padding=1)
            target = raw.flatten(1, 2)
            target = (target - target.mean(1, keepdim=True)) / (target.std(1, keepdim=True) + 1e-6)
            projected = projected.flatten(2).transpose(1, 2)
            expected += 1 - functional.cosine_similarity(projected, target, dim=2).mean()
        assert torch.allclose(losses.terms["alignment"], expected / 2)

    def test_another_grid_is_interpolated(self):
        features = torch.randn(2, 8, 12, 5)
        grid = TokenGrid((4, 6), 1)
        assert torch.equal(over_tokens(torch.ones(2, 3, 3, 5), grid), torch.ones(2, 24, 5))
        down = over_tokens(features, grid).unflatten(1, (4, 6)).permute(0, 3, 1, 2)
        expected = functional.interpolate(
            features.permute(0, 3, 1, 2), (4, 6), mode="bilinear", antialias=True
        )
        torch.testing.assert_close(down, expected)
        same = torch.randn(2, 4, 6, 5)
        assert torch.equal(over_tokens(same, grid), same.flatten(1, 2))

    def test_zscore_is_per_sample_and_feature(self):
        features = torch.randn(3, 24, 5, dtype=torch.float64) * 7 + 3
        found = normalised("zscore", features)
        assert torch.allclose(found.mean(1), torch.zeros(3, 5, dtype=torch.float64), atol=1e-12)
        assert torch.allclose(found.std(1), torch.ones(3, 5, dtype=torch.float64), atol=1e-5)
        assert normalised("none", features) is features
        assert normalised("zscore", torch.ones(1, 4, 2)).abs().max() == 0

    def test_features_that_do_not_come_are_asked_for(self):
        with pytest.raises(UserError, match="features must come with the batch"):
            step_of(self.CHANGES)

    @pytest.mark.usefixtures("forget_parts")
    def test_an_encoder_that_runs_along_sees_the_clean_image(self):
        from pathlib import Path

        load_plugin(str(Path(__file__).parent.parent / "small_encoder.py"))
        changes = {
            "terms.alignment.target": "frozen-encoder",
            "targets.frozen-encoder.encoders": ("small@16",),
            "targets.frozen-encoder.widths": (6,),
            "targets.frozen-encoder.when": "every-step",
            **VIEWS["both"],
        }
        config = resolved("sit", changes, channels=3, image_size=(16, 16))
        target = config.targets["frozen-encoder"].build(config)
        assert isinstance(target, RunningEncoders)
        student = build_student(config)
        x0, labels = torch.randn(3, 3, 16, 16).clamp(-1, 1), torch.tensor([0, 3, 4])
        draw = dataclasses.replace(float64_draw(config, x0.shape))
        draw = dataclasses.replace(
            draw,
            **{n: getattr(draw, n).float() for n in ("noise", "timesteps", "teacher_interval")},
        )
        forward = Objective(config).predict(student, None, x0, labels, draw)
        expected = over_tokens(open_encoder("small@16", 16)((x0 + 1) / 2), config.grid)
        found = forward.views.groups.restore(forward.targets["frozen-encoder"])
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"encoders": ()}, ["encoders", "one or more"]),
            ({"encoders": ("timm:a", "timm:a"), "widths": ()}, ["encoders", "twice"]),
            ({"encoders": ("nothing",), "widths": ()}, ["encoders", "'nothing'", "repa", "timm"]),
            ({"widths": (5,)}, ["widths", "2 encoders"]),
            ({"widths": (5, 0)}, ["widths", "from 1"]),
            ({"when": "never"}, ["when", "auto, once, every-step"]),
        ],
    )
    def test_refused(self, changes, words):
        settings = {f"targets.frozen-encoder.{name}": value for name, value in changes.items()}
        with pytest.raises(UserError) as error:
            resolved("sit", {**self.CHANGES, **settings})
        assert [
            word for word in ["targets.frozen-encoder", *words] if word not in str(error.value)
        ] == []

    def test_signals_have_no_encoders(self):
        with pytest.raises(UserError, match="encoders see images, and the data has 1 axes"):
            resolved("sit", {**self.CHANGES, "model.image_size": (8,)}, image_size=(8,))


class TestAttention:
    CHANGES: ClassVar = {
        "objective.terms": ("attention-distillation",),
        "terms.attention-distillation.blocks": (2, 3),
        "targets.encoder-attention.blocks": (1, 2),
        "targets.encoder-attention.encoder": "timm:a",
        "targets.encoder-attention.heads": 2,
    }

    @pytest.mark.parametrize("views", VIEWS)
    @pytest.mark.parametrize("qk_norm", [False, True])
    def test_is_the_cross_entropy_of_the_attention_that_is_made(self, views, qk_norm, monkeypatch):
        encoder = torch.randn(3, 24, 2, 2, 2, 5, dtype=torch.float64)  # blocks, q and k, heads, d

        class Given:
            def taps(self, config):
                return ()

            def features(self, forward):
                return forward.views.groups.sort(encoder.flatten(2))

        target = type(resolved("sit", self.CHANGES).targets["encoder-attention"])
        monkeypatch.setattr(target, "build", lambda self, config: Given())
        changes = {**self.CHANGES, "model.qk_norm": qk_norm}
        student, _, forward, losses = step_of(changes, views, qk_norm=qk_norm)
        groups = forward.views.groups
        order = torch.arange(24).expand(3, -1) if groups.order is None else groups.order
        group = torch.zeros(3, 24, dtype=torch.long)
        if groups.separate:
            start = groups.sizes[0]
            group.scatter_(1, order[:, start:], 1)
            group[: groups.whole] = 0
        may_see = group[:, None, :, None] == group[:, None, None, :]
        expected = 0.0
        for place, block in enumerate((2, 3)):
            qkv = groups.restore(forward.output.features[f"blocks.{block - 1}.attn.normed"])
            q, k, _ = qkv.unflatten(2, (3, 3, 8)).permute(2, 0, 3, 1, 4)
            logits = (q @ k.transpose(2, 3) / math.sqrt(8))[:, :2]
            p, s = encoder[:, :, place].permute(2, 0, 3, 1, 4)
            teacher = p @ s.transpose(2, 3) / math.sqrt(5)
            log_student = logits.masked_fill(~may_see, -math.inf).log_softmax(-1)
            attention = teacher.masked_fill(~may_see, -math.inf).softmax(-1)
            expected -= (attention * log_student.masked_fill(~may_see, 0)).sum(-1).mean() / 2
        assert losses.terms["attention-distillation"].item() == pytest.approx(
            expected.item(), abs=1e-5
        )
        losses.total.backward()
        assert student.blocks[1].attn.qkv.weight.grad.any()

    def test_blocks_left_out_end_at_the_alignments(self):
        config = resolved("haste", {"terms.alignment.block": 5})
        pairs = config.terms["attention-distillation"].pairs(config)
        assert pairs == ((2, 0), (3, 1), (4, 2), (5, 3))
        config = resolved("haste", {"terms.alignment.block": 2})
        assert config.terms["attention-distillation"].pairs(config) == ((1, 2), (2, 3))
        config = resolved(
            "haste",
            {"model.size": "XL/2", "model.image_size": (32, 32)},
            image_size=(32, 32),
            channels=4,
        )
        student = [block for block, _ in config.terms["attention-distillation"].pairs(config)]
        assert student == [5, 6, 7, 8] and config.targets["encoder-attention"].blocks == (
            8,
            9,
            10,
            11,
        )

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"terms.attention-distillation.blocks": (1,)}, ["blocks", "allowed are 2"]),
            ({"terms.attention-distillation.blocks": (1, 7)}, ["blocks", "1 to 6"]),
            ({"targets.encoder-attention.blocks": (0, 1)}, ["blocks", "from 1"]),
            ({"targets.encoder-attention.encoder": "nothing"}, ["encoder", "nothing"]),
            ({"model.backbone": "mlp"}, ["backbone", "mlp"]),
        ],
    )
    def test_refused(self, changes, words):
        with pytest.raises(UserError) as error:
            resolved("sit", {**self.CHANGES, **changes})
        assert [word for word in words if word not in str(error.value)] == []

    def test_the_place_of_what_attends_changes_no_weights(self):
        names = small_model(head_after=None).state_dict()
        assert not [name for name in names if "normed" in name]
        assert RunningAttention.taps(None, None) == ()


class TestFrozenRun:
    @pytest.mark.parametrize("views", VIEWS)
    @pytest.mark.parametrize("guidance", [1.0, 3.0])
    @pytest.mark.parametrize("whole", [False, True])
    def test_sees_what_the_student_sees(self, views, guidance, whole):
        teacher = small_model(5, head_after=None)
        settings = FrozenRunTarget(run="x", block=2, guidance=guidance, whole=whole, width=24)
        changes = {"terms.alignment.target": "latent", "terms.alignment.block": 1}
        _, _, forward, _ = step_of(changes, views)
        found = FrozenRun(settings, teacher).features(forward)
        assert not found.requires_grad
        view = forward.views.student
        groups = dataclasses.replace(view.groups, separate=view.groups.separate and not whole)

        def at(labels):
            with torch.no_grad():
                return teacher(view.tokens, view.timesteps, labels, groups, taps=(2,)).features[2]

        null = torch.full((3,), 5)
        expected = at(null) + guidance * (at(forward.condition) - at(null))
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("hidden_as", ["tokens", "mask"])
    def test_passes_by_no_blocks_whatever_the_student_does(self, hidden_as):
        passing = {"views.mask_ratios": (0.5, 0.5), "views.hidden_groups": 1}
        passing |= {"views.skipped_blocks": (2, 2), "views.hidden_as": hidden_as}
        changes = {"terms.alignment.target": "latent", **passing}
        config = resolved("sit", changes, channels=2, image_size=(4, 6))
        teacher = small_model(5, head_after=None)
        x0, labels = torch.randn(3, 2, 4, 6, dtype=torch.float64), torch.tensor([0, 1, 2])
        draw = float64_draw(config, (3, 2, 4, 6))
        views = make_views(config, x0, draw)
        forward = Pass(config, x0, labels, labels, draw, views, None, None)
        found = FrozenRun(FrozenRunTarget(run="x", block=2, width=24), teacher).features(forward)
        view = views.student
        groups = dataclasses.replace(view.groups, passing=None)
        with torch.no_grad():
            expected = teacher(view.tokens, view.timesteps, labels, groups, taps=(2,)).features[2]
        torch.testing.assert_close(found, expected)

    def test_refused(self):
        with pytest.raises(UserError, match=r"targets\.frozen-run\.run is '': must be given"):
            resolved("sit", {"terms.alignment.target": "frozen-run"})
        wanted = {"terms.alignment.target": "frozen-run", "targets.frozen-run.run": "x"}
        with pytest.raises(UserError, match=r"guidance is 3\.0: allowed without classes is 1"):
            resolved("sit", {**wanted, "model.num_classes": 0, "targets.frozen-run.guidance": 3.0})


class TestEarlyVelocity:
    ON: ClassVar = {"objective.terms": ("early-velocity",), "terms.early-velocity.block": 1}

    @pytest.mark.parametrize("views", VIEWS)
    def test_has_the_target_of_the_last_layer(self, views):
        student, _, forward, losses = step_of(self.ON, views)
        velocity = forward.output.projected[EARLY_VELOCITY]
        expected = (velocity - forward.views.target).square().mean(dim=(1, 2))
        assert torch.allclose(losses.terms["early-velocity"], expected)
        rest = losses.terms["denoising"].mean() + 0.5 * expected.mean()
        assert torch.allclose(losses.total, rest)
        assert student.head_taps == {EARLY_VELOCITY: 1}

    def test_begins_with_zero_and_has_the_released_names(self):
        student = build_student(resolved("sit", self.ON))
        weights = {n: p for n, p in student.named_parameters() if n.startswith("final_layer_xr.")}
        assert {name.removeprefix("final_layer_xr.") for name in weights} == {
            n.removeprefix("final_layer.")
            for n in student.state_dict()
            if n.startswith("final_layer.")
        }
        assert not any(bool(weight.any()) for weight in weights.values())


def test_a_target_that_is_the_students_own_block_is_refused():
    changes = {"terms.alignment.target": "same-pass", "terms.alignment.projector": "none"}
    same = {"terms.alignment.block": 2, "targets.same-pass.block": 2}
    with pytest.raises(
        UserError, match=r"same-pass\.block is 2: this is terms\.alignment\.block itself"
    ):
        resolved("sit", {**changes, **same})
