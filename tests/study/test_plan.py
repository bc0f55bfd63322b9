"""A study: its list of runs, and what its folder accepts."""

import dataclasses
from pathlib import Path

import pytest

from selfalign.errors import UserError
from selfalign.study.grid import Grid, Variant
from selfalign.study.paper import PAPER
from selfalign.study.plan import Study, read_study, write_study

SETTINGS = {"model.size": "tiny/2", "training.steps": 3, "training.batch_size": 8}


def _study(**changes: object) -> Study:
    return dataclasses.replace(Study(PAPER, SETTINGS, seeds=(0, 1)), **changes)


def test_runs_of_one_seed_differ_in_their_variant_alone() -> None:
    jobs = _study(train_fractions=(0.5, 1.0)).jobs()
    assert len(jobs) == 2 * 2 * 13 == len({job.name for job in jobs})
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs), "seed by seed"
    for job in jobs:
        same = dataclasses.replace(jobs[0].config, views=job.config.views, seed=job.seed)
        same = dataclasses.replace(same, alignment=job.config.alignment)
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
    with pytest.raises(UserError, match="a study with other settings"):
        write_study(tmp_path, _study(settings=longer))
    assert read_study(tmp_path).settings["training.steps"] == 3


def test_used_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UserError, match="must be a new or an empty folder"):
        write_study(tmp_path, _study())
    with pytest.raises(UserError, match="is not a study"):
        read_study(tmp_path)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_study(tmp_path)


def test_what_could_not_start_is_refused_before_anything_runs() -> None:
    _study().check()
    with pytest.raises(UserError, match="variant sra-as: .*every group needs at least one"):
        Study(Grid("g", {"sra-as": Variant("sra-as")}), {"model.size": "tiny/8"}, (0,)).check()
    with pytest.raises(UserError, match=r"seeds is \(\)"):
        _study(seeds=())
    with pytest.raises(UserError, match="train_fractions is"):
        _study(train_fractions=(1.0, 1.0))
