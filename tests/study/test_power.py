"""What a study can find, before it runs."""

import json
from pathlib import Path

import pytest

from selfalign import cli
from selfalign.cli.console import console
from selfalign.errors import UserError
from selfalign.study.paper import TWO_BY_TWO
from selfalign.study.power import power, read_pilot
from selfalign.study.verdicts import register

LOSSES = {"sra": 0.50, "sra-as": 0.52, "sra-dts": 0.49, "sra-dts-as": 0.51}
NOISE = ((1, -1, 0), (-1, 1, 0), (0, 0, 0), (0, 0, 0))


def write_report(folder: Path, scale: float = 0.001) -> Path:
    """An earlier study's numbers, as version 0.1.0 wrote them: residual variance 4·scale²/6."""
    means = {
        name: {
            "heldout_loss": {
                "mean": loss,
                "interval": None,
                "by_seed": {str(s): loss + 0.01 * s + scale * e for s, e in enumerate(noise)},
            }
        }
        for (name, loss), noise in zip(LOSSES.items(), NOISE, strict=True)
    }
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_text(json.dumps({"selfalign_version": "0.1.0", "means": means}))
    return folder


def test_rows(tmp_path: Path) -> None:
    registration = register(TWO_BY_TWO, "fid", 10)
    rows = {
        row.effect: row
        for row in power(TWO_BY_TWO, registration, read_pilot(write_report(tmp_path)), 10)
    }
    assert set(rows) == set(registration.effects)
    did = rows["Cross-noise interaction"]
    assert did.residual == pytest.approx((4e-6 / 6) ** 0.5) and did.level == pytest.approx(0.515)
    assert did.margin == pytest.approx(0.005, abs=1e-3) and did.chance > 0.99
    dual = rows["Dual timesteps, full attention"]
    assert dual.margin == pytest.approx(0.0051) and dual.chance is None
    assert did.detectable == pytest.approx(2**0.5 * dual.detectable)


def test_more_seeds_find_less(tmp_path: Path) -> None:
    pilot = read_pilot(write_report(tmp_path))
    sizes = [
        power(TWO_BY_TWO, register(TWO_BY_TWO, "fid", seeds), pilot, seeds)[0].detectable
        for seeds in (2, 3, 10, 40)
    ]
    assert sizes == sorted(sizes, reverse=True) and sizes[2] / sizes[3] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"means": {"a": {"heldout_loss": {"by_seed": {"x": 1}}}}}', "cannot be read"),
        ('{"means": {}}', "needed are two variants and two seeds"),
        (
            '{"means": {"a": {"heldout_loss": {"by_seed": {"0": 1e308, "1": 1}}}}}',
            "means.a.heldout_loss is 1e.308; allowed are numbers up to 1e.100",
        ),
    ],
)
def test_what_is_no_earlier_study(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(UserError, match=said):
        read_pilot(tmp_path)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(console, "_width", 200)
    monkeypatch.setattr(console, "_height", 50)
    assert cli.main(["study", "power", "2x2", "--like", str(write_report(tmp_path))]) == 0
    said = capsys.readouterr().out
    assert "Cross-noise interaction" in said and "10 seeds of 4 variants" in said
    for arguments, wrong in (
        (["--like", str(tmp_path / "none")], "--like is"),
        (["--like", str(tmp_path), "--seeds", "1"], "--seeds is 1"),
        ([], "--like"),
    ):
        assert cli.main(["study", "power", "2x2", *arguments]) == 2
        error = capsys.readouterr().err
        assert wrong in error and error.count("\n") == 1
    assert cli.main(["study", "power"]) == 2
