"""Ratios with Fieller's interval: known answers, coverage, and no end where there is none."""

import numpy as np
import pytest

from selfalign.study.estimates import Layout
from selfalign.study.ratios import ratio, separation_cost


def by_seed(values):
    return dict(enumerate(map(float, values)))


def test_known_answers():
    twice = ratio(by_seed([2, 2.2, 2.4]), by_seed([1, 1.1, 1.2]))
    assert twice.value == pytest.approx(2) and twice.interval == pytest.approx((2, 2))
    assert ratio({0: 1.0, 1: 3.0}, {1: 2.0, 2: 5.0}).value == 1.5, "of the seeds that both have"
    assert ratio({0: 1.0}, {0: 2.0}).interval is None
    assert ratio({0: 1.0}, {1: 2.0}) is None


def test_where_the_denominator_may_be_zero_no_ratio_is_excluded():
    found = ratio(by_seed([1, 1, 1.1]), by_seed([-1, 1, 0.5]))
    assert found.interval is None


def test_covers_the_true_ratio():
    generator = np.random.default_rng(0)
    inside, trials = 0, 2000
    for _ in range(trials):
        shared = generator.normal(size=6)
        a, b = 0.7 + 0.3 * shared, 1 + 0.3 * shared + 0.3 * generator.normal(size=6)
        low, high = ratio(by_seed(a), by_seed(b)).interval or (-np.inf, np.inf)
        inside += low <= 0.7 <= high
    assert inside / trials == pytest.approx(0.95, abs=0.02)


def test_separation_is_scored_in_its_own_way_and_whole():
    whole = Layout(
        {(name, s): v + 0.1 * s for name, v in (("sra", 0.4), ("as", 0.41)) for s in (0, 1)}
    )
    separated = Layout({(name, s): 0.44 + 0.1 * s for name in ("sra", "as") for s in (0, 1)})
    cost = separation_cost("as", "sra", whole, separated)
    assert cost.own.mean == pytest.approx(0.04) and cost.on_whole.mean == pytest.approx(0.01)
    assert cost.recovered.value == pytest.approx(0.75)
    assert separation_cost("missing", "sra", whole, separated) is None
