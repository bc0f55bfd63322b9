"""The grid of groups of a video's tokens."""

from pathlib import Path

from selfalign.recipes import recipe
from selfalign.study.grid_file import load_grid

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GRID = BENCHMARKS / "frames.yaml"


def test_pairs_differ_in_one_thing():
    """Groups by place or time are the settings of one field, and every variant is a recipe's."""
    grid = load_grid(GRID)
    assert len(grid.variants) == 10 and len(grid.effects) == 14
    for name, variant in grid.variants.items():
        config = recipe(variant.recipe, {"model.size": "tiny/4", **variant.settings})
        expected = {"tubes": "tubes", "frames": "stripes"}.get(name.split("-")[0], "random")
        assert config.views.partition == expected
        assert (config.views.attention == "separated") == name.endswith("-as")
    assert recipe("sra").partitions["stripes"].axis == 0, "frames of a video"


def test_the_longer_runs_are_two_of_its_variants():
    grid, longer = load_grid(GRID), load_grid(BENCHMARKS / "frames_longer.yaml")
    assert longer.variants.items() <= grid.variants.items()
    assert set(longer.effects) <= set(grid.effects)
