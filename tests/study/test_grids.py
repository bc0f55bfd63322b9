"""The grids that a study can be named by, and what their reports tell besides effects."""

import dataclasses
import json
from pathlib import Path

import pytest
from study.synthetic import GRID, SETTINGS, result, write_synthetic_study

from selfalign import UserError, resolve
from selfalign.study.estimates import Layout
from selfalign.study.grid import Effect, Grid, Variant, choosing_seeds
from selfalign.study.grids import GRIDS
from selfalign.study.plan import Study, read_study, write_study
from selfalign.study.report import write_report
from selfalign.study.results import StudyResults
from selfalign.study.statistics import analyse, choose_tuned
from selfalign.study.verdicts import register

LOSS = "heldout_loss"


@pytest.mark.parametrize("name", GRIDS)
def test_every_run_can_be_trained_and_every_effect_has_its_pool(name: str, tmp_path: Path) -> None:
    grid, _ = GRIDS[name]
    study = Study(grid, SETTINGS, (0, 1))
    side = 28 if name == "patches-4-2" else 8
    for job in study.jobs():
        resolve(job.config, 1, (side, side), 10)
        if job.after is not None:
            assert job.after.seed == job.seed and job.after.name in {j.name for j in study.jobs()}
    for effect in grid.effects:
        assert set(effect.weights) <= set(grid.pool(effect))
    write_study(tmp_path / "study", study)
    assert read_study(tmp_path / "study").jobs() == study.jobs(), "what is written is what is read"


@pytest.mark.parametrize(
    "name", ["2x2", "stratified", "learning-rates", "no-alignment", "patches-4-2-1", "patches-4-2"]
)
def test_where_the_corners_are_varied_the_cost_of_separation_is_told_of_each(name: str) -> None:
    """Of every separated variant against the one that differs from it in attention alone."""
    grid, _ = GRIDS[name]
    separated = {n for n, variant in grid.variants.items() if variant.recipe.endswith("-as")}
    assert dict(grid.separations).keys() == separated and len(grid.separations) == len(separated)
    for one, other in grid.separations:
        assert grid.variants[other].recipe == grid.variants[one].recipe.removesuffix("-as")
        assert grid.variants[other].settings == grid.variants[one].settings


def test_the_stratified_corners_are_the_corners_with_another_schedule() -> None:
    grid, seeds = GRIDS["stratified"]
    assert seeds == 10
    for name, variant in grid.variants.items():
        if name.endswith("_stratified"):
            kind = "stratified-independent" if "dts" in name else "stratified"
            assert variant.settings == {"views.timesteps": kind}
            assert variant.recipe == name.removesuffix("_stratified")


def test_what_is_tuned_is_chosen_by_the_first_seeds_and_judged_by_the_others() -> None:
    values = {("low", 0): 0.3, ("low", 1): 0.5, ("high", 0): 0.4, ("high", 1): 0.1}
    assert choose_tuned({"best": ("low", "high")}, Layout(values), (0,)) == {"best": "low"}
    assert choose_tuned({"best": ("low", "high")}, Layout(values), (0, 1)) == {"best": "high"}
    assert choose_tuned({"best": ("low", "high")}, Layout(values), (2,)) == {}
    assert [choosing_seeds(seeds) for seeds in (1, 3, 5, 6, 10)] == [1, 1, 1, 2, 3]
    grid, _ = GRIDS["learning-rates"]
    tuned, plain = grid.effects[0], grid.effects[-1]
    assert grid.judging(tuned, 4) == 3 and grid.judging(plain, 4) == 4


def test_no_effect_is_found_between_names_that_are_tuned_alike() -> None:
    """Choosing the best of several runs must not look like a gain: planted are no differences."""
    import numpy as np

    names = {f"{name} tuned": tuple(f"{name}_{k}" for k in range(4)) for name in ("a", "b")}
    grid = Grid(
        "tuned",
        {name: Variant("sra") for several in names.values() for name in several},
        effects=(Effect("Switch", "Does it help?", (("a tuned", "b tuned"),), "Yes."),),
        tuned=names,
    )
    generator, false, biased = np.random.default_rng(0), 0, []
    trials = 300
    for _ in range(trials):
        runs = [
            result(name, seed, metrics={LOSS: 0.5 + 0.01 * generator.normal()})
            for name in grid.variants
            for seed in range(5)
        ]
        study = Study(grid, SETTINGS, tuple(range(5)), registration=register(grid, "fid", 5))
        (effect,) = analyse(StudyResults(study, tuple(runs))).effects
        false += effect.p_values["differs"] < 0.05
        biased.append(effect.reference)
    assert false / trials < 0.08
    assert np.mean(biased) == pytest.approx(0.5, abs=0.001), "nor does the chosen one look better"


TOLD = dataclasses.replace(
    GRID,
    separations=(("sra-as", "sra"),),
    shares=(("Separation", "Both"),),
    tuned={"best": ("sit", "sra"), "other": ("sra-as", "sra-dts-as")},
    effects=(*GRID.effects, Effect("Tuned", "Is it better tuned?", (("other", "best"),))),
    pools=(("sra", "sra-as"),),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports") / "study"
    metrics = (LOSS, "fd_classifier", "class_consistency", "heldout_separated")
    write_synthetic_study(folder, grid=TOLD, metrics=metrics)
    write_report(folder)
    return folder


class TestReport:
    def test_numbers(self, folder: Path) -> None:
        numbers = json.loads((folder / "report.json").read_text())
        (cost,) = numbers["separation_costs"]["1"]
        own, whole = cost["C_own"]["mean"], cost["C_whole"]["mean"]
        assert cost["R"]["value"] == pytest.approx(1 - whole / own)
        assert cost["C_whole"]["degrees_of_freedom"] == 2, "pooled over its own two variants"
        assert {share["metric"] for share in numbers["shares"]} == {LOSS, "fd_classifier"}
        assert numbers["tuned"]["best"] in ("sit", "sra")
        tuned = next(
            e for e in numbers["effects"] if e["effect"] == "Tuned" and e["metric"] == LOSS
        )
        assert tuned["difference"]["mean"] < 0

    def test_page(self, folder: Path) -> None:
        text = (folder / "report.html").read_text()
        for heading in ("What separation costs", "Which share one effect is of another"):
            assert f">{heading}</h2>" in text
        assert "Compute to quality" in text and "Kaplan and Meier" in text
        assert "Label reliance over t" not in text, "it was not measured"

    def test_a_falling_learning_rate_tells_no_compute_to_quality(self, tmp_path: Path) -> None:
        settings = {**SETTINGS, "training.schedule": "cosine"}
        write_synthetic_study(tmp_path / "s", settings=settings, seeds=(0,))
        text = write_report(tmp_path / "s").read_text()
        assert "Not told: the learning rate falls" in text and "Kaplan and Meier" not in text
        assert json.loads((tmp_path / "s" / "report.json").read_text())["compute_to_quality"] == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"separations": (("sit", "nobody"),)}, "separations of grid small: there is no variant"),
        ({"tuned": {"best": ("nobody",)}}, "there is no variant 'nobody'"),
        ({"tuned": {"sit": ("sra",)}, "effects": ()}, "a name that no variant has"),
        ({"shares": (("Separation", "Nothing"),)}, "'Nothing' is no effect's title"),
        ({"pools": (("sit", "nobody"),)}, "there is no variant 'nobody'"),
        (
            {"variants": {**GRID.variants, "first": Variant("sra", after="last")}},
            "after is 'last', which is no variant before it",
        ),
        (
            {
                "tuned": {"best": ("sit", "sra")},
                "effects": (Effect("Mixed", "?", (("best", "sra-as"),)),),
            },
            "compares tuned variants with others",
        ),
    ],
)
def test_refusals(changes: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as caught:
        dataclasses.replace(GRID, **changes)
    assert said in str(caught.value)
