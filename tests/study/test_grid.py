"""Grids: the paper's, and those of a user's files."""

import dataclasses
from pathlib import Path

import pytest

from selfalign import RunConfig, recipe
from selfalign.errors import UserError
from selfalign.study.grid import Grid, Table, Variant, load_grid
from selfalign.study.paper import PAPER

YAML = """
variants:
  plain: {recipe: sra}
  mixed:
    recipe: sra-dts-as
    settings: {views.whole_image_fraction: 0.5}
tables:
  - title: Mixing
    rows: [plain, {variant: mixed, factors: {mixing: "0.5"}, paper: {FID: 24.15}}]
effects:
  - title: Mixing
    question: Does it help?
    contrasts: [[mixed, plain]]
"""


def _differences(name: str, other: str) -> set[str]:
    """Fields in which two of the paper's variants differ."""

    def flat(config: RunConfig) -> dict[str, object]:
        tree = dataclasses.asdict(config)
        return {
            f"{section}.{field}": value
            for section, values in tree.items()
            if isinstance(values, dict)
            for field, value in values.items()
        }

    trees = []
    for variant in (PAPER.variants[name], PAPER.variants[other]):
        trees.append(flat(recipe(variant.recipe, variant.settings)))
    return {field for field in trees[0] if trees[0][field] != trees[1][field]}


def test_paper_covers_its_tables_once() -> None:
    rows = [row.variant for table in PAPER.tables for row in table.rows]
    assert set(rows) == set(PAPER.variants)
    assert len(rows) == 22 and len(PAPER.variants) == 13
    settings = [recipe(v.recipe, v.settings) for v in PAPER.variants.values()]
    assert len({repr(tree) for tree in settings}) == 13, "no point of the space runs twice"


def test_paper_figures() -> None:
    two_by_two = {row.variant: row.paper for row in PAPER.tables[0].rows}
    assert two_by_two["sra"]["FID 100K"] == 62.95
    assert two_by_two["sra-dts-as"] == {
        "FID 100K": 58.57,
        "IS 100K": 25.20,
        "FID 400K": 29.89,
        "IS 400K": 58.29,
        "FID 800K": 25.06,
        "IS 800K": 72.94,
    }


def test_contrasts_differ_in_their_switch_alone() -> None:
    cross_noise, noise_state, partial_view = PAPER.effects
    for with_, without in cross_noise.contrasts:
        assert _differences(with_, without) == {"views.attention"}
    for with_, without in noise_state.contrasts:
        # With one group there is nothing to share out, and nothing for a teacher to see in groups.
        groups = {"views.mask_ratios", "alignment.teacher_groups"} if without == "sra" else set()
        assert _differences(with_, without) == {"views.timesteps", *groups}
    for with_, without in partial_view.contrasts:
        assert _differences(with_, without) == {
            "views.attention",
            "views.mask_ratios",
            "alignment.teacher_groups",
        }


def test_yaml_and_python_describe_the_same(tmp_path: Path) -> None:
    (tmp_path / "mixing.yaml").write_text(YAML)
    grid = load_grid(tmp_path / "mixing.yaml")
    assert grid.name == "mixing" and grid.baseline == "plain"
    assert grid.tables[0].rows[1].paper == {"FID": 24.15}
    (tmp_path / "mixing.py").write_text(
        "from selfalign.study.grid import *\n"
        "GRID = Grid('mixing', {'plain': Variant('sra'), 'mixed': Variant('sra-dts-as',\n"
        "    {'views.whole_image_fraction': 0.5})},\n"
        "    (Table('Mixing', (Row('plain'), Row('mixed', {'mixing': '0.5'}, {'FID': 24.15}))),),\n"
        "    (Effect('Mixing', 'Does it help?', (('mixed', 'plain'),)),))\n"
    )
    assert load_grid(tmp_path / "mixing.py") == grid


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.yaml", "variants: {a: {recipe: nothing}}", "recipe is 'nothing': allowed are sit"),
        ("a.yaml", "variants: {a: {recipe: sra, setings: {}}}", "is not a grid.*setings"),
        ("a.yaml", "variants: [", "is not a grid"),
        ("a.yaml", "nothing", "is not a grid"),
        ("a.yaml", "tables: []", "is not a grid.*variants"),
        (
            "a.yaml",
            "variants: {a: {recipe: sra, settings: {views.colour: 1}}}",
            "views.colour",
        ),
        (
            "a.yaml",
            "variants: {a: {recipe: sra}}\ntables: [{title: T, rows: [b]}]",
            "there is no variant 'b'; there are a",
        ),
        ("a.py", "1/0", "cannot be run: ZeroDivisionError"),
        ("a.py", "GRID = 3", "must define GRID"),
        ("a.txt", "", "neither a .py nor a .yaml"),
    ],
)
def test_wrong_files_are_one_line(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        load_grid(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist: allowed are paper"):
        load_grid(tmp_path / "none.yaml")


def test_empty_grid_is_refused() -> None:
    with pytest.raises(UserError, match="no variants"):
        Grid("empty", {})


def test_rows_may_be_fewer_than_variants() -> None:
    assert Grid("one", {"a": Variant("sit")}, (Table("none", ()),)).baseline == "a"
