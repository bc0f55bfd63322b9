"""The figures in docs/results/methods.md that no report holds are those that the benchmark computes."""

from pathlib import Path

import methods
import numpy as np
import pytest

PAGE = " ".join((methods.RESULTS / "methods.md").read_text().split())


def plain(value: float, signed: bool = True) -> str:
    """As the page writes it: without a zero before the point, with a minus sign."""
    return f"{value:{'+' if signed else ''}.4f}".replace("0.", ".").replace("-", "−")


def test_a_contrast_is_taken_seed_by_seed() -> None:
    by_seed = {"a": {"0": 1.0, "1": 2.0}, "b": {"1": 0.5, "0": 0.25}}
    report = {"means": {k: {"heldout_loss": {"by_seed": v}} for k, v in by_seed.items()}}
    assert methods.contrast(report, {"a": 1, "b": -1}).tolist() == [0.75, 1.5]


def test_rows_of_one_spread_share_it() -> None:
    """Of one row it is the usual interval: t of one degree of freedom times the standard error."""
    assert methods.pooled([np.array([0.0, 2.0])]) == pytest.approx(12.7062, abs=1e-4)
    assert methods.pooled([np.array([0.0, 2.0])] * 2) == pytest.approx(4.3027, abs=1e-4)


@pytest.mark.parametrize("study", methods.STUDIES)
@pytest.mark.parametrize("title", ["dual timesteps, separated", "self-flow less sra-dts"])
def test_the_page_says_what_was_measured(study: str, title: str) -> None:
    report = methods.read_report(study)
    rows = [methods.contrast(report, signs) for signs in methods.contrasts()[title].values()]
    means = [row.mean() for row in rows]
    for figure in (plain(min(means)), plain(max(means)), plain(methods.pooled(rows), False)):
        assert figure in PAGE


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    methods.draw(tmp_path / "effects.png")
    assert (tmp_path / "effects.png").stat().st_size > 10_000
