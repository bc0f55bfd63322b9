"""A study: its list of runs, and what its folder accepts."""

import contextlib
import dataclasses
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfalign.errors import UserError
from selfalign.sampling.generate import SamplingConfig
from selfalign.study.grid import Grid, Variant
from selfalign.study.paper import PAPER
from selfalign.study.plan import Study, folder_name, read_study, write_study
from selfalign.study.settings import Measurement

SETTINGS = {"model.size": "tiny/2", "training.steps": 3, "training.batch_size": 8}


def _study(**changes: object) -> Study:
    return dataclasses.replace(Study(PAPER, SETTINGS, seeds=(0, 1)), **changes)


def test_runs_of_one_seed_differ_in_their_variant_alone() -> None:
    jobs = _study(train_fractions=(0.5, 1.0)).jobs()
    assert len(jobs) == 2 * 2 * 13 == len({job.name for job in jobs})
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs), "seed by seed"
    for job in jobs:
        same = dataclasses.replace(jobs[0].config, views=job.config.views, seed=job.seed)
        same = dataclasses.replace(same, terms=job.config.terms, targets=job.config.targets)
        data = dataclasses.replace(same.data, train_fraction=job.train_fraction)
        assert job.config == dataclasses.replace(same, data=data)
    assert jobs[0].name == "sit_data0.5/seed_0" and jobs[13].name == "sit/seed_0"


def test_a_study_is_read_back_as_it_was(tmp_path: Path) -> None:
    study = _study()
    write_study(tmp_path / "study", study)
    # JSON has lists for tuples, which the config turns back.
    assert [job.config for job in read_study(tmp_path / "study").jobs()] == [
        job.config for job in study.jobs()
    ]
    assert read_study(tmp_path / "study").measurement == study.measurement


def test_a_study_may_grow_and_nothing_else(tmp_path: Path) -> None:
    write_study(tmp_path, _study(seeds=(0,)))
    write_study(tmp_path, _study(seeds=(0, 1), train_fractions=(1.0, 0.5)))
    assert read_study(tmp_path).seeds == (0, 1)
    with pytest.raises(UserError, match=r"seeds have \[1\] besides"):
        write_study(tmp_path, _study(seeds=(0,), train_fractions=(1.0, 0.5)))
    longer = {**SETTINGS, "training.steps": 4}
    with pytest.raises(UserError, match=r"a study with other settings \(training.steps\)"):
        write_study(tmp_path, _study(settings=longer))
    assert read_study(tmp_path).settings["training.steps"] == 3


def test_a_study_of_a_version_with_fewer_fields_goes_on(tmp_path: Path) -> None:
    write_study(tmp_path, _study())
    now = {**SETTINGS, "training.start_weights": "both"}  # the default of a field that is not named
    write_study(tmp_path, _study(settings=now))
    assert read_study(tmp_path).settings == now
    with pytest.raises(UserError, match=r"other settings \(training.start_weights\)"):
        write_study(tmp_path, _study(settings={**SETTINGS, "training.start_weights": "ema"}))


def test_used_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UserError, match="must be a new or an empty folder"):
        write_study(tmp_path, _study())
    with pytest.raises(UserError, match="is not a study"):
        read_study(tmp_path)


def registered(record: dict, **changes: object) -> dict:
    """A study's record with something laid down beforehand."""
    known = {"effects": [], "metrics": [], "margins": {}, "level": 0.05, "seeds": 2}
    return record | {"registration": known | changes}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda record: "{", "cannot be read"),
        (lambda record: "[" * 100_000, "cannot be read"),
        (lambda record: "\udcff", "cannot be read"),
        (lambda record: [1], "describes no study"),
        (lambda record: record | {"seeds": ["0"]}, r"seeds\[.*\]: Expected `int`, got `str`"),
        (lambda record: record | {"seeds": []}, r"seeds is \(\)"),
        (lambda record: record | {"seeds": list(range(10_001))}, "seeds are 10,001"),
        (lambda record: registered(record, effects=["none"]), "no effect of the grid"),
        (lambda record: registered(record, level=0), "registration.level is 0"),
        (lambda record: registered(record, level=float("nan")), "registration.level is nan"),
        (lambda record: registered(record, seeds=0), "registration.seeds is 0"),
        (lambda record: registered(record, margins={"fid": -1}), "registration.margins is"),
        (lambda record: record | {"colour": 1}, "no field 'colour'"),
        (lambda record: record | {"measurement": {"num": 40, "nums": 3}}, "'measurement.nums'"),
        (lambda record: record | {"measurement": {"num": -1}}, "measurement.num is -1"),
        (lambda record: {k: v for k, v in record.items() if k != "settings"}, "settings"),
        (
            lambda record: (
                record | {"grid": {**record["grid"], "variants": {"../x": {"recipe": "sit"}}}}
            ),
            "a path is no name",
        ),
    ],
)
def test_a_damaged_study_is_one_line(tmp_path: Path, change, said: str) -> None:
    write_study(tmp_path, _study())
    changed = change(json.loads((tmp_path / "study.json").read_text()))
    text = changed if isinstance(changed, str) else json.dumps(changed)
    (tmp_path / "study.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=said) as caught:
        read_study(tmp_path)
    assert "\n" not in str(caught.value) and "study.json" in str(caught.value)


def test_a_study_of_version_0_1_can_be_read(tmp_path: Path) -> None:
    """It has neither registration nor margins, and its runs share their samples' noise."""
    write_study(tmp_path, _study())
    record = json.loads((tmp_path / "study.json").read_text())
    del record["registration"], record["measurement"]["own_samples"]
    for effect in record["grid"]["effects"]:
        del effect["minus"], effect["half_of"]
    (tmp_path / "study.json").write_text(json.dumps(record))
    assert read_study(tmp_path) == dataclasses.replace(
        read_study(tmp_path), registration=None, measurement=Measurement()
    )


class TestFolders:
    """Variants' names are text; folders are made of what is plain in them."""

    NAMES = (
        "$x$",
        "[red]a[/red]",
        "<b>a</b>",
        "שלום",
        "a b",
        "é",
        "x" * 300,
        "-rf",
        ".hidden",
        "a:b",
        "🙂",
    )

    def test_plain_names_stay(self) -> None:
        for name in ("sra-dts-as_alpha0.5_rho0.25", "0.25", "on", "lr=1e-3", "A+b"):
            assert folder_name(name) == name

    def test_every_other_name_has_a_folder_of_its_own(self, tmp_path: Path) -> None:
        folders = {folder_name(name) for name in self.NAMES}
        assert len(folders) == len(self.NAMES)
        for folder in folders:
            assert len(folder) <= 80 and folder.isascii() and not folder.startswith((".", "-"))
            (tmp_path / folder).mkdir()
        assert len(list(tmp_path.iterdir())) == len(folders)

    @given(st.text(min_size=1, max_size=300))
    def test_no_name_leaves_the_study(self, name: str) -> None:
        with contextlib.suppress(UserError):
            (job,) = Study(Grid("g", {name: Variant("sit")}), SETTINGS, (0,)).jobs()
            assert job.variant == name
            assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=+-]*/seed_0", job.name)

    @pytest.mark.parametrize(
        ("names", "fractions"),
        [(("a", "A"), (1.0,)), (("a", "a_data0.5"), (0.5, 1.0)), (("a",), (0.1234567, 0.12345671))],
    )
    def test_runs_that_would_share_a_folder_are_refused(self, names, fractions) -> None:
        grid = Grid("g", {name: Variant("sit") for name in names})
        with pytest.raises(UserError, match="share the folder|too close"):
            Study(grid, SETTINGS, (0,), fractions)


def test_what_could_not_start_is_refused_before_anything_runs() -> None:
    _study().check()
    with pytest.raises(UserError, match="variant 'sra-as': .*every group needs at least one"):
        Study(Grid("g", {"sra-as": Variant("sra-as")}), {"model.size": "tiny/8"}, (0,)).check()
    with pytest.raises(UserError, match=r"seeds is \(\)"):
        _study(seeds=())
    with pytest.raises(UserError, match="train_fractions is"):
        _study(train_fractions=(1.0, 1.0))


@pytest.mark.parametrize(
    ("measurement", "said"),
    [
        ({"num": 0}, "measurement.num is 0: allowed is a number from 20"),
        ({"features": "foo"}, "measurement.features is 'foo': allowed are inception"),
        ({"features": ""}, "measurement.features is ''"),
    ],
)
def test_measurements_are_checked_when_they_are_made(measurement, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Measurement(**measurement)


def test_what_could_not_be_measured_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    grid = Grid("g", {"sit": Variant("sit", {"views.class_dropout": 0.0})})
    for measurement, said in (
        (Measurement(sampling=SamplingConfig(guidance_scale=2.0)), "guidance_scale is 2.0"),
        (Measurement(sampling=SamplingConfig(mask_ratio=0.01)), "mask_ratio is 0.01"),
        (Measurement(features="timm:no_such_model"), "no_such_model"),
    ):
        with pytest.raises(UserError, match=f"variant 'sit': .*{said}"):
            Study(grid, SETTINGS, (0,), measurement=measurement).check()
