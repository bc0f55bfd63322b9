"""The config tree: what is allowed, what is refused and in which words, and its round trip."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import RECIPE_NAMES, blocks_of, resolved

from selfalign import RunConfig, UserError, override, recipe, resolve
from selfalign.config import OLDER_NAMES, config_from_dict, config_to_dict

RATIOS = st.lists(st.floats(0.01, 1), min_size=2, max_size=8).map(tuple)


class TestMaskRatios:
    def test_one_ratio_below_one_means_two_groups(self):
        tree = override(RunConfig(), {"views.mask_ratios": (0.25,)})
        assert tree.views.mask_ratios == (0.25, 0.75)
        assert tree.num_groups == 2

    def test_ratios_are_normalised(self):
        tree = override(RunConfig(), {"views.mask_ratios": (1, 2, 1)})
        assert tree.views.mask_ratios == (0.25, 0.5, 0.25)

    def test_lists_become_tuples(self):
        changes = {"views.mask_ratios": [0.25, 0.75], "model.image_size": [8, 8]}
        tree = override(RunConfig(), changes)
        assert (tree.views.mask_ratios, tree.model.image_size) == ((0.25, 0.75), (8, 8))
        assert tree == override(RunConfig(), {name: tuple(v) for name, v in changes.items()})

    @given(ratios=RATIOS)
    def test_normalising_again_changes_nothing(self, ratios):
        # A run's config is read back, and changed by dotted name, without its groups moving.
        tree = override(RunConfig(), {"views.mask_ratios": ratios})
        again = override(tree, {"views.class_dropout": tree.views.class_dropout})
        assert again.views.mask_ratios == tree.views.mask_ratios


class TestRoundTrip:
    @pytest.mark.parametrize("name", RECIPE_NAMES)
    def test_open_and_resolved_trees_survive_json(self, name):
        tree = recipe(name)
        assert config_from_dict(json.loads(json.dumps(config_to_dict(tree)))) == tree
        tree = resolved(name, {"views.class_dropout": 0.3, "seed": 7})
        again = config_from_dict(json.loads(json.dumps(config_to_dict(tree))))
        assert type(again) is RunConfig
        assert resolve(again) == tree

    @given(ratios=RATIOS, learning_rate=st.floats(0, 1), seed=st.integers(0, 2**63 - 1))
    def test_any_values_survive_json(self, ratios, learning_rate, seed):
        changes = {
            "views.mask_ratios": ratios,
            "training.learning_rate": learning_rate,
            "seed": seed,
        }
        tree = override(RunConfig(), changes)
        assert config_from_dict(json.loads(json.dumps(config_to_dict(tree)))) == tree

    def test_unknown_field_is_named(self):
        values = config_to_dict(RunConfig())
        values["views"]["colour"] = "blue"
        with pytest.raises(UserError, match=r"views\.colour"):
            config_from_dict(values)

    def test_unknown_section_is_named(self):
        with pytest.raises(UserError, match="optics"):
            config_from_dict({**config_to_dict(RunConfig()), "optics": {"lens": 1}})

    def test_values_are_checked_on_the_way_in(self):
        values = config_to_dict(RunConfig())
        values["training"]["batch_size"] = 0
        with pytest.raises(UserError, match=r"training\.batch_size is 0"):
            config_from_dict(values)


class TestOverride:
    def test_leaves_the_original_alone(self):
        before = RunConfig()
        after = override(before, {"training.steps": 7, "seed": 3})
        assert (after.training.steps, after.seed) == (7, 3)
        assert before == RunConfig()
        assert override(after, {"training.steps": before.training.steps, "seed": 0}) == before

    def test_checks_the_result_and_not_each_change(self):
        # Timesteps per group alone would be refused with one group.
        for name in ("dual", "independent"):
            changes = {"views.timesteps": name, "views.mask_ratios": (0.5,), "seed": 1}
            assert override(RunConfig(), changes).views.timesteps == "independent"

    @pytest.mark.parametrize(
        "name",
        ["stepz", "training.stepz", "seed.value", "model.size.name", "", ".", "training.", "_name"],
    )
    def test_unknown_names_are_refused(self, name):
        with pytest.raises(UserError, match="no such field") as error:
            override(RunConfig(), {name: 1})
        assert repr(name) in str(error.value)

    @pytest.mark.parametrize("older", OLDER_NAMES)
    def test_names_of_version_0_1_0_are_the_new_ones(self, older):
        values = {
            "target": "ema",
            "weight": 0.2,
            "distance": "l1",
            "interval": 0.3,
            "timestep": "same",
            "groups": True,
            "labels": "dropped",
            "block": 4,
        }
        newer = OLDER_NAMES[older]
        value = values[newer.rpartition(".")[2]]
        tree = override(RunConfig(), {older: value})
        assert tree == override(RunConfig(), {newer: value}) != RunConfig()
        section, part, name = newer.split(".")
        assert getattr(getattr(tree, section)[part], name) == value

    def test_blocks_that_version_0_1_0_left_open_are_the_defaults(self):
        blocks = {"alignment.student_block": None, "alignment.teacher_block": None}
        assert override(RunConfig(), blocks) == RunConfig()

    def test_trees_cannot_be_changed_in_place(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            RunConfig().training.steps = 5  # type: ignore[misc]


EMA = {"alignment.target": "ema"}
DUAL = {"views.timesteps": "dual", "views.mask_ratios": (0.25, 0.75)}
REFUSED = [
    # one field's own range, with the field, the value and what is allowed
    ({"seed": -1}, ["seed", "-1", "0 to 2^63-1"]),
    ({"seed": 2**63}, ["seed", str(2**63)]),
    ({"flow.path": "spiral"}, ["flow.path", "spiral", "linear, cosine"]),
    (
        {"flow.timestep_distribution": "normal"},
        ["flow.timestep_distribution", "normal", "uniform, logit-normal"],
    ),
    ({"flow.logit_std": 0.0}, ["flow.logit_std", "0.0", "above 0"]),
    ({"flow.logit_std": -1.0}, ["flow.logit_std", "-1.0", "above 0"]),
    ({"flow.logit_mean": math.nan}, ["flow.logit_mean", "nan", "finite"]),
    ({"views.timesteps": "triple"}, ["views.timesteps", "triple", "independent, single"]),
    ({"views.attention": "sparse"}, ["views.attention", "sparse", "full, separated"]),
    ({"views.mask_ratios": ()}, ["views.mask_ratios", "()", "one or more"]),
    ({"views.mask_ratios": (1.5,)}, ["views.mask_ratios", "1.5", "up to 1"]),
    ({"views.mask_ratios": (0.0,)}, ["views.mask_ratios", "0.0", "above 0"]),
    ({"views.mask_ratios": (0.5, -0.5)}, ["views.mask_ratios", "-0.5", "above 0"]),
    ({"views.mask_ratios": (0.5, math.nan)}, ["views.mask_ratios", "nan", "above 0"]),
    ({"views.mask_ratios": (0.5, math.inf)}, ["views.mask_ratios", "inf", "above 0"]),
    ({"views.mask_ratios": (1e308, 1e308)}, ["views.mask_ratios", "1e+308"]),
    ({"views.whole_image_fraction": 1.5}, ["views.whole_image_fraction", "1.5", "0 to 1"]),
    ({"views.class_dropout": -0.1}, ["views.class_dropout", "-0.1", "0 to 1"]),
    ({"views.class_dropout": math.nan}, ["views.class_dropout", "nan", "0 to 1"]),
    ({"alignment.target": "clip"}, ["terms.alignment.target", "clip", "none, ema"]),
    ({"alignment.weight": -0.5}, ["terms.alignment.weight", "-0.5", "from 0"]),
    ({"terms.alignment.weight": math.inf}, ["terms.alignment.weight", "inf", "from 0"]),
    ({"alignment.distance": "cos"}, ["terms.alignment.distance", "cos", "cosine-over-tokens"]),
    ({**EMA, "alignment.student_block": 0}, ["terms.alignment.block", "0", "from 1"]),
    ({**EMA, "alignment.teacher_block": -2}, ["targets.ema.block", "-2", "from 1"]),
    (
        {"targets.ema.timestep": "self_flow"},
        ["targets.ema.timestep", "self_flow", "below, minimum, same"],
    ),
    ({"alignment.teacher_interval": 1.1}, ["targets.ema.interval", "1.1", "0 to 1"]),
    ({"targets.ema.labels": "all"}, ["targets.ema.labels", "undropped, dropped"]),
    ({"model.size": "XXL/2"}, ["model.size", "XXL/2", "tiny, S, B, L, XL"]),
    ({"model.size": "S/3"}, ["model.size", "S/3", "/1, /2, /4, /8"]),
    ({"model.size": "S"}, ["model.size", "'S'", "/1, /2, /4, /8"]),
    ({"model.channels": 0}, ["model.channels", "0", "from 1"]),
    ({"model.num_classes": -1}, ["model.num_classes", "-1", "from 0"]),
    ({"model.image_size": (0, 8)}, ["model.image_size", "(0, 8)", "from 1"]),
    ({"model.image_size": ()}, ["model.image_size", "()", "a height and a width"]),
    ({"model.image_size": (8,) * 4}, ["model.image_size", "(8, 8, 8, 8)", "a height and a width"]),
    ({"training.steps": 0}, ["training.steps", "0", "from 1"]),
    ({"training.batch_size": -4}, ["training.batch_size", "-4", "from 1"]),
    ({"training.learning_rate": math.nan}, ["training.learning_rate", "nan", "from 0"]),
    ({"training.learning_rate": -1e-4}, ["training.learning_rate", "-0.0001", "from 0"]),
    ({"training.weight_decay": -1.0}, ["training.weight_decay", "-1.0", "from 0"]),
    ({"training.clip_norm": -1.0}, ["training.clip_norm", "-1.0", "from 0"]),
    ({"training.ema_decay": 1.01}, ["training.ema_decay", "1.01", "0 to 1"]),
    ({"training.adam_betas": (0.9, 1.0)}, ["training.adam_betas", "1.0", "below 1"]),
    ({"training.adam_betas": (math.nan, 0.9)}, ["training.adam_betas", "nan", "below 1"]),
    ({"training.schedule": "linear"}, ["training.schedule", "linear", "constant, cosine"]),
    ({"training.precision": "fp8"}, ["training.precision", "fp8", "fp32, bf16, fp16"]),
    ({"training.trackers": ("stdout",)}, ["training.trackers", "stdout", "tensorboard, wandb"]),
    ({"data.name": "imagenet"}, ["data.name", "imagenet", "digits", "folder"]),
    ({"data.image_size": 0}, ["data.image_size", "0", "from 1"]),
    ({"data.workers": -1}, ["data.workers", "-1", "from 0"]),
    # another type than the field's
    ({"training.steps": "100"}, ["training.steps", "'100'", "a whole number"]),
    ({"training.steps": 2.5}, ["training.steps", "2.5", "a whole number"]),
    ({"training.batch_size": True}, ["training.batch_size", "True", "a whole number"]),
    ({"training.learning_rate": "1e-4"}, ["training.learning_rate", "'1e-4'", "a number"]),
    ({"training.learning_rate": None}, ["training.learning_rate", "None", "a number"]),
    ({"training.compile": "yes"}, ["training.compile", "'yes'", "True or False"]),
    ({"training.adam_betas": (0.9,)}, ["training.adam_betas", "(0.9,)", "a number, a number"]),
    ({"training.trackers": "wandb"}, ["training.trackers", "'wandb'", "tensorboard, wandb"]),
    ({"views.mask_ratios": 0.25}, ["views.mask_ratios", "0.25", "any number of"]),
    (
        {"alignment.student_block": True},
        ["terms.alignment.block", "True", "a whole number or a number or a text"],
    ),
    ({"terms.alignment.block": None}, ["terms.alignment.block", "None", "a whole number or"]),
    ({"model.image_size": (8.0, 8)}, ["model.image_size", "(8.0, 8)", "a whole number or None"]),
    ({"model.image_size": 8}, ["model.image_size", "8", "any number of", "a whole number"]),
    ({"model.size": 2}, ["model.size", "2", "a text"]),
    ({"seed": 1.0}, ["seed", "1.0", "a whole number"]),
    ({"views": None}, ["views", "None", "ViewsConfig"]),
    # fields that contradict each other
    ({"views.timesteps": "dual"}, ["views.timesteps", "dual", "two or more", "single"]),
    ({"views.attention": "separated"}, ["views.attention", "separated", "two or more", "full"]),
    ({"views.whole_image_fraction": 0.25}, ["views.whole_image_fraction", "0.25", "allowed is 0"]),
    (
        {**EMA, "alignment.teacher_groups": True},
        ["targets.ema.groups", "True", "one token group", "allowed is False"],
    ),
    (
        {**DUAL, **EMA},
        ["targets.ema.timestep", "below", "minimum", "targets.ema.groups True"],
    ),
    (
        {**DUAL, **EMA, "alignment.teacher_timestep": "same"},
        ["targets.ema.timestep", "same", "minimum"],
    ),
    (
        {**EMA, "model.size": "tiny", "alignment.student_block": 7},
        ["terms.alignment.block", "7", "1 to 6"],
    ),
    (
        {**EMA, "model.size": "B/2", "targets.ema.block": 13},
        ["targets.ema.block", "13", "1 to 12"],
    ),
    (
        {"training.batch_size": 10, "training.gradient_accumulation": 4},
        ["training.gradient_accumulation", "4", "10"],
    ),
    (
        {"training.steps": 10, "training.warmup_steps": 11},
        ["training.warmup_steps", "11", "10"],
    ),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=lambda value: str(value)[:60])
def test_refused_in_one_line_that_names_field_value_and_what_is_allowed(changes, words):
    with pytest.raises(UserError) as error:
        override(RunConfig(), changes)
    message = str(error.value)
    assert [word for word in words if word not in message] == []
    assert "\n" not in message


@pytest.mark.parametrize("name", RECIPE_NAMES)
@pytest.mark.parametrize(
    ("block", "setting"),
    [
        ("alignment.student_block", "terms.alignment.block"),
        ("alignment.teacher_block", "targets.ema.block"),
        ("terms.alignment.block", "terms.alignment.block"),
        ("targets.ema.block", "targets.ema.block"),
    ],
)
def test_blocks_past_the_depth_are_refused_for_every_recipe(name, block, setting):
    changes = {**EMA, "model.size": "XL/2"}
    recipe(name, {**changes, block: 28})
    with pytest.raises(UserError, match=rf"{setting} is 29: allowed are a block from 1 to 28"):
        recipe(name, {**changes, block: 29})


class TestResolve:
    def test_fills_in_what_the_data_determines(self):
        tree = resolve(recipe("sra-dts-as", {"model.size": "S/2"}), 3, (32, 64), 10)
        assert tree.model.channels == 3
        assert tree.model.image_size == (32, 64)
        assert tree.model.num_classes == 10
        assert tree.model.num_tokens == 16 * 32
        assert resolve(tree, 3, (32, 64), 10) == tree

    @pytest.mark.parametrize(
        ("size", "student", "teacher"),
        [("tiny", 2, 4), ("S/2", 4, 8), ("B/2", 4, 8), ("L/2", 7, 17), ("XL/2", 8, 20)],
    )
    def test_blocks_follow_the_depth(self, size, student, teacher):
        tree = resolve(recipe("sra", {"model.size": size}), 4, (32, 32), 1000)
        assert blocks_of(tree) == (student, teacher)

    @pytest.mark.parametrize(
        "names",
        [
            ("alignment.student_block", "alignment.teacher_block"),
            ("terms.alignment.block", "targets.ema.block"),
        ],
    )
    def test_given_blocks_stay(self, names):
        changes = dict(zip(names, (3, 12), strict=True))
        tree = resolve(recipe("sra", {"model.size": "B/2", **changes}), 4, (32, 32), 1000)
        assert blocks_of(tree) == (3, 12)

    def test_zero_classes_make_labelled_data_unconditional(self):
        tree = resolve(recipe("sit", {"model.num_classes": 0}), 3, (32, 32), 10)
        assert tree.model.num_classes == 0

    def test_more_classes_than_the_data_has_are_kept(self):
        tree = resolve(recipe("sit", {"model.num_classes": 1000}), 3, (32, 32), 10)
        assert tree.model.num_classes == 1000

    @pytest.mark.parametrize(
        ("batch_size", "accumulation", "processes", "images"),
        [(2, 1, 1, 2), (16, 8, 1, 2), (16, 1, 8, 2), (16, 4, 4, 1)],
    )
    def test_refuses_whole_images_that_round_to_none(
        self, batch_size, accumulation, processes, images
    ):
        changes = {
            "views.whole_image_fraction": 0.25,
            "training.batch_size": batch_size,
            "training.gradient_accumulation": accumulation,
        }
        tree = recipe("sra-dts-as", changes)
        with pytest.raises(UserError) as error:
            resolve(tree, 3, (32, 32), 10, processes)
        assert str(error.value) == (
            f"views.whole_image_fraction is 0.25: of the {images} images that a process sees at once "
            "this rounds to none; allowed are 0, a larger share, or a larger training.batch_size"
        )
        plenty = override(tree, {"training.batch_size": 4 * processes * accumulation})
        assert resolve(plenty, 3, (32, 32), 10, processes).views == tree.views
        none = override(tree, {"views.whole_image_fraction": 0.0})
        assert resolve(none, 3, (32, 32), 10, processes).views.whole_image_fraction == 0

    @pytest.mark.parametrize(
        ("changes", "image_size", "words"),
        [
            ({"model.channels": 4}, (32, 32), ["model.channels", "4", "3"]),
            (
                {"model.image_size": (16, 16)},
                (32, 32),
                ["model.image_size", "(16, 16)", "(32, 32)"],
            ),
            ({"model.num_classes": 9}, (32, 32), ["model.num_classes", "9", "10", "0"]),
            ({"model.size": "S/8"}, (28, 28), ["model.size", "S/8", "28×28", "/1, /2, /4"]),
            ({"model.size": "S/2"}, (32, 33), ["model.size", "S/2", "32×33", "/1"]),
            (
                {"model.size": "S/8", "views.mask_ratios": (0.01, 0.99)},
                (32, 32),
                ["views.mask_ratios", "0.01", "16 tokens", "(0, 16)"],
            ),
            (
                {"model.size": "S/8", "views.mask_ratios": (1.0,) * 17},
                (32, 32),
                ["views.mask_ratios", "16 tokens", "at least one"],
            ),
        ],
    )
    def test_refuses_a_model_that_does_not_fit(self, changes, image_size, words):
        with pytest.raises(UserError) as error:
            resolve(recipe("sit", changes), 3, image_size, 10)
        message = str(error.value)
        assert [word for word in words if word not in message] == []
        assert "\n" not in message
