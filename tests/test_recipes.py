"""The recipes are the factorial space of METHOD, and nothing else differs between two points."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import RECIPE_NAMES

from selfalign import RECIPES, RunConfig, UserError, recipe, resolve
from selfalign.benchmark.cost import step_cost
from selfalign.recipes import COSTS, IMAGENET_EPOCH
from selfalign.targets.encoder_attention import EncoderAttentionTarget

DINOV2_B = 46_322_454_528
"""Operations of a pass of timm's vit_base_patch14_dinov2 over 224×224 pixels, counted by torch."""

# target, timesteps, attention, teacher timestep, teacher sees groups: the paper's table.
TABLE = {
    "sit": ("none", "single", "full", None, None),
    "sra": ("ema", "single", "full", "below", False),
    "self-flow": ("ema", "independent", "full", "minimum", False),
    "sra-dts": ("ema", "independent", "full", "below", True),
    "sra-as": ("ema", "single", "separated", "below", True),
    "sra-dts-as": ("ema", "independent", "separated", "below", True),
}


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_is_its_row_of_the_table(name):
    tree = recipe(name)
    target, timesteps, attention, teacher_timestep, teacher_groups = TABLE[name]
    alignment, ema = tree.terms["alignment"], tree.targets["ema"]
    assert alignment.target == target
    assert list(tree.used_terms()) == ["denoising", "alignment"][: 1 + (target != "none")]
    assert tree.views.timesteps == timesteps
    assert tree.views.attention == attention
    if target != "none":
        assert ema.timestep == teacher_timestep
        assert ema.groups == teacher_groups
        assert alignment.weight == (0.8 if name == "self-flow" else 0.5)
    grouped = timesteps == "independent" or attention == "separated"
    assert tree.views.mask_ratios == ((0.25, 0.75) if grouped else (1.0,))


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_differs_from_the_defaults_in_views_and_alignment_only(name):
    plain = RunConfig()
    tree = recipe(name)
    assert set(tree.terms.given) <= {"alignment"} and set(tree.targets.given) <= {"ema"}
    same = {"views": plain.views, "terms": plain.terms, "targets": plain.targets}
    assert dataclasses.replace(tree, **same) == plain


def test_every_recipe_is_described_in_one_line():
    assert set(RECIPE_NAMES) <= set(RECIPES)
    for known in RECIPES.values():
        assert known.summary and "\n" not in known.summary


def test_no_two_recipes_are_the_same_point():
    assert len({repr(recipe(name)) for name in RECIPES}) == len(RECIPES)


def test_overrides_go_over_the_recipe():
    for weight in ("alignment.weight", "terms.alignment.weight"):
        tree = recipe("self-flow", {weight: 0.1, "seed": 4})
        assert (tree.terms["alignment"].weight, tree.seed) == (0.1, 4)
        assert tree.views.timesteps == "independent"


def test_a_recipe_may_not_be_overridden_into_a_contradiction():
    with pytest.raises(UserError, match=r"views\.attention is 'separated'"):
        recipe("sra-dts-as", {"views.timesteps": "single", "views.mask_ratios": (1.0,)})


def test_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="recipe is 'sra-dst'") as error:
        recipe("sra-dst")
    assert all(name in str(error.value) for name in RECIPES)


@pytest.mark.parametrize(
    ("name", "latents", "tokens", "depth", "blocks", "steps"),
    [
        ("imagenet256-xl2", 32, 256, 28, (8, 20), 4_000_000),
        ("imagenet256-b2", 32, 256, 12, (4, 8), 800_000),
        ("imagenet512-xl2", 64, 1024, 28, (8, 20), 1_000_000),
    ],
)
def test_full_size_recipes_are_the_papers_settings(
    name: str, latents: int, tokens: int, depth: int, blocks: tuple[int, int], steps: int
) -> None:
    config = resolve(recipe(name), channels=4, image_size=(latents, latents), num_classes=1000)
    model, training = config.model, config.training
    alignment, ema = config.terms["alignment"], config.targets["ema"]
    assert (model.num_tokens, config.depth, model.num_classes) == (tokens, depth, 1000)
    assert (alignment.block, ema.block) == blocks
    assert (alignment.weight, ema.interval) == (0.5, 0.2)
    assert (training.steps, training.batch_size, training.learning_rate) == (steps, 256, 1e-4)
    assert (training.weight_decay, training.clip_norm, training.ema_decay) == (0, 1.0, 0.9999)
    assert not training.ema_warmup and training.schedule == "constant"
    assert config.views.class_dropout == 0.1 and config.views.mask_ratios == (0.25, 0.75)
    assert (config.views.timesteps, config.views.attention) == ("independent", "separated")
    assert config.flow.timestep_distribution == "uniform" and config.data.name == "latents"
    with pytest.raises(UserError, match="the data has"):
        resolve(recipe(name), channels=4, image_size=(16, 16), num_classes=1000)


NEIGHBOURS = {
    "repa": ("frozen-encoder", "mlp3", "cosine", "none", 0.5),
    "irepa": ("frozen-encoder", "conv", "cosine", "zscore", 1.0),
    "haste": ("frozen-encoder", "mlp3", "cosine", "none", 0.5),
    "layersync": ("same-pass", "none", "cosine", "none", 0.2),
    "sra2": ("latent", "mlp3", "smooth-l1", "none", 0.5),
    "sra-published": ("ema", "sra", "smooth-l1", "none", 0.2),
}
"""Target, projector, distance, normalisation of the target, weight (METHOD, the neighbours)."""


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbours_are_their_papers_settings_and_combine_with_both_switches(name: str) -> None:
    for tree, both in ((recipe(name), False), (recipe(f"{name}-dts-as"), True)):
        term = tree.terms["alignment"]
        found = (term.target, term.projector, term.distance, term.spatial_norm, term.weight)
        assert found == NEIGHBOURS[name]
        assert tree.views.timesteps == ("independent" if both else "single")
        assert tree.views.attention == ("separated" if both else "full")


def test_layersync_and_repa_take_their_papers_blocks_at_full_size() -> None:
    tree = recipe("layersync", {"model.size": "XL/2"})
    assert (tree.terms["alignment"].tap(tree), tree.targets["same-pass"].tap(tree)) == (8, 16)
    assert recipe("repa").projectors["mlp3"].width == 2048
    assert recipe("irepa").projectors["conv"].kernel == 3


def test_haste_ends_all_alignment_at_its_step() -> None:
    terms = recipe("haste").used_terms()
    for name in ("alignment", "attention-distillation"):
        assert terms[name].weight == 0.5
        assert not terms[name].stopped(249_999) and terms[name].stopped(250_000)


@pytest.mark.parametrize("epoch", [0, 148, 149, 150, 151, 649, 1149])
def test_sras_published_weight_falls_by_epochs(epoch: int) -> None:
    term = recipe("sra-published").terms["alignment"]
    expected = 0.2 * 10 ** -(max(0, epoch - 149) / 1000)
    for step in (epoch * IMAGENET_EPOCH, (epoch + 1) * IMAGENET_EPOCH - 1):
        assert term.weight_at(step) == pytest.approx(expected, rel=1e-12)
    assert recipe("sra-published").targets["ema"].labels == "dropped"


def test_every_recipe_says_what_it_needs_and_what_proves_it() -> None:
    assert set(COSTS) == set(RECIPES)
    recorded = Path(__file__).parent / "golden"
    for entry in RECIPES.values():
        assert entry.needs
        assert not entry.proof or (recorded / f"{entry.proof}.safetensors").is_file()


QUICKLY_COUNTED = ("repa", "layersync")


@pytest.mark.parametrize(
    "name",
    [n if n in QUICKLY_COUNTED else pytest.param(n, marks=pytest.mark.slow) for n in RECIPES],
)
def test_stored_costs_are_those_that_are_counted(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = {"imagenet256-b2": "B/2"}.get(name, "XL/2")
    side = 64 if name == "imagenet512-xl2" else 32
    attention = SimpleNamespace(
        taps=lambda config: (),
        features=lambda forward: forward.x0.new_empty(len(forward.x0), 256, 4 * 2 * 12 * 64),
    )
    monkeypatch.setattr(EncoderAttentionTarget, "build", lambda self, config: attention)

    def operations(name: str) -> float:
        shape = {"model.size": size, "model.image_size": (side, side)}
        heads = {"targets.encoder-attention.heads": 12} if name.startswith("haste") else {}
        return step_cost(resolve(recipe(name, shape | heads), 4, (side, side), 1000), 1).flops

    found = operations(name) + (DINOV2_B if name.startswith("haste") else 0)
    assert found / operations("sit") == pytest.approx(COSTS[name], abs=6e-4)
