"""Means, paired effects, costs and sentences, against answers worked out by hand."""

import math
from collections.abc import Mapping

import pytest
from study.synthetic import EFFECT, GRID, result

from selfalign.study.grid import Effect
from selfalign.study.plan import Study
from selfalign.study.results import RunResult, StudyResults
from selfalign.study.sentences import (
    answer_sentence,
    bound_sentence,
    caution_sentences,
    claim_sentence,
    cost_sentence,
    count,
    effect_sentence,
    mean_with_interval,
    number,
    summary_sentence,
    trend_sentence,
)
from selfalign.study.statistics import (
    EffectEstimate,
    SeedMean,
    analyse,
    effect_trend,
    first_reaching,
    gain_interval,
    mean_curve,
    metric_reading,
    paired_difference,
    quality_cost,
    timestep_reading,
    variant_mean,
)

T_2 = 4.302652729911275  # 97.5 % quantile of Student's t with two degrees of freedom
T_1 = 12.706204736432095
LOSS = "heldout_loss"


def seeds(*values: float) -> SeedMean:
    return SeedMean(dict(enumerate(values)))


def losses(by_variant: Mapping[str, list[float]], metric: str = LOSS) -> list[RunResult]:
    return [
        result(variant, seed, metrics={metric: value})
        for variant, values in by_variant.items()
        for seed, value in enumerate(values)
        if value is not None
    ]


def estimate(
    with_: list[float], without: list[float], effect: Effect = EFFECT, metric: str = LOSS
) -> EffectEstimate:
    runs = losses({"sra-as": with_, "sra": without}, metric)
    return EffectEstimate(effect, metric, paired_difference(runs, effect, metric_reading(metric)))


NO_GAIN = Effect("Separation", "Does it help?", EFFECT.contrasts, "No, it does not.")


class TestIntervals:
    def test_three_seeds(self):
        mean = seeds(1.0, 2.0, 3.0)  # s = 1
        assert mean.mean == 2
        assert mean.half_width == pytest.approx(T_2 / math.sqrt(3), rel=1e-9)
        assert mean.interval == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-5)

    def test_two_seeds(self):
        assert seeds(0.0, 2.0).half_width == pytest.approx(T_1, rel=1e-9)  # s/sqrt(2) = 1

    def test_one_seed_has_none(self):
        assert seeds(1.5).mean == 1.5 and seeds(1.5).half_width is None
        assert seeds(1.5).interval is None and seeds(1.5).as_json()["interval"] is None

    def test_agreement_is_with_the_sign_of_the_mean(self):
        assert seeds(-1, -2, 0.5).agreeing == 2
        assert seeds(3, -1, -1).agreeing == 1
        assert seeds(1, -1).agreeing == 0, "a mean of zero has no sign to agree with"

    def test_a_gain_is_positive_whichever_way_the_metric_runs(self):
        low, high = seeds(1.0, 2.0, 3.0).interval
        assert gain_interval("class_consistency", seeds(1.0, 2.0, 3.0)) == (low, high)
        assert gain_interval(LOSS, seeds(1.0, 2.0, 3.0)) == (-high, -low)


class TestPairedDifferences:
    def test_luck_that_the_seeds_share_cancels(self):
        found = estimate([0.4, 1.4, 9.4], [0.5, 1.5, 9.5]).estimate
        assert found.difference.mean == pytest.approx(-0.1)
        assert found.difference.half_width == pytest.approx(0, abs=1e-9)
        assert found.without == pytest.approx(11.5 / 3)

    def test_contrasts_are_averaged_within_a_seed(self):
        effect = Effect("e", "?", (("a", "b"), ("c", "d")))
        runs = losses({"a": [1.0, 2.0], "b": [0.0, 0.0], "c": [5.0, 5.0], "d": [2.0, 1.0]})
        found = paired_difference(runs, effect, metric_reading(LOSS))
        assert found.difference.values == {0: 2.0, 1: 3.0} and found.without == 0.75

    def test_seeds_that_lack_a_run_are_left_out(self):
        found = estimate([0.4, 0.3, None], [0.5, None, 0.5]).estimate
        assert found.difference.values == pytest.approx({0: -0.1})
        assert estimate([0.4, None], [None, 0.5]).estimate is None

    def test_what_diverged_counts_as_missing(self):
        assert set(estimate([math.nan, 0.4], [0.5, 0.5]).estimate.difference.values) == {1}
        runs = losses({"sra": [math.inf, 0.4]})
        assert variant_mean(runs, "sra", metric_reading(LOSS)).values == {1: 0.4}
        assert variant_mean(runs, "sit", metric_reading(LOSS)) is None

    def test_bins_of_t(self):
        runs = [
            result("sra", heldout_by_timestep=[0.5, 0.6]),
            result("sra-as", heldout_by_timestep=[0.4, 0.7]),
        ]
        found = [paired_difference(runs, EFFECT, timestep_reading(k)) for k in range(3)]
        assert [d and round(d.difference.mean, 9) for d in found] == [-0.1, 0.1, None]


class TestVerdicts:
    better = [0.40, 0.41, 0.39], [0.50, 0.50, 0.50]
    worse = better[::-1]
    unclear = [0.4, 0.6, 0.5], [0.5, 0.5, 0.49]

    @pytest.mark.parametrize(
        ("values", "outcome", "of_gain", "of_no_gain"),
        [
            (better, "helps", "supported", "contradicted"),
            (worse, "hurts", "contradicted", "supported"),
            (unclear, "cannot be told", "undecided", "undecided"),
        ],
    )
    def test_whichever_way_they_fall(self, values, outcome, of_gain, of_no_gain):
        assert estimate(*values).outcome == outcome
        assert estimate(*values).verdict == of_gain
        assert estimate(*values, NO_GAIN).verdict == of_no_gain
        unclaimed = Effect("e", "?", EFFECT.contrasts)
        assert estimate(*values, unclaimed).verdict is None

    def test_higher_is_better_turns_it_round(self):
        assert estimate(*self.better, metric="class_consistency").outcome == "hurts"

    def test_one_seed_decides_nothing(self):
        assert estimate([0.1], [0.9]).verdict == "undecided"


class TestSentences:
    def test_helps(self):
        assert effect_sentence(estimate(*TestVerdicts.better)) == (
            "Helps: the held-out denoising loss is 0.100 lower on average, 20 % of 0.5000 (95 % interval "
            "0.0752 to 0.125 lower; all three seeds agree)."
        )
        assert claim_sentence(estimate(*TestVerdicts.better)) == (
            "The paper’s claim that it helps is supported here."
        )

    def test_hurts(self):
        found = estimate(*TestVerdicts.worse, NO_GAIN)
        assert effect_sentence(found).startswith(
            "Hurts: the held-out denoising loss is 0.100 higher"
        )
        assert "0.0752 to 0.125 higher" in effect_sentence(found)
        assert claim_sentence(found).endswith("is supported here, and more: it hurts.")
        assert "contradicted" in claim_sentence(estimate(*TestVerdicts.worse))
        assert bound_sentence(found) == ""

    def test_cannot_be_told_says_how_much_is_still_possible(self):
        found = estimate(*TestVerdicts.unclear, NO_GAIN)
        low, high = found.estimate.difference.interval
        text = effect_sentence(found)
        assert text.startswith("Cannot be told from three seeds: the held-out denoising loss is ")
        assert f"from {number(-low)} lower to {number(high)} higher" in text
        assert "two of three seeds point that way" in text
        assert bound_sentence(found) == (
            f"That is no proof of no effect: the interval still allows a gain of up to {number(-low)} "
            f"({number(-100 * low / 0.4966666, 2)} % of 0.4967) and a loss of up to {number(high)} "
            f"({number(100 * high / 0.4966666, 2)} % of 0.4967)."
        )
        assert "left undecided" in claim_sentence(found)

    def test_one_seed(self):
        text = effect_sentence(estimate([0.4], [0.5]))
        assert text.startswith("Cannot be told from one seed, which has no interval")
        assert "0.100 lower (20 %)" in text
        assert "one seed cannot tell" in answer_sentence([estimate([0.4], [0.5])]).lower()
        assert bound_sentence(estimate([0.4], [0.5])) == ""

    def test_nothing_yet(self):
        assert effect_sentence(estimate([], [])).startswith("Not known yet")
        assert "is not known yet" in answer_sentence([estimate([], [])])

    def test_no_difference_at_all(self):
        assert effect_sentence(estimate([0.5, 0.5], [0.5, 0.5])).startswith("Makes no difference")

    def test_an_answer_holds_both_headline_metrics_and_the_claim(self):
        both = [
            estimate(*TestVerdicts.better),
            estimate(*TestVerdicts.unclear, metric="fd_classifier"),
        ]
        text = answer_sentence(both)
        assert text.startswith("It improves the held-out denoising loss by 20 % (−0.10, ")
        assert "and for the Fréchet distance it cannot be told (" in text
        assert text.endswith(
            "The paper says that it helps: supported on the held-out denoising loss and undecided on the "
            "Fréchet distance here."
        )

    def test_numbers(self):
        assert [number(v) for v in (0.00123456, 12.345, -1234.5, 0, 5.4e-7)] == [
            "0.00123",
            "12.3",
            "−1,234",
            "0",
            "5.40·10⁻⁷",
        ]
        assert mean_with_interval(seeds(1.0, 2.0, 3.0)) == "2.0 ± 2.5"
        assert mean_with_interval(seeds(0.5, 0.5)) == "0.500 ± 0"
        assert mean_with_interval(seeds(0.5)) == "0.500 (1 seed)"
        assert count(1, "seed") == "one seed" and count(20, "seed") == "20 seeds"


class TestComputeToQuality:
    curve = ((100, 1.0), (200, 0.6), (300, 0.4))

    @pytest.mark.parametrize(
        ("target", "step"), [(0.5, 250.0), (0.6, 200.0), (0.9, 125.0), (1.5, 100.0), (0.3, None)]
    )
    def test_interpolation(self, target, step):
        assert first_reaching(self.curve, target, "lower") == pytest.approx(step)
        rising = [(at, -value) for at, value in self.curve]
        assert first_reaching(rising, -target, "higher") == pytest.approx(step)

    def test_the_first_time_counts(self):
        dip = [(100, 1.0), (200, 0.5), (300, 0.9), (400, 0.5)]
        assert first_reaching(dip, 0.5, "lower") == 200

    def test_costs_are_those_of_the_same_seed(self):
        runs = [
            result("sit", 0, curves={LOSS: [(100, 1.0), (300, 0.5)]}),
            result("sit", 1, curves={LOSS: [(100, 1.0), (300, 0.3)]}),
            result("sra", 0, curves={LOSS: self.curve}, flops_per_step=3e9, seconds_per_step=1.0),
            result("sra", 1, curves={LOSS: self.curve}, flops_per_step=3e9, seconds_per_step=1.0),
            result("sra", 2, curves={LOSS: self.curve}),
        ]
        cost = quality_cost(runs, "sra", "sit", LOSS)
        assert cost.steps == {0: 250.0, 1: None} and cost.reached == 1
        assert cost.flops == {0: 250 * 3e9} and cost.seconds == {0: 250.0}
        assert cost.relative_flops == {0: pytest.approx(250 * 3e9 / (300 * 2e9))}
        assert cost_sentence(cost, "sit") == (
            "sra reaches the held-out denoising loss at which sit ends with 1.2 × its arithmetic in one of "
            "two seeds."
        )
        assert quality_cost(runs, "self-flow", "sit", LOSS) is None

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
        ("small", "large", "told"),
        [
            ([-0.2, -0.21, -0.19], [-0.1, -0.1, -0.1], "it is worth more with 25 %"),
            ([-0.1, -0.1, -0.1], [-0.2, -0.21, -0.19], "it is worth less with 25 %"),
            ([-0.1, 0.1, 0.0], [0.0, 0.0, 0.05], "cannot be told from three seeds"),
            ([-0.1], [0.0], "cannot be told from one seed"),
            ([], [-0.1], "not known yet"),
        ],
    )
    def test_the_change_between_the_ends(self, small, large, told):
        trend = effect_trend(self.runs(small, large), EFFECT, LOSS, (0.25, 1.0))
        assert told in trend_sentence(trend)
        if small:
            expected = {k: a - b for k, (a, b) in enumerate(zip(small, large, strict=True))}
            assert trend.change.values == pytest.approx(expected)


class TestAnalysis:
    @staticmethod
    def analysis(runs: list[RunResult], fractions: tuple[float, ...] = (1.0,)):
        return analyse(StudyResults(Study(GRID, {}, (0, 1, 2), fractions), tuple(runs)))

    def test_nothing_is_done(self):
        found = self.analysis([])
        assert found.metrics == found.headline == () and found.intervals == 0
        assert summary_sentence(found) == ""

    def test_the_headline_distance_is_the_one_that_was_measured(self):
        found = self.analysis(losses({"sit": [30.0]}, "fid"))
        assert found.headline == ("fid",)

    def test_claims_and_intervals_are_counted(self):
        runs = losses({"sra": [0.5, 0.5, 0.5], "sra-as": [0.40, 0.41, 0.39]})
        found = self.analysis(runs + losses({"sra-dts-as": [0.4, 0.6, 0.5]}))
        assert found.intervals == 2, "nothing is known of sit, hence of the third effect"
        assert summary_sentence(found) == (
            "The paper makes two claims. On the held-out denoising loss, one is supported and one is "
            "undecided."
        )
        told = " ".join(caution_sentences(found, 3))
        assert "shows 2 intervals" in told and "none is corrected" in told and "two degrees" in told
        assert "no interval" in caution_sentences(found, 1)[0]

    def test_tables_and_effects_are_of_the_largest_fraction(self):
        runs = TestSampleEfficiency.runs([-0.2], [-0.1])
        found = self.analysis(runs, (0.25, 1.0))
        assert found.means["sra-as"][LOSS].mean == pytest.approx(0.4)
        assert found.effects[0].estimate.difference.mean == pytest.approx(-0.1)
        assert set(found.efficiency[LOSS]["sra-as"]) == {0.25, 1.0}
