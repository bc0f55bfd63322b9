"""Grids: the paper's, and those of a user's files."""

from pathlib import Path

import pytest

from selfalign import RunConfig, recipe
from selfalign.config import config_to_dict
from selfalign.errors import UserError
from selfalign.study.grid import Effect, Grid, Table, Variant
from selfalign.study.grid_file import load_grid
from selfalign.study.paper import PAPER, TWO_BY_TWO

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
        def leaves(name: str, held: object) -> dict[str, object]:
            if not isinstance(held, dict):
                return {name: held}
            inner = (leaves(f"{name}.{key}".strip("."), value) for key, value in held.items())
            return {key: value for part in inner for key, value in part.items()}

        return leaves("", config_to_dict(config))

    trees = []
    for variant in (PAPER.variants[name], PAPER.variants[other]):
        trees.append(flat(recipe(variant.recipe, variant.settings)))
    return {name for name in trees[0].keys() | trees[1] if trees[0].get(name) != trees[1].get(name)}


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
    # With one group there is nothing to share out, and nothing for a teacher to see in groups.
    groups = {"views.mask_ratios", "targets.ema.groups"}
    switches = {
        "Dual timesteps, full attention": {"views.timesteps", *groups},
        "Dual timesteps, separated attention": {"views.timesteps"},
        "Separation, single timestep": {"views.attention", *groups},
        "Separation, dual timesteps": {"views.attention"},
    }
    for effect in PAPER.effects[:4]:
        ((with_, without),) = effect.contrasts
        assert _differences(with_, without) == switches[effect.title]


def test_the_interaction_is_a_difference_of_differences() -> None:
    """Separation alone costs as well; that is no interaction, and subtracted."""
    interaction = PAPER.effects[-1]
    assert interaction.weights == {"sra-dts": 1, "sra": -1, "sra-dts-as": -1, "sra-as": 1}
    assert interaction.half_of == PAPER.effects[0].title
    assert TWO_BY_TWO.effects == PAPER.effects and set(TWO_BY_TWO.variants) == set(
        interaction.weights
    )


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


ONE = "variants: {a: {recipe: sit}, b: {recipe: sra}}\n"


def _effect(contrasts: str, more: str = "") -> str:
    return ONE + f"effects: [{{title: e, question: q, contrasts: {contrasts}{more}}}]"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("variants: {a: {recipe: nothing}}", "a.yaml, variant 'a': recipe is 'nothing': al"),
        ("variants: {a: {recipe: sra, setings: {}}}", "variant 'a': .*no field 'setings'"),
        ("variants: {a: {recipe: sra, settings: [1]}}", "variant 'a': settings: Expected"),
        ("variants: {a: {recipe: [1]}}", "variant 'a': recipe: Expected `str`"),
        ("variants: {a: sra}", "variant 'a': Expected `object`"),
        ("variants: [a]", "is not a grid: variants"),
        ("variants: [", "is not a grid"),
        ("[" * 3000, "is not a grid"),
        ("variants: &x {a: *x}", "is not a grid: RecursionError"),
        ("\x00\x01", "is not a grid"),
        ("nothing", "is not a grid"),
        ("", "is not a grid"),
        ("- a", "is not a grid"),
        ("tables: []", "is not a grid.*variants"),
        ("variants: {}", "no variants"),
        ("variants: {a: {recipe: sra, settings: {views.colour: 1}}}", "views.colour"),
        ("variants: {a: {recipe: sra, settings: {training.steps: x}}}", "'a': training.s"),
        (ONE + "tables: [{title: T, rows: [c]}]", "there is no variant 'c'; there are a, b"),
        (ONE + "tables: 5", "tables: Expected `array`, got `str`"),
        (ONE + "baseline: [a]", "a.yaml: baseline: Expected"),
        (ONE + "colour: red", "no field 'colour'"),
        (ONE + "tables: [{title: T, rows: [{variant: a, paper: {FID: x}}]}]", "Expected `float`"),
        (ONE + "tables: [{title: T, rows: []}, {title: T, rows: []}]", "'T' stands twice"),
        (_effect("[a]"), r"effects\[.*\].contrasts.*: Expected"),
        (_effect("[[a]]"), "length 2, got 1"),
        (_effect("[[a, b, a]]"), "length 2, got 3"),
        (_effect("[]"), "has no contrasts"),
        (_effect("[[a, a]]"), "compares 'a' with itself"),
        (_effect("[[a, c]]"), "no variant 'c'"),
        (_effect("[[a, b]]", ", half_of: f"), "half_of is 'f'"),
        (_effect("[[a, b]]", ", question: r"), "'question' stands twice"),
        (_effect("[[a, b]]", ', claim: "\\ud800"'), "holds the characters"),
        (ONE + "variants: {}", "'variants' stands twice"),
        ("variants:\n  a: {recipe: sit}\n  a: {recipe: sra}", "'a' stands twice .*line 2"),
        (
            "variants: {a: {recipe: sra, settings: {alignment.weight: 1, terms.alignment.weight: 2}}}",
            "a.yaml, variant 'a': alignment.weight is given twice",
        ),
        (
            "variants: {a: {recipe: sit, settings: {training.steps: 1, training: {seed: 2}}}}",
            "a.yaml, variant 'a': training is given twice",
        ),
        ("variants: {a: {recipe: !!python/name:os.system }}", "tags are not allowed"),
        ("variants: {? [a] : {recipe: sit}}", "a key is no word"),
    ],
)
def test_wrong_yaml_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    _require_one_line(tmp_path / "a.yaml", text, said)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.py", "1/0", "cannot be run: ZeroDivisionError"),
        ("a.py", "import sys; sys.exit(0)", "cannot be run: SystemExit"),
        ("a.py", "def", "cannot be run: SyntaxError"),
        ("a.py", "GRID = 3", "must define GRID"),
        ("a.py", "from selfalign.study.grid import *\nGRID = Grid('g', {})", "a.py: .*no variants"),
        ("a.txt", "", "neither a .py nor a .yaml"),
    ],
)
def test_other_wrong_files_are_one_line(tmp_path: Path, name: str, text: str, said: str) -> None:
    _require_one_line(tmp_path / name, text, said)


def _require_one_line(file: Path, text: str, said: str) -> None:
    file.write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        load_grid(file)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        ".",
        "..",
        "../x",
        "/etc",
        "a\\..\\b",
        "a//b",
        "a/",
        "a\0b",
        "a\nb",
        "\ud800",
        "\x1b[31m",
        "x" * 301,
    ],
)
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="name") as caught:
        Grid("g", {name: Variant("sit")})
    assert str(caught.value).isprintable()


def test_names_that_only_hold_a_slash() -> None:
    assert Grid("g", {name: Variant("sit") for name in ("1/2", "<b>a</b>", "[/x]", "$\\frac$")})
    with pytest.raises(UserError, match="a path is no name"):
        Grid("g", {name: Variant("sit") for name in ("a", "a/seed_0")})


def test_files_that_are_no_grids_by_their_size_alone(tmp_path: Path) -> None:
    path = tmp_path / "g.yaml"
    path.write_bytes(b"#" * (2**22 + 1))
    with pytest.raises(UserError, match=r"has 4,194,305 bytes; allowed are 4,194,304"):
        load_grid(path)


@pytest.mark.parametrize(
    ("name", "option"), [("seed", "--seeds"), ("data.train_fraction", "--data.train-fraction")]
)
def test_what_the_study_gives_is_no_variants(name: str, option: str) -> None:
    with pytest.raises(UserError, match=f"{name} is 1: the study gives it, by {option}"):
        Variant("sit", {name: 1})


def test_aliases_do_not_multiply(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 9)]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError, match="aliases included"):
        load_grid(tmp_path / "a.yaml")


def test_words_of_yaml_are_what_they_look_like(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-3 as text, on as True, 12:30 as 750 and a date as a date."""
    (tmp_path / "g.yaml").write_text(
        "variants:\n"
        "  0.25: {recipe: sit, settings: {training.learning_rate: 1e-3}}\n"
        "  on: {recipe: sit, settings: {training.steps: 1e1, training.compile: yes}}\n"
        "  1e-3: {recipe: sit, settings: {data.root: 2024-01-01}}\n"
        "  null: {recipe: sit, settings: {data.root: '7', training.adam_betas: [.9, 0.99]}}\n"
        "  010: &base {recipe: sit}\n"
        "  12:30: {<<: *base, recipe: sra}\n"
        "baseline: on\n"
        "tables: [{title: 1, rows: [0.25, on, 1e-3, null, 010, 12:30]}]\n"
        "effects: [{title: 2, question: yes, contrasts: [[on, 0.25]]}]\n"
    )
    grid = load_grid(tmp_path / "g.yaml")
    assert list(grid.variants) == ["0.25", "on", "1e-3", "null", "010", "12:30"]
    assert [row.variant for row in grid.tables[0].rows] == list(grid.variants)
    assert grid.baseline == "on" and grid.effects[0].contrasts == (("on", "0.25"),)
    settings = [variant.settings for variant in grid.variants.values()]
    assert settings[0] == {"training.learning_rate": 1e-3}
    assert settings[1] == {"training.steps": 10, "training.compile": True}
    assert settings[2] == {"data.root": "2024-01-01"}
    assert settings[3] == {"data.root": "7", "training.adam_betas": [0.9, 0.99]}
    assert grid.variants["12:30"].recipe == "sra"


def test_an_effect_is_a_weighted_sum() -> None:
    effect = Effect("e", "?", (("ds", "s"),), minus=(("da", "a"),))
    assert effect.weights == {"ds": 1, "s": -1, "da": -1, "a": 1}
    mean = Effect("e", "?", (("a", "b"), ("c", "b")))
    assert mean.weights == {"a": 0.5, "b": -1, "c": 0.5} and mean.reference == {"b": 1}
    assert [
        Effect("e", "?", (("a", "b"),), c).expected for c in ("Yes, x", "No.", "Equal", "")
    ] == [
        "gain",
        "no gain",
        "equal",
        "",
    ]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist: allowed are paper"):
        load_grid(tmp_path / "none.yaml")


def test_empty_grid_is_refused() -> None:
    with pytest.raises(UserError, match="no variants"):
        Grid("empty", {})


def test_rows_may_be_fewer_than_variants() -> None:
    assert Grid("one", {"a": Variant("sit")}, (Table("none", ()),)).baseline == "a"
