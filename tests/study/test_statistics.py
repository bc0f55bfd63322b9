"""What is read off runs, and what a whole study says."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from study.synthetic import EFFECT, GRID, result

from selfalign.errors import UserError
from selfalign.study.plan import Study
from selfalign.study.results import ERRORS_FILE, RunResult, StudyResults
from selfalign.study.statistics import (
    Analysis,
    analyse,
    effect_trend,
    lay_out,
    mean_curve,
    metric_reading,
    timestep_reading,
    variant_mean,
)
from selfalign.study.verdicts import estimate_effect, register

LOSS = "heldout_loss"


def losses(by_variant: Mapping[str, list[float]], metric: str = LOSS) -> list[RunResult]:
    return [
        result(variant, seed, metrics={metric: value})
        for variant, values in by_variant.items()
        for seed, value in enumerate(values)
    ]


class TestReadings:
    def test_what_diverged_counts_as_missing(self):
        runs = losses({"sra": [math.inf, 0.4], "sra-as": [0.5, math.nan]})
        assert lay_out(runs, metric_reading(LOSS)).values == {("sra", 1): 0.4, ("sra-as", 0): 0.5}
        assert variant_mean(runs, "sra", metric_reading(LOSS)).values == {1: 0.4}
        assert variant_mean(runs, "sit", metric_reading(LOSS)) is None

    def test_bins_of_t(self):
        runs = [
            result("sra", heldout_by_timestep=[0.5, 0.6]),
            result("sra-as", heldout_by_timestep=[0.4, 0.7]),
        ]
        found = [
            estimate_effect(lay_out(runs, timestep_reading(k)), EFFECT, LOSS) for k in range(3)
        ]
        assert [e.difference and round(e.difference.mean, 9) for e in found] == [-0.1, 0.1, None]

    def test_curves_are_means_over_the_seeds_that_have_the_point(self):
        runs = [
            result("sit", 0, curves={LOSS: [(100, 1.0), (200, 0.5)]}),
            result("sit", 1, curves={LOSS: [(100, 3.0)]}),
        ]
        curve = mean_curve(runs, "sit", LOSS)
        assert [(step, mean.mean, len(mean.values)) for step, mean in curve] == [
            (100, 2.0, 2),
            (200, 0.5, 1),
        ]


class TestSampleEfficiency:
    @staticmethod
    def runs(small: list[float], large: list[float]) -> list[RunResult]:
        return [
            result(
                variant, seed, fraction, metrics={LOSS: 0.5 + difference * (variant == "sra-as")}
            )
            for fraction, differences in ((0.25, small), (1.0, large))
            for seed, difference in enumerate(differences)
            for variant in ("sra", "sra-as")
        ]

    @pytest.mark.parametrize(
        ("small", "large", "finding"),
        [
            ([-0.2, -0.21, -0.19], [-0.1, -0.1, -0.1], "helps"),
            ([-0.1, -0.1, -0.1], [-0.2, -0.21, -0.19], "hurts"),
            ([-0.1, 0.1, 0.0], [0.0, 0.0, 0.05], "cannot be told"),
            ([-0.1], [0.0], "cannot be told"),
            ([], [-0.1], "cannot be told"),
        ],
    )
    def test_the_change_between_the_ends(self, small, large, finding):
        trend = effect_trend(self.runs(small, large), EFFECT, LOSS, (0.25, 1.0))
        assert trend.finding == finding and (trend.change is None) == (not small)
        if small:
            expected = {k: a - b for k, (a, b) in enumerate(zip(small, large, strict=True))}
            assert trend.change.values == pytest.approx(expected)


class TestAnalysis:
    @staticmethod
    def analysis(
        runs: list[RunResult], fractions: tuple[float, ...] = (1.0,), registered: bool = True
    ) -> Analysis:
        registration = register(GRID, "fd_classifier", 3) if registered else None
        study = Study(GRID, {}, (0, 1, 2), fractions, registration=registration)
        return analyse(StudyResults(study, tuple(runs)))

    def test_nothing_is_done(self):
        found = self.analysis([])
        assert found.metrics == found.headline == () and found.exploratory == 0

    def test_the_headline_distance_is_the_one_that_was_measured(self):
        found = self.analysis(losses({"sit": [30.0]}, "fid"), registered=False)
        assert found.headline == ("fid",) and found.registration.metrics == (LOSS, "fid")
        assert not found.registered

    def test_headline_tests_and_the_others(self):
        runs = losses(
            {"sra": [0.5, 0.5, 0.5], "sra-as": [0.40, 0.41, 0.39], "sit": [0.6, 0.6, 0.6]}
        )
        found = self.analysis(runs)
        by_title = {e.effect.title: e for e in found.effects}
        assert by_title["Separation"].verdict == "supported" and by_title["Separation"].headline
        assert by_title["Both"].verdict == "undecided", "its runs are not there"
        unclaimed = by_title["Unclaimed"]
        assert unclaimed.finding == "helps" and unclaimed.verdict is None and not unclaimed.headline
        assert found.exploratory == 1

    def test_tables_and_effects_are_of_the_largest_fraction(self):
        runs = TestSampleEfficiency.runs([-0.2], [-0.1])
        found = self.analysis(runs, (0.25, 1.0))
        assert found.means["sra-as"][LOSS].mean == pytest.approx(0.4)
        assert found.effects[0].difference.mean == pytest.approx(-0.1)
        assert set(found.efficiency[LOSS]["sra-as"]) == {0.25, 1.0}

    def test_real_held_out_images(self):
        runs = [
            result("sra", s, metrics={"fid": 9.0}, heldout_images={"fid": 1.0 + s}) for s in (0, 1)
        ]
        assert self.analysis(runs).heldout_images == {"fid": 1.5}


class TestHeldOutErrors:
    """The choice of images is part of the interval where every run kept its errors."""

    @staticmethod
    def study(folder: Path, keep: int = 4) -> StudyResults:
        generator = np.random.default_rng(0)
        harder = {"sra": generator.normal(0, 1, 20), "sra-as": generator.normal(0, 1, 20)}
        runs = []
        for number, (variant, seed) in enumerate((v, s) for v in harder for s in (0, 1)):
            errors = 10 + harder[variant] + generator.normal(0, 0.01)
            runs.append(result(variant, seed, metrics={LOSS: errors.mean()}))
            run = folder / runs[-1].folder
            run.mkdir(parents=True)
            if number < keep:
                bins = np.zeros(20, np.int64)
                np.savez(
                    run / ERRORS_FILE,
                    heldout_loss=errors.astype("f4"),
                    images=np.arange(20),
                    bins=bins,
                )
        return StudyResults(Study(GRID, {}, (0, 1)), tuple(runs), folder=folder)

    def error(self, results: StudyResults) -> float:
        return analyse(results).effects[0].difference.standard_error

    def test_they_widen_it(self, tmp_path):
        with_errors = self.error(self.study(tmp_path / "a"))
        assert with_errors > 2 * self.error(self.study(tmp_path / "b", keep=3))

    @pytest.mark.parametrize(
        "damage",
        [
            lambda path: path.write_bytes(b"PK\x03\x04"),
            lambda path: path.write_bytes(b""),
            lambda path: np.savez(path, heldout_loss=np.zeros(20)),
            lambda path: np.savez(
                path, heldout_loss=np.zeros(3), images=np.zeros(2, int), bins=np.zeros(3, int)
            ),
            lambda path: np.savez(
                path, heldout_loss=np.zeros(3), images=-np.ones(3, int), bins=np.zeros(3, int)
            ),
            lambda path: np.savez(
                path, heldout_loss=np.zeros(3), images=np.full(3, 2**62), bins=np.zeros(3, int)
            ),
            lambda path: np.savez(
                path, heldout_loss=np.zeros(3), images=np.arange(3), bins=np.array([0, 0, 2**62])
            ),
            lambda path: np.savez(
                path, heldout_loss=np.zeros(3), images=np.arange(3), bins=np.array([0, 0, 2])
            ),
            lambda path: np.savez_compressed(
                path,
                heldout_loss=np.zeros(10**5),
                images=np.zeros(10**5, int),
                bins=np.zeros(10**5, int),
            ),
            lambda path: np.savez(
                path, heldout_loss=np.array(["a"] * 3), images=np.arange(3), bins=np.zeros(3, int)
            ),
            lambda path: np.savez(
                path, heldout_loss=np.array([{}] * 3), images=np.arange(3), bins=np.zeros(3, int)
            ),
        ],
    )
    def test_damaged_files_are_one_line(self, tmp_path, damage):
        results = self.study(tmp_path)
        damage(tmp_path / results.done[0].folder / ERRORS_FILE)
        with pytest.raises(UserError, match=ERRORS_FILE) as caught:
            analyse(results)
        assert "\n" not in str(caught.value)

    def test_errors_on_other_pairs_do_not_count(self, tmp_path):
        results = self.study(tmp_path)
        file = tmp_path / results.done[0].folder / ERRORS_FILE
        np.savez(file, heldout_loss=np.zeros(9), images=np.arange(9), bins=np.zeros(9, int))
        assert results.pair_errors(results.done, "heldout_loss") is None
