"""The EMA teacher: what it sees, what of it is run, and what is refused."""

import copy

import pytest
import torch
from support import (
    GROUPED,
    RECIPE_NAMES,
    clean_images,
    draw_of,
    float64_draw,
    resolved,
    small_model,
    teacher_view,
    timestep_of_token,
)

from selfalign import Objective, Pass, UserError, build_student
from selfalign.config import config_from_dict, config_to_dict
from selfalign.flow import PATHS
from selfalign.targets.ema import EMATarget
from selfalign.tokens import unpatchify
from selfalign.views import make_views


def seen_by_the_teacher(config, draw):
    return teacher_view(config, make_views(config, clean_images(config), draw), draw)


class TestView:
    @pytest.mark.parametrize("name", ["sra", "sra-dts", "sra-as", "sra-dts-as"])
    def test_sra_timesteps_lie_below_the_students_by_the_drawn_interval(self, name):
        config = resolved(name, {"alignment.teacher_interval": 0.3})
        draw = draw_of(config, batch=300)
        views = make_views(config, torch.zeros_like(draw.noise), draw)
        student, teacher = views.student.timesteps, teacher_view(config, views, draw).timesteps
        assert (teacher <= student).all()
        assert (teacher >= (student - 0.3)).all()
        assert teacher.min() == 0  # some are clamped, none is negative
        assert torch.equal(teacher, (student - draw.teacher_interval).clamp(0, 1))

    def test_there_is_a_lag_for_each_timestep_and_as_released_for_each_group(self):
        draws = {
            name: draw_of(resolved(name))
            for name in ("sra", "sra-as", "sra-as-released", "sra-dts", "sra-dts-as")
        }
        lags = {name: draw.teacher_interval for name, draw in draws.items()}
        assert torch.equal(lags["sra-as"], lags["sra"].expand_as(lags["sra-as"])), "a pure switch"
        assert torch.equal(lags["sra-as-released"][:, :1], lags["sra"])
        assert torch.equal(lags["sra-dts-as"], lags["sra-dts"])
        assert (lags["sra-as-released"][:, 0] != lags["sra-as-released"][:, 1]).all()
        for part in ("noise", "timesteps", "order", "label_dropout"):
            pure, released = (getattr(draws[name], part) for name in ("sra-as", "sra-as-released"))
            assert torch.equal(pure, released)

    def test_runs_begun_before_there_was_a_choice_go_on_as_they_were(self):
        written = config_to_dict(resolved("sra-as"))
        assert config_from_dict(written).targets["ema"].lag == "timestep"
        del written["targets"]["ema"]["lag"]
        assert config_from_dict(written).targets["ema"].lag == "group"

    def test_self_flow_sees_the_whole_image_at_the_smaller_timestep(self):
        config = resolved("self-flow")
        draw = draw_of(config)
        view = seen_by_the_teacher(config, draw)
        assert view.groups.sizes == (64,)
        assert torch.equal(view.timesteps, draw.timesteps.min(dim=1, keepdim=True).values)

    def test_self_flow_timesteps_with_groups_are_the_minimum_in_all_of_them(self):
        changes = {"alignment.teacher_groups": True, "views.mask_ratios": (0.2, 0.3, 0.5)}
        config = resolved("self-flow", changes)
        draw = draw_of(config)
        view = seen_by_the_teacher(config, draw)
        expected = draw.timesteps.min(dim=1, keepdim=True).values.expand(-1, 3)
        assert torch.equal(view.timesteps, expected)

    @pytest.mark.parametrize("name", ["sra", "sra-dts", "sra-as", "sra-dts-as"])
    def test_same_is_the_students_own_view(self, name):
        config = resolved(name, {"targets.ema.timestep": "same"})
        draw = draw_of(config)
        views = make_views(config, clean_images(config), draw)
        teacher = teacher_view(config, views, draw)
        assert torch.equal(teacher.tokens, views.student.tokens)
        assert torch.equal(teacher.timesteps, views.student.timesteps)
        assert teacher.groups == views.student.groups

    @pytest.mark.parametrize("name", RECIPE_NAMES[1:])
    def test_shares_the_students_noise_and_token_order(self, name):
        config = resolved(name, {"views.whole_image_fraction": 0.25 if name in GROUPED else 0.0})
        draw, x0 = draw_of(config), clean_images(config)
        view = teacher_view(config, make_views(config, x0, draw), draw)
        times = timestep_of_token(view).reshape(8, 1, 8, 8)
        expected = PATHS["linear"].interpolate(x0, draw.noise, times)
        restored = unpatchify(view.groups.restore(view.tokens), 1, (8, 8))
        assert torch.allclose(restored, expected, atol=1e-6)
        if draw.order is not None:
            assert torch.equal(view.groups.order, draw.order)

    def test_without_groups_under_separation_it_attends_to_the_whole_image(self):
        config = resolved("sra-as", {"targets.ema.groups": False})
        view = seen_by_the_teacher(config, draw_of(config))
        assert view.groups.sizes == (64,) and not view.groups.separate


class TestFeatures:
    def make(self, name="sra-dts-as"):
        config = resolved(name, channels=2, image_size=(4, 6))
        draw = float64_draw(config, (3, 2, 4, 6))
        x0 = torch.randn(3, 2, 4, 6, dtype=torch.float64)
        labels = torch.tensor([0, 3, 5])
        views = make_views(config, x0, draw)
        return Pass(config, x0, labels, labels, draw, views, None, small_model())

    @pytest.mark.parametrize("block", [1, 2, 3])
    def test_runs_no_block_after_its_own(self, block):
        forward, target = self.make(), EMATarget(block=block, groups=True)
        teacher, ran = forward.teacher, []
        for number, module in enumerate(teacher.blocks, start=1):
            module.register_forward_hook(lambda *_, number=number: ran.append(number))
        teacher.final_layer.register_forward_hook(lambda *_: ran.append("final"))
        expected = target.features(forward)
        assert ran == list(range(1, block + 1))
        # and what it does not run cannot matter
        with torch.no_grad():
            for module in [*teacher.blocks[block:], teacher.final_layer, teacher.ap_head]:
                for parameter in module.parameters():
                    parameter.fill_(torch.nan)
        assert torch.equal(target.features(forward), expected)

    def test_gets_no_gradient(self):
        assert not EMATarget(block=2, groups=True).features(self.make()).requires_grad
        assert torch.is_grad_enabled()

    def test_are_the_teachers_own_at_its_view(self):
        forward, target = self.make(), EMATarget(block=2, groups=True)
        view = target.view(forward.views, forward.draw)
        output = forward.teacher(
            view.tokens, view.timesteps, forward.condition, view.groups, taps=(2,)
        )
        assert torch.equal(target.features(forward), output.features[2])

    def test_a_module_may_be_named(self):
        forward = self.make()
        found = []
        forward.teacher.blocks[1].attn.register_forward_hook(lambda _, __, out: found.append(out))
        features = EMATarget(block="blocks.1.attn", groups=True).features(forward)
        assert len(found) == 1 and torch.equal(features, found[0])

    def test_a_share_of_the_depth_is_the_nearest_block(self):
        # tiny has six blocks: 0.3 is the second, 0.7 the fourth.
        config = resolved("sra", channels=2, image_size=(4, 6))
        student = build_student(config).double()
        x0 = torch.randn(3, 2, 4, 6, dtype=torch.float64)
        labels, draw = torch.tensor([0, 3, 4]), float64_draw(config, (3, 2, 4, 6))
        counted = []
        teacher = copy.deepcopy(student)
        for number, module in enumerate(teacher.blocks, start=1):
            module.register_forward_hook(lambda *_, number=number: counted.append(number))
        Objective(config).predict(student, teacher, x0, labels, draw)
        assert counted == [1, 2, 3, 4]


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "changes", "words"),
        [
            ("sra", {"targets.ema.groups": True}, ["targets.ema.groups", "one token group"]),
            ("sra", {"targets.ema.interval": 1.5}, ["targets.ema.interval", "1.5", "0 to 1"]),
            (
                "sra",
                {"targets.ema.timestep": "above"},
                ["targets.ema.timestep", "below", "minimum"],
            ),
            ("sra", {"targets.ema.block": 7}, ["targets.ema.block", "7", "1 to 6"]),
            ("sra", {"targets.ema.block": 0.0}, ["targets.ema.block", "0.0", "share"]),
            ("sra", {"targets.ema.block": 1.5}, ["targets.ema.block", "1.5", "share"]),
            (
                "sra-dts",
                {"targets.ema.groups": False},
                ["targets.ema.timestep", "independent", "minimum", "targets.ema.groups True"],
            ),
            (
                "sra-dts",
                {"targets.ema.groups": False, "targets.ema.timestep": "same"},
                ["targets.ema.timestep", "same", "minimum"],
            ),
        ],
    )
    def test_in_one_line(self, name, changes, words):
        with pytest.raises(UserError) as error:
            resolved(name, changes)
        message = str(error.value)
        assert [word for word in words if word not in message] == []
        assert "\n" not in message

    @pytest.mark.parametrize(("older", "meant"), [("sra", "below"), ("self-flow", "minimum")])
    def test_older_words_for_timesteps_are_understood(self, older, meant):
        config = resolved("sra", {"alignment.teacher_timestep": older})
        assert config.targets["ema"].timestep == meant
