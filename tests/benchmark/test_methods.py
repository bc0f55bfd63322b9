"""The figures in docs/results/methods.md that no report holds are those that the benchmark computes."""

from pathlib import Path

import methods
import pytest

PAGE = " ".join((methods.RESULTS / "methods.md").read_text().split())


def plain(value: float, signed: bool = True) -> str:
    """As the page writes it: without a zero before the point, with a minus sign."""
    return f"{value:{'+' if signed else ''}.4f}".replace("0.", ".").replace("-", "−")


def test_a_contrast_is_taken_seed_by_seed() -> None:
    """With the spread that variant and seed leave: here one number, with one degree of freedom."""
    by_seed = {"a": {"0": 1.0, "1": 2.0}, "b": {"1": 0.5, "0": 0.25}}
    report = {"means": {k: {"heldout_loss": {"by_seed": v}} for k, v in by_seed.items()}}
    found = methods.estimate(methods.losses(report), {"a": 1, "b": -1})
    assert found.values == {0: 0.75, 1: 1.5}
    assert found.half_width() == pytest.approx(12.7062 * 0.375, rel=1e-4)


@pytest.mark.parametrize("study", methods.STUDIES)
@pytest.mark.parametrize("title", ["dual timesteps, separated", "self-flow less sra-dts"])
def test_the_page_says_what_was_measured(study: str, title: str) -> None:
    layout = methods.losses(methods.read_report(study))
    found = [methods.estimate(layout, signs) for signs in methods.contrasts()[title].values()]
    means = [e.mean for e in found]
    for figure in (plain(min(means)), plain(max(means)), plain(found[0].half_width(), False)):
        assert figure in PAGE


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    methods.draw(tmp_path / "effects.png")
    assert (tmp_path / "effects.png").stat().st_size > 10_000
