"""Verdicts, whichever way they fall, and how often they are wrong on made-up runs with planted effects."""

import math

import numpy as np
import pytest

from selfalign.study.estimates import Estimate, Layout
from selfalign.study.grid import Effect
from selfalign.study.paper import TWO_BY_TWO
from selfalign.study.plan import Registration
from selfalign.study.verdicts import (
    HYPOTHESES,
    LEVEL,
    EffectEstimate,
    adjust,
    chance_of_equal,
    estimate_effect,
    holm,
    margin_weights,
    register,
    smallest_detectable,
    unit_error,
)

LOSS = "heldout_loss"
GAIN = Effect("e", "?", (("new", "old"),), "Yes, it does.")
NO_GAIN = Effect("e", "?", (("new", "old"),), "No, it does not.")
EQUAL = Effect("e", "?", (("new", "old"),), "Equal: it is.")
REGISTRATION = Registration(("e",), (LOSS,), {LOSS: 0.1}, LEVEL, 3)


def estimate(new, old, effect=GAIN, metric=LOSS, registration=REGISTRATION) -> EffectEstimate:
    """One effect on one metric, which is the only headline test."""
    cells = {("new", s): v for s, v in enumerate(new)} | {("old", s): v for s, v in enumerate(old)}
    margin = margin_weights(effect, metric, [effect], registration)
    return adjust([estimate_effect(Layout(cells), effect, metric, margin)], registration)[0]


class TestWhicheverWayTheyFall:
    """The margin is a tenth of 0.5."""

    better = [0.40, 0.41, 0.39], [0.50, 0.50, 0.50]
    worse = better[::-1]
    same = [0.50, 0.51, 0.49], [0.50, 0.505, 0.495]
    unclear = [0.4, 0.6, 0.5], [0.5, 0.5, 0.49]

    @pytest.mark.parametrize(
        ("values", "finding", "of_gain", "of_no_gain", "of_equal"),
        [
            (better, "helps", "supported", "refuted", "refuted"),
            (worse, "hurts", "refuted", "supported", "refuted"),
            (same, "equal", "equal", "supported", "supported"),
            (unclear, "cannot be told", "undecided", "undecided", "undecided"),
        ],
    )
    def test_of_all_claims(self, values, finding, of_gain, of_no_gain, of_equal):
        assert estimate(*values).finding == finding
        for effect, verdict in ((GAIN, of_gain), (NO_GAIN, of_no_gain), (EQUAL, of_equal)):
            assert estimate(*values, effect).verdict == verdict
        assert estimate(*values, Effect("e", "?", GAIN.contrasts)).verdict is None

    def test_higher_is_better_turns_it_round(self):
        registration = Registration(("e",), ("class_consistency",), {}, LEVEL, 3)
        found = estimate(*self.better, metric="class_consistency", registration=registration)
        assert found.finding == "hurts" and found.margin is None
        assert found.verdict == "undecided", (
            "without a margin, no gain can be neither shown nor excluded"
        )

    def test_what_describes_neither_helps_nor_hurts(self):
        assert estimate(*self.better, metric="label_reliance").finding == "falls"
        assert estimate(*self.worse, metric="label_reliance").finding == "rises"

    def test_one_seed_and_none_decide_nothing(self):
        assert estimate([0.1], [0.9]).verdict == "undecided"
        assert estimate([0.1], [0.9]).finding == "cannot be told"
        assert estimate([], []).verdict == "undecided" and estimate([], []).difference is None

    def test_no_gain_is_the_end_of_the_90_percent_interval(self):
        """With the margin's own error left aside, as it is a hundredth of the difference's."""
        generator = np.random.default_rng(0)
        for _ in range(50):
            new, old = 0.5 + generator.normal(0, 0.05, (2, 4))
            found = estimate(new, old, NO_GAIN)
            low, _ = found.difference.interval(0.9)  # of a loss: the largest gain is the lowest end
            if abs(-low - found.margin) > 0.01:
                assert (found.verdict == "supported") == (-low < found.margin)

    def test_exploratory_effects_have_findings_and_no_verdict(self):
        cells = {
            (v, s): float(y)
            for v, ys in zip(("new", "old"), self.better, strict=True)
            for s, y in enumerate(ys)
        }
        other = estimate_effect(Layout(cells), GAIN, "training_loss")
        (found,) = adjust([other], REGISTRATION)
        assert found.finding == "helps" and found.verdict is None and not found.headline


class TestMargins:
    EFFECTS = TWO_BY_TWO.effects

    def test_half_of_another_effects_gain(self):
        did = self.EFFECTS[-1]
        cells = {
            (name, seed): loss + 0.001 * seed
            for name, loss in {
                "sra": 0.5,
                "sra-as": 0.52,
                "sra-dts": 0.49,
                "sra-dts-as": 0.51,
            }.items()
            for seed in range(3)
        }
        registration = register(TWO_BY_TWO, "fid", 3)
        margin = margin_weights(did, LOSS, self.EFFECTS, registration)
        found = estimate_effect(Layout(cells), did, LOSS, margin)
        assert found.margin == pytest.approx(0.005) and found.difference.mean == pytest.approx(0)
        assert found.p_values["small"] == 0

    @pytest.mark.parametrize("dual", [0.4, 0.6])
    def test_half_of_a_loss_counts_as_no_margin(self, dual):
        """Only a shown loss is then below it, and nothing is equal."""
        did = self.EFFECTS[-1]
        means = {"sra": 0.5, "sra-as": 0.5, "sra-dts": 0.6, "sra-dts-as": 0.5 + dual - 0.4}
        cells = {(n, seed): loss + 0.001 * seed for n, loss in means.items() for seed in range(3)}
        margin = margin_weights(did, LOSS, self.EFFECTS, register(TWO_BY_TWO, "fid", 3))
        found = estimate_effect(Layout(cells), did, LOSS, margin)
        assert found.margin == pytest.approx(-0.05) and found.p_values["equal"] == 1
        assert found.difference.mean == pytest.approx(0.1 if dual == 0.4 else -0.1)
        assert found.p_values["small"] == pytest.approx(0 if dual == 0.4 else 1)

    def test_a_distance_below_zero_has_no_margin_and_harm_refutes_a_gain(self):
        """Extrapolated distances of good models scatter about 0."""
        effect = self.EFFECTS[2]
        registration = register(TWO_BY_TWO, "fd_infinity", 4)
        scatter = (0.004, -0.004, 0.002, -0.002)
        for loss, verdict in ((0.08, "refuted"), (0.0, "undecided"), (-0.08, "supported")):
            cells = {
                (name, seed): mean + off * (1 if name == "sra" else -1)
                for name, mean in (("sra", -0.01), ("sra-as", loss - 0.01))
                for seed, off in enumerate(scatter)
            }
            margin = margin_weights(effect, "fd_infinity", self.EFFECTS, registration)
            found = estimate_effect(Layout(cells), effect, "fd_infinity", margin)
            assert found.margin == pytest.approx(-0.0005)
            assert adjust([found], registration)[0].verdict == verdict

    def test_registration_names_every_claim_and_its_power(self):
        registration = register(TWO_BY_TWO, "fd_classifier", 10)
        assert registration.effects == tuple(effect.title for effect in self.EFFECTS)
        assert registration.metrics == (LOSS, "fd_classifier") and registration.seeds == 10
        assert registration.margins == {LOSS: 0.01, "fd_classifier": 0.05}
        sizes = registration.detectable
        assert sizes["Cross-noise interaction"] == pytest.approx(
            math.sqrt(2) * sizes["Separation, dual timesteps"]
        )
        assert register(TWO_BY_TWO, "fd_timm:other", 3).metrics == (LOSS,)


class TestHolm:
    def test_by_hand(self):
        assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
        assert holm([0.9, 0.5]) == [1.0, 1.0] and holm([]) == []

    def test_what_cannot_be_tested_yet_counts(self):
        registration = Registration(("e", "f"), (LOSS,), {LOSS: 0.1}, LEVEL, 3)
        found = estimate(*TestWhicheverWayTheyFall.better, registration=registration)
        assert found.adjusted["gain"] == pytest.approx(2 * found.p_values["gain"])


def simulate(
    truth: dict[str, float], seeds: int, trials: int, spread: float = 0.004, seed: int = 0
) -> list[list[EffectEstimate]]:
    """Verdicts on made-up 2×2 studies of the held-out loss alone."""
    generator = np.random.default_rng(seed)
    titles = tuple(effect.title for effect in TWO_BY_TWO.effects)
    registration = Registration(titles, (LOSS,), {LOSS: 0.01}, LEVEL, seeds)
    found = []
    for _ in range(trials):
        luck = generator.normal(0, 0.02, seeds)
        cells = {
            (name, s): loss + luck[s] + generator.normal(0, spread)
            for name, loss in truth.items()
            for s in range(seeds)
        }
        layout = Layout(cells)
        margins = [
            margin_weights(e, LOSS, TWO_BY_TWO.effects, registration) for e in TWO_BY_TWO.effects
        ]
        effects = [
            estimate_effect(layout, e, LOSS, m)
            for e, m in zip(TWO_BY_TWO.effects, margins, strict=True)
        ]
        found.append(adjust(effects, registration))
    return found


def share(verdicts: list[bool]) -> float:
    return sum(verdicts) / len(verdicts)


class TestHowOftenTheyAreWrong:
    TRIALS = 400
    SLACK = 3.5 * math.sqrt(0.05 * 0.95 / TRIALS)

    def test_without_any_effect(self):
        """A gain is claimed in at most 5 % of the studies, over all five tests together."""
        studies = simulate(
            dict.fromkeys(("sra", "sra-as", "sra-dts", "sra-dts-as"), 0.4), 5, self.TRIALS
        )
        wrong = [any(e.adjusted["gain"] <= LEVEL for e in study) for study in studies]
        assert share(wrong) <= 0.05 + self.SLACK
        raw = [study[0].p_values["gain"] <= LEVEL for study in studies]
        assert share(raw) == pytest.approx(0.025, abs=self.SLACK), (
            "one test, two-sided, one of its sides"
        )

    def test_at_the_margin(self):
        """A loss of just the margin is taken for equal, and a gain of just that for none, in 5 %."""
        truth = {"sra": 0.4, "sra-dts": 0.396, "sra-as": 0.404, "sra-dts-as": 0.408}
        studies = simulate(truth, 10, self.TRIALS, spread=0.002)
        assert share([s[0].p_values["small"] <= LEVEL for s in studies]) <= 0.05 + self.SLACK
        assert share([s[2].p_values["equal"] <= LEVEL for s in studies]) <= 0.05 + self.SLACK

    def test_an_interaction_of_half_the_gain_is_not_called_none(self):
        truth = {"sra": 0.4, "sra-dts": 0.38, "sra-as": 0.41, "sra-dts-as": 0.40}
        studies = simulate(truth, 10, self.TRIALS)
        assert share([s[4].p_values["small"] <= LEVEL for s in studies]) == pytest.approx(
            0.05, abs=self.SLACK
        )

    def test_an_interaction_that_is_all_of_the_gain_refutes_the_claim(self):
        truth = {"sra": 0.4, "sra-dts": 0.38, "sra-as": 0.41, "sra-dts-as": 0.41}
        studies = simulate(truth, 10, 200)
        assert share([s[4].verdict == "refuted" for s in studies]) > 0.95

    def test_no_interaction_supports_it(self):
        """Confirmed by data, which a claim of no gain could not be before."""
        truth = {"sra": 0.4, "sra-dts": 0.38, "sra-as": 0.41, "sra-dts-as": 0.39}
        studies = simulate(truth, 10, 200)
        assert share([s[4].verdict == "supported" for s in studies]) > 0.9

    @pytest.mark.parametrize("seeds", [3, 10])
    def test_power_is_as_predicted(self, seeds):
        """An effect of the smallest detectable size is found with a chance of 80 %."""
        spread, weights = 0.004, {"sra-dts": 1, "sra": -1}
        size = smallest_detectable(spread * unit_error(weights, seeds), 3 * (seeds - 1), 0.05)
        truth = {"sra": 0.4, "sra-dts": 0.4 - size, "sra-as": 0.4, "sra-dts-as": 0.4}
        studies = simulate(truth, seeds, 800, spread)
        found = share([s[0].p_values["gain"] <= LEVEL for s in studies])
        assert found == pytest.approx(0.8, abs=3.5 * math.sqrt(0.16 / 800))

    def test_the_chance_of_showing_that_there_is_none_is_as_predicted(self):
        spread, seeds = 0.004, 10
        error = spread * unit_error({"a": 1, "b": -1}, seeds)
        small, equal = chance_of_equal(0.004, error, 3 * (seeds - 1))
        studies = simulate(
            dict.fromkeys(("sra", "sra-as", "sra-dts", "sra-dts-as"), 0.4), seeds, 800, spread
        )
        slack = 3.5 * math.sqrt(0.25 / 800)
        assert share([s[0].p_values["small"] <= LEVEL for s in studies]) == pytest.approx(
            small, abs=slack
        )
        assert share([s[0].p_values["equal"] <= LEVEL for s in studies]) == pytest.approx(
            equal, abs=slack
        )


def test_every_hypothesis_has_a_p_value() -> None:
    found = estimate(*TestWhicheverWayTheyFall.better)
    assert set(found.p_values) == set(found.adjusted) == set(HYPOTHESES)
    assert isinstance(found.difference, Estimate) and found.as_json()["outcome"] == "helps"
