"""The neighbours' grids: targets × timesteps × attention, and the parts that a profile gives them."""

from pathlib import Path

import pytest

from selfalign.cli import main
from selfalign.config import config_to_dict
from selfalign.recipes import recipe
from selfalign.study.grid import Grid, Variant
from selfalign.study.methods import HASTE, METHODS
from selfalign.study.paper import TWO_BY_TWO
from selfalign.study.profiles import PROFILES

SWITCHES = {
    "Dual timesteps": {"views.timesteps"},
    "Separation": {"views.attention"},
    "Dual timesteps and separation": {"views.timesteps", "views.attention"},
}
GROUPS = {"views.mask_ratios", "targets.ema.groups"}
"""With one group there is nothing to share out, and nothing for a teacher to see in groups."""


def _tree(grid: Grid, name: str) -> dict[str, object]:
    def leaves(prefix: str, held: object) -> dict[str, object]:
        if isinstance(held, dict):
            return {
                k: v for n, part in held.items() for k, v in leaves(f"{prefix}{n}.", part).items()
            }
        return {prefix.rstrip("."): held}

    variant = grid.variants[name]
    return leaves("", config_to_dict(recipe(variant.recipe, variant.settings)))


@pytest.mark.parametrize("grid", [METHODS, HASTE], ids=lambda grid: grid.name)
def test_every_variant_is_a_point_of_its_own_and_stands_in_a_table(grid: Grid) -> None:
    trees = [recipe(v.recipe, v.settings) for v in grid.variants.values()]
    assert len({repr(tree) for tree in trees}) == len(grid.variants)
    assert {row.variant for table in grid.tables for row in table.rows} == set(grid.variants)


def test_every_target_has_its_four_corners() -> None:
    assert len(METHODS.variants) == 5 * 4 + 3
    for effect in METHODS.effects:
        switched = SWITCHES.get(effect.title.partition(",")[0])
        for pair in (*effect.contrasts, *effect.minus):
            with_it, without = (_tree(METHODS, name) for name in pair)
            changed = {k for k in with_it | without if with_it.get(k) != without.get(k)}
            if switched is not None:
                assert switched <= changed <= switched | GROUPS, effect.title


def test_the_corners_of_the_ema_teacher_are_those_of_the_paper() -> None:
    """So that a study of one grid takes over the other's runs."""
    for name, variant in TWO_BY_TWO.variants.items():
        own = METHODS.variants[name]
        trees = [recipe(v.recipe, v.settings) for v in (own, variant)]
        assert trees[0] == trees[1]


def test_a_profiles_parts_go_where_they_are_used() -> None:
    parts = PROFILES["laptop"].parts
    grid = METHODS.with_parts(parts)
    encoders = "targets.frozen-encoder.encoders"
    assert [name for name, v in grid.variants.items() if encoders in v.settings] == [
        "repa",
        "repa-as",
        "repa-dts",
        "repa-dts-as",
        "irepa",
    ]
    assert grid.variants["sra2"].settings == {"projectors.mlp3.width": 192}
    own = Grid("own", {"repa": Variant("repa", {encoders: ("timm:other",)})})
    assert own.with_parts(parts).variants["repa"].settings[encoders] == ("timm:other",)
    assert TWO_BY_TWO.with_parts(parts) == TWO_BY_TWO
    assert not PROFILES["full"].parts, "there the recipes' own DINOv2 and projector"


def test_an_encoder_that_is_not_there_is_one_line_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SELFALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "study"
    words = ["study", "methods", "--data.name", "digits", "--out", str(out), "--profile", "smoke"]
    assert main([*words, "--encoders", "repa:dinov2-vit-b"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "variant 'repa'" in said[0] and "dinov2" in said[0]
    assert not out.exists()
