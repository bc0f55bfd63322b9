"""Groupings that change over a run: at which step which, what is refused, and what a bandit learns."""

import json
from pathlib import Path

import pytest
from conftest import SMALL
from scipy import stats
from support import assert_same_run, clean_images, resolved, timestep_of_token

from selfalign import UserError, draw_views, make_generator, parts, recipe
from selfalign.curriculums import parse_grouping
from selfalign.curriculums.bandit import Bandit
from selfalign.runs.start import resume_run, start_run
from selfalign.sections import ViewsConfig
from selfalign.views import make_views

STAGES = ("10:blocks:0.5", "20:random:0.2,0.3,0.5:0.25", "30::0.25:1")


def views_at(config, step):
    return config.curriculum.views(config, step)


def test_these_are_all():
    assert set(parts.names("curriculum")) == {"bandit", "constant", "ramp", "stages"}


def test_constant_is_the_section():
    config = resolved("sra-dts-as")
    assert views_at(config, 0) is config.views is views_at(config, 10**6)


class TestStages:
    @pytest.fixture
    def config(self):
        changes = {"views.curriculum": "stages", "curriculums.stages.stages": STAGES}
        return resolved("sra-dts", changes)

    def test_each_begins_at_its_step(self, config):
        found = [
            (views.partition, views.mask_ratios, views.whole_image_fraction)
            for views in (views_at(config, step) for step in (0, 9, 10, 19, 20, 29, 30, 999))
        ]
        first, second = ("random", (0.25, 0.75), 0.0), ("blocks", (0.5, 0.5), 0.0)
        third, last = ("random", (0.2, 0.3, 0.5), 0.25), ("random", (0.25, 0.75), 1.0)
        assert found == [first] * 2 + [second] * 2 + [third] * 2 + [last] * 2

    @pytest.mark.parametrize("step", [0, 10, 20])
    def test_every_tokens_timestep_is_distributed_as_p_of_t(self, config, step):
        x0 = clean_images(config, batch=4000)
        draw = draw_views(config, x0, make_generator(step, "views"), views_at(config, step))
        for token in timestep_of_token(make_views(config, x0, draw).student).T[::7]:
            assert stats.kstest(token.numpy(), "uniform").pvalue > 1e-5


class TestRamp:
    def config(self, **settings):
        named = {f"curriculums.ramp.{name}": value for name, value in settings.items()}
        return resolved("sra-dts-as", {"views.curriculum": "ramp", **named})

    def test_shares_move_in_levels_to_those_of_the_section(self):
        config = self.config(mask_ratios=(0.5,), steps=80, levels=4, whole_image_fraction=0.4)
        found = [views_at(config, step) for step in (0, 19, 20, 40, 60, 79, 80, 999)]
        assert [views.mask_ratios[0] for views in found] == pytest.approx(
            [0.5, 0.5, 0.4375, 0.375, 0.3125, 0.3125, 0.25, 0.25]
        )
        assert [views.whole_image_fraction for views in found] == pytest.approx(
            [0.4, 0.4, 0.3, 0.2, 0.1, 0.1, 0, 0]
        )
        assert views_at(config, 80) is config.views

    def test_half_a_cosine_begins_and_ends_slowly(self):
        line, curve = (
            self.config(mask_ratios=(0.5,), steps=100, levels=100, shape=shape)
            for shape in ("linear", "cosine")
        )
        share = {step: views_at(curve, step).mask_ratios[0] for step in (10, 50, 90)}
        assert share[10] > views_at(line, 10).mask_ratios[0]
        assert share[50] == pytest.approx(views_at(line, 50).mask_ratios[0], abs=0.003)
        assert share[90] < views_at(line, 90).mask_ratios[0]


class TestBandit:
    def learner(self, **settings):
        bandit = Bandit(arms=("random:0.25", "random:0.5", "blocks:0.25"), **settings)
        return bandit.learner(resolved("sra-dts-as", {"views.curriculum": "bandit"}))

    def play(self, learner, gains, rounds, start=1.0):
        """The arms played in turn, where each multiplies the loss by its own factor."""
        loss, played = start, []
        learner.observe(loss)
        for _ in range(rounds):
            played.append(learner.arm)
            loss *= gains[learner.arm]
            learner.observe(loss)
        return played

    def test_each_arm_is_played_once_and_then_mostly_the_best(self):
        played = self.play(self.learner(), [0.99, 0.95, 0.985], 60)
        assert played[:3] == [0, 1, 2]
        assert played[-40:].count(1) > 25

    def test_goes_over_to_an_arm_that_has_become_better(self):
        learner = self.learner(discount=0.8)
        self.play(learner, [0.95, 0.99, 0.99], 30)
        played = self.play(learner, [0.999, 0.95, 0.999], 60)
        assert played[-30:].count(1) > 15

    def test_a_state_by_way_of_json_is_the_learner(self):
        one, other = self.learner(), self.learner()
        self.play(one, [0.99, 0.97, 0.98], 11)
        other.load(json.loads(json.dumps(one.state())))
        assert other.state() == one.state()
        gains = [0.98, 0.99, 0.97]
        assert self.play(one, gains, 20, 0.3) == self.play(other, gains, 20, 0.3)

    @pytest.mark.parametrize(
        "change",
        [{"arms": ["random:0.1"]}, {"plays": [1.0]}, {"squares": None}, {"arm": 7}, {"rewards": 3}],
    )
    def test_a_foreign_or_damaged_state_is_refused(self, change):
        learner = self.learner()
        with pytest.raises(UserError, match="checkpoint"):
            learner.load({**learner.state(), **change})


BANDIT = {
    **SMALL,
    "views.curriculum": "bandit",
    "curriculums.bandit.arms": ("random:0.25", "blocks:0.5", "stripes:0.25,0.25,0.5"),
    "curriculums.bandit.every": 2,
    "curriculums.bandit.pairs": 20,
    "training.steps": 12,
}


def test_a_run_with_a_bandit_goes_on_bitwise(tmp_path: Path):
    config = recipe("sra-dts-as", BANDIT)
    whole = start_run(config, tmp_path / "whole", lambda state, values: None, monitors=())
    shorter = recipe("sra-dts-as", {**BANDIT, "training.steps": 7})
    start_run(shorter, tmp_path / "parts", lambda state, values: None, monitors=())
    resumed = resume_run(tmp_path / "parts", 12, lambda state, values: None, monitors=())
    assert resumed.learner.state() == whole.learner.state()
    assert sum(whole.learner.plays) > 0
    state = json.loads((tmp_path / "whole/checkpoints/step_00000012/state.json").read_text())
    assert state["curriculum"] == whole.learner.state()
    for folder in ("whole", "parts"):  # the one wrote a line at its last step, 7
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        kept = [line for line in lines if json.loads(line)["step"] != 7]
        (tmp_path / folder / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("blocks:0.25", ("blocks", (0.25, 0.75), 0.0)),
        (":0.5", ("random", (0.5, 0.5), 0.0)),
        ("random:1,1,2:0.5", ("random", (0.25, 0.25, 0.5), 0.5)),
    ],
)
def test_groupings_are_read(text, expected):
    views = parse_grouping(text, ViewsConfig(mask_ratios=(0.25, 0.75)), "here")
    assert (views.partition, views.mask_ratios, views.whole_image_fraction) == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"curriculum": "stages"}, ["curriculums.stages.stages", "one or more"]),
        ({"curriculum": "stages", "stages": ("x:blocks:0.5",)}, ["begins with a step"]),
        ({"curriculum": "stages", "stages": ("1:rings:0.5",)}, ["rings:0.5", "blocks"]),
        ({"curriculum": "stages", "stages": ("1:blocks",)}, ["PARTITION:RATIOS"]),
        ({"curriculum": "stages", "stages": ("9::0.5", "3::0.25")}, ["larger than the last"]),
        ({"curriculum": "stages", "stages": ("9::0.001",)}, ["at least one", "(0, 64)"]),
        ({"curriculum": "ramp", "mask_ratios": (1.0, 1.0, 1.0)}, ["as many groups", "2"]),
        ({"curriculum": "ramp", "levels": 0}, ["from 1 to 1000"]),
        ({"curriculum": "bandit", "arms": ("random:0.25",)}, ["two or more"]),
        ({"curriculum": "bandit", "arms": (":0.25", ":x")}, [":x", "PARTITION:RATIOS"]),
        ({"curriculum": "bandit", "discount": 0.0}, ["0.01 to 1"]),
    ],
)
def test_refused(changes, words):
    name = changes["curriculum"]
    given = {f"curriculums.{name}.{k}": v for k, v in changes.items() if k != "curriculum"}
    with pytest.raises(UserError) as error:
        resolved("sra-dts-as", {"views.curriculum": name, **given})
    assert [word for word in words if word not in str(error.value)] == []
    assert "\n" not in str(error.value)


def test_settings_of_a_curriculums_partitions_are_part_of_the_run():
    config = recipe(
        "sra-dts-as",
        {
            "views.curriculum": "stages",
            "curriculums.stages.stages": ("5:blocks:0.5",),
            "partitions.blocks.largest_aspect": 3.0,
        },
    )
    from selfalign.config import config_from_dict, config_to_dict

    assert config_to_dict(config)["partitions"] == {"blocks": {"largest_aspect": 3.0}}
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
