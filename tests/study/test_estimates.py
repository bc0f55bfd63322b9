"""Intervals against answers worked out by hand, and against made-up runs whose truth is known."""

import math

import numpy as np
import pytest

from selfalign.study.estimates import Estimate, Layout, PairErrors, own_spread

T_2 = 4.302652729911275  # 97.5 % quantile of Student's t with two degrees of freedom
T_1 = 12.706204736432095
VARIANTS = ("a", "b", "c", "d")


def layout(values: np.ndarray, errors: PairErrors | None = None) -> Layout:
    """From an array of variants × seeds; NaN is missing."""
    cells = {(VARIANTS[v], s): float(y) for (v, s), y in np.ndenumerate(values) if not np.isnan(y)}
    return Layout(cells, errors)


class TestOneMean:
    def test_three_seeds(self):
        mean = own_spread({0: 1.0, 1: 2.0, 2: 3.0})  # s = 1
        assert mean.mean == 2
        assert mean.half_width() == pytest.approx(T_2 / math.sqrt(3), rel=1e-9)
        assert mean.interval() == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-5)

    def test_two_seeds(self):
        assert own_spread({0: 0.0, 1: 2.0}).half_width() == pytest.approx(T_1, rel=1e-9)

    def test_one_seed_has_no_interval(self):
        alone = own_spread({0: 1.5})
        assert (
            alone.mean == 1.5 and alone.interval() is None and alone.as_json()["interval"] is None
        )
        assert alone.p_above() == 1

    def test_agreement_is_with_the_sign_of_the_mean(self):
        assert own_spread({0: -1, 1: -2, 2: 0.5}).agreeing == 2
        assert own_spread({0: 1, 1: -1}).agreeing == 0, "a mean of zero has no sign to agree with"

    def test_p_values_and_intervals_are_the_same_question(self):
        mean = own_spread({0: 0.9, 1: 1.0, 2: 1.3, 3: 0.2})
        low, _ = mean.interval(0.9)
        shifted = Estimate(
            {k: v - low for k, v in mean.values.items()}, mean.standard_error, mean.degrees
        )
        assert shifted.p_above() == pytest.approx(0.05)

    def test_without_any_spread_there_is_no_doubt(self):
        assert own_spread({0: 1.0, 1: 1.0}).p_above() == 0
        assert own_spread({0: -1.0, 1: -1.0}).p_above() == 1
        assert own_spread({0: 0.0, 1: 0.0}).p_above() == 1


class TestLayout:
    def test_luck_that_the_seeds_share_cancels(self):
        found = layout(np.array([[0.4, 1.4, 9.4], [0.5, 1.5, 9.5]])).weigh({"a": 1, "b": -1})
        assert found.mean == pytest.approx(-0.1) and found.standard_error == 0

    def test_two_variants_are_a_paired_t_test(self):
        values = np.array([[0.4, 0.6, 0.5], [0.5, 0.5, 0.49]])
        found = layout(values).weigh({"a": 1, "b": -1})
        difference = values[0] - values[1]
        assert found.values == pytest.approx(dict(enumerate(difference)))
        assert found.standard_error == pytest.approx(difference.std(ddof=1) / math.sqrt(3))
        assert found.degrees == 2

    def test_the_residual_is_pooled_over_the_layout(self):
        values = np.random.default_rng(0).normal(size=(4, 5))
        rest = values - values.mean(0) - values.mean(1)[:, None] + values.mean()
        variance, degrees = layout(values).residual
        assert degrees == 12 and variance == pytest.approx((rest**2).sum() / 12)
        weights = {"a": 1, "b": -1, "c": -1, "d": 1}
        assert layout(values).weigh(weights).standard_error == pytest.approx(
            math.sqrt(variance * 4 / 5)
        )

    def test_missing_runs_cost_their_seed_and_their_degrees(self):
        values = np.array([[1.0, 2.0, np.nan, 4.0], [1.5, np.nan, 3.5, 4.4], [1.0, 2.2, 3.0, 4.1]])
        found = layout(values).weigh({"a": 1, "b": -1})
        assert found.values == pytest.approx({0: -0.5, 3: -0.4})
        assert layout(values).residual[1] == 10 - 3 - 4 + 1
        assert layout(values[:2, 1:3]).weigh({"a": 1, "b": -1}) is None, "no seed has both"
        assert layout(np.full((4, 3), np.nan)).weigh({"a": 1, "b": -1}) is None

    def test_one_seed_or_one_variant_shows_no_spread(self):
        assert layout(np.ones((4, 1))).weigh({"a": 1, "b": -1}).standard_error is None
        assert layout(np.ones((1, 4))).residual == (0.0, 0)

    def test_coverage(self):
        """A planted effect lies within 95 % of the intervals, whatever seeds and variants add."""
        generator, covered, trials = np.random.default_rng(1), 0, 2000
        truth = np.array([0.3, 0.1, 0.7, 0.2])
        weights = {"a": 1, "b": -1, "c": -0.5, "d": 0.5}
        planted = truth @ list(weights.values())
        for _ in range(trials):
            luck = generator.normal(0, 3, 3)
            values = truth[:, None] + luck + generator.normal(0, 0.2, (4, 3))
            low, high = layout(values).weigh(weights).interval()
            covered += low <= planted <= high
        assert covered / trials == pytest.approx(0.95, abs=4 * math.sqrt(0.05 * 0.95 / trials))


class TestChoiceOfImages:
    """Held-out errors of all runs are of the same images, which seeds alone do not show."""

    IMAGES, BINS, PAIRS = 60, 4, 240

    def made_up(
        self,
        generator: np.random.Generator,
        seeds: int,
        of_images: float,
        of_seeds: float,
        of_both: float,
    ) -> Layout:
        """Two variants of equal expected loss, on images and with seeds drawn anew."""
        numbers = np.arange(self.PAIRS)
        images, bins = (numbers + numbers // self.BINS) % self.IMAGES, numbers % self.BINS
        errors = {}
        harder = generator.normal(0, of_images, (2, self.IMAGES))
        for seed in range(seeds):
            luck = generator.normal(0, 1)
            for v in range(2):
                own = generator.normal(0, of_seeds)
                both = generator.normal(0, of_both, self.IMAGES)
                errors[VARIANTS[v], seed] = 5 + bins + luck + own + (harder[v] + both)[images]
        values = np.array([[errors[v, s].mean() for s in range(seeds)] for v in VARIANTS[:2]])
        return layout(values, PairErrors(errors, images, bins))

    def test_variance_components_by_hand(self):
        """One pair an image, one bin: the crossed layout of a textbook."""
        u = np.random.default_rng(0).normal(size=(3, 5))
        found = PairErrors({("a", s): u[s] for s in range(3)}, np.arange(5), np.zeros(5, int))
        rest = u - u.mean(0) - u.mean(1)[:, None] + u.mean()
        expected = u.mean(0).var(ddof=1) / 5 - (rest**2).sum() / (2 * 4) / 15
        assert found.variance({"a": 1}, [0, 1, 2]) == (pytest.approx(max(0, expected)), 4)

    def test_a_single_image_adds_nothing(self):
        found = PairErrors({("a", 0): np.arange(4.0)}, np.zeros(4, int), np.zeros(4, int))
        assert found.variance({"a": 1}, [0])[0] == 0

    @pytest.mark.parametrize("of_images", [0.0, 0.5])
    @pytest.mark.parametrize("of_both", [0.0, 0.7])
    def test_coverage(self, of_images, of_both):
        generator, trials, covered, without = np.random.default_rng(2), 600, 0, 0
        for _ in range(trials):
            made = self.made_up(generator, 4, of_images, 0.05, of_both)
            low, high = made.weigh({"a": 1, "b": -1}).interval()
            covered += low <= 0 <= high
            low, high = Layout(made.values).weigh({"a": 1, "b": -1}).interval()
            without += low <= 0 <= high
        slack = 4 * math.sqrt(0.05 * 0.95 / trials)
        assert 0.95 - slack <= covered / trials <= 0.99
        if of_images and not of_both:
            assert without / trials < 0.7, "seeds alone know nothing of the images"
