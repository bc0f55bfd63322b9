"""Compute to quality, against answers worked out by hand."""

import pytest
from study.synthetic import result

from selfalign.study.costs import first_reaching, median_time, quality_cost

LOSS = "heldout_loss"
CURVE = ((100, 1.0), (200, 0.6), (300, 0.4))


class TestFirstReaching:
    @pytest.mark.parametrize(
        ("target", "step"), [(0.5, 300), (0.6, 200), (0.9, 200), (1.5, 100), (0.3, None)]
    )
    def test_it_is_a_measured_step(self, target, step):
        assert first_reaching(CURVE, target, "lower") == step
        rising = [(at, -value) for at, value in CURVE]
        assert first_reaching(rising, -target, "higher") == step

    def test_the_first_time_counts(self):
        dip = [(100, 1.0), (200, 0.5), (300, 0.9), (400, 0.5)]
        assert first_reaching(dip, 0.5, "lower") == 200


class TestSeedsThatNeverArrive:
    def test_by_hand(self):
        """The textbook's remission times: 6, 6, 6, 6+, 7, 9+, 10."""
        times, arrived = [6, 6, 6, 6, 7, 9, 10], [True, True, True, False, True, False, True]
        # Not there yet: 4/7 after 6, 4/7 · 2/3 after 7, none after 10.
        assert median_time(times, arrived) == 7
        assert median_time([6, 6, 7, 9, 10], [True, False, True, True, True]) == 9

    def test_they_are_not_left_out(self):
        assert median_time([100, 400, 400], [True, False, False]) is None
        assert median_time([100, 200, 400], [True, True, False]) == 200
        assert median_time([], []) is None


class TestCosts:
    RUNS = (
        result("sit", 0, curves={LOSS: [(100, 1.0), (300, 0.5)]}),
        result("sit", 1, curves={LOSS: [(100, 1.0), (300, 0.3)]}),
        result("sra", 0, curves={LOSS: CURVE}, flops_per_step=3e9, seconds_per_step=1.0),
        result("sra", 1, curves={LOSS: CURVE}, flops_per_step=3e9, seconds_per_step=1.0),
        result("sra", 2, curves={LOSS: CURVE}),
    )

    def test_are_those_of_the_same_seed(self):
        cost = quality_cost(self.RUNS, "sra", "sit", LOSS)
        assert cost.steps == {0: 300, 1: None} and cost.censored_at == {0: 300, 1: 300}
        assert cost.reached == 1 and cost.median_steps == 300
        assert cost.relative_flops == pytest.approx(300 * 3e9 / (300 * 2e9))
        assert quality_cost(self.RUNS, "self-flow", "sit", LOSS) is None

    def test_where_most_seeds_never_do(self):
        low = [result("sit", s, curves={LOSS: [(300, 0.1)]}) for s in (0, 1)]
        cost = quality_cost([*low, *self.RUNS[2:4]], "sra", "sit", LOSS)
        assert cost.reached == 0 and cost.median_steps is None and cost.relative_flops is None
        assert cost.as_json()["steps"] == {0: None, 1: None}
