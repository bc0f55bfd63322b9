"""Runs of a study, launched for real: side by side, failing, killed and gone on with."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from selfalign import cli
from selfalign.sampling.settings import SamplingConfig
from selfalign.study.grid import Grid, Variant
from selfalign.study.job import run_job
from selfalign.study.launch import launch
from selfalign.study.plan import Job, Study, read_study, write_study
from selfalign.study.results import METRICS, StudyResults, read_results
from selfalign.study.reuse import take_over
from selfalign.study.settings import LaunchConfig, Measurement
from selfalign.training.tracking import read_metrics

SETTINGS = {
    "model.size": "tiny/4",
    "training.steps": 6,
    "training.batch_size": 8,
    "training.learning_rate": 1e-3,
    "training.ema_decay": 0.5,
    "training.log_every": 1,
    "training.evaluate_every": 3,
    "training.checkpoint_every": 3,
    "training.heldout_samples": 20,
    "training.trackers": (),
}
MEASUREMENT = Measurement(num=20, sampling=SamplingConfig(solver="heun", steps=2))
GRID = Grid(
    "small",
    {
        "sit": Variant("sit"),
        "hopeless": Variant("sit", {"training.learning_rate": 1e30, "training.clip_norm": 0.0}),
        "sra-dts-as": Variant("sra-dts-as"),
    },
)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Classifiers are trained for these tests, in a cache of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SELFALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of three variants, of which one cannot but fail, run to its end."""
    folder = tmp_path_factory.mktemp("studies") / "small"
    write_study(folder, Study(GRID, SETTINGS, (0,), measurement=MEASUREMENT))
    statuses = list(launch(folder, LaunchConfig(processes=2)))
    assert statuses[0].total == 3 and statuses[0].done == 0
    assert statuses[-1].done == 2 and not statuses[-1].running
    assert max(len(status.running) for status in statuses) == 2, "side by side"
    return folder


def _without_clocks(results: StudyResults) -> list[dict[str, object]]:
    clocks = ("seconds", "seconds_per_step")
    return [
        {name: value for name, value in vars(run).items() if name not in clocks}
        for run in results.done
    ]


def test_every_run_is_measured(finished: Path) -> None:
    results = read_results(finished)
    assert [run.variant for run in results.done] == ["sit", "sra-dts-as"]
    for run in results.done:
        small = {"fd_infinity", "fd_dinov2", "fid", "sfid", "inception_score"}
        assert set(run.metrics) == set(METRICS) - small
        assert [step for step, _ in run.curves["heldout_loss"]] == [3, 6]
        assert [step for step, _ in run.curves["fd_classifier"]] == [3, 6]
        assert run.curves["heldout_loss"][-1][1] == run.metrics["heldout_loss"]
        assert run.metrics["heldout_best"] == min(loss for _, loss in run.curves["heldout_loss"])
        gap = run.metrics["heldout_loss"] - run.metrics["training_loss"]
        assert run.metrics["generalisation_gap"] == pytest.approx(gap)
        assert len(run.heldout_by_timestep) == 10
        assert run.seconds_per_step > 0 and run.flops_per_step > 0
        assert run.heldout_images["fd_classifier"] > 0
    for name in (
        "heldout_loss",
        "heldout_raw",
        "heldout_separated",
        "heldout_dual",
        "label_reliance",
    ):
        errors = results.pair_errors(results.done, name)
        for run in results.done:
            kept = errors.by_run[run.variant, run.seed]
            assert len(kept) == 20 and kept.mean() == pytest.approx(run.metrics[name], rel=1e-5)
    assert results.pair_errors(results.done, "fd_classifier") is None


def test_a_failed_run_is_reported_and_stops_no_other(finished: Path) -> None:
    results = read_results(finished)
    assert [failure.name for failure in results.failed] == ["hopeless/seed_0"]
    assert "finite" in results.failed[0].message and "\n" not in results.failed[0].message
    log = (finished / results.failed[0].log).read_text()
    assert "selfalign: error: " in log and "Traceback" not in log  # nothing of ours went wrong
    assert not results.waiting


def test_a_killed_study_goes_on_where_it_was(finished: Path, tmp_path: Path) -> None:
    """Killed without warning, its orphans stop by themselves; the results are the same to the bit."""
    grid = Grid("small", {name: GRID.variants[name] for name in ("sit", "sra-dts-as")})
    write_study(tmp_path, Study(grid, SETTINGS, (0,), measurement=MEASUREMENT))
    script = (
        "import sys; from pathlib import Path\n"
        "from selfalign.study.launch import launch\n"
        "from selfalign.study.settings import LaunchConfig\n"
        "for status in launch(Path(sys.argv[1]), LaunchConfig(processes=2)): pass\n"
    )
    study = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    first = tmp_path / "runs" / "sit" / "seed_0"
    while not (first / "checkpoints" / "latest").is_file():
        assert study.poll() is None
        time.sleep(0.05)
    study.send_signal(signal.SIGKILL)
    study.wait()
    assert list(launch(tmp_path, LaunchConfig(processes=1)))[-1].done == 2
    assert _without_clocks(read_results(tmp_path)) == _without_clocks(read_results(finished))


def test_a_run_starts_from_another_and_finished_ones_are_taken_over(
    finished: Path, tmp_path: Path
) -> None:
    later = Variant("sra", {"training.steps": 3}, after="both")
    grid = Grid("later", {"both": GRID.variants["sra-dts-as"], "then-whole": later})
    study = Study(grid, SETTINGS, (0, 1), measurement=MEASUREMENT)
    write_study(tmp_path, study)
    assert take_over(tmp_path, study, finished, read_study(finished)) == ["both/seed_0"]
    assert take_over(tmp_path, study, finished, read_study(finished)) == [], (
        "nothing is taken twice"
    )
    run_job(tmp_path, "then-whole/seed_0")
    base, then = read_results(tmp_path).done
    assert base.variant == "both" and base.folder == "runs/both/seed_0"
    assert then.config["training"]["start_from"] == str(tmp_path / base.folder)
    drawn, first = (
        next(line["denoising_loss"] for line in read_metrics(tmp_path / run.folder))
        for run in (base, then)
    )
    assert first < 0.98 * drawn, "it goes on, and does not begin anew"
    # Where the first run is missing, the second makes it.
    run_job(tmp_path, "then-whole/seed_1")
    assert {run.seed for run in read_results(tmp_path).done if run.variant == "both"} == {0, 1}
    other = dataclasses.replace(study, measurement=dataclasses.replace(MEASUREMENT, num=21))
    assert take_over(tmp_path / "new", other, finished, read_study(finished)) == []


def test_stopping_a_study_leaves_its_runs_at_a_checkpoint(tmp_path: Path) -> None:
    settings = {**SETTINGS, "training.steps": 100_000, "training.evaluate_every": 50_000}
    grid = Grid("long", {"sit": Variant("sit")})
    write_study(tmp_path, Study(grid, settings, (0,), measurement=MEASUREMENT))
    statuses = launch(tmp_path, LaunchConfig(processes=1))
    for status in statuses:
        if any(step > 0 for step, _ in status.running.values()):
            break
    statuses.close()
    assert (tmp_path / "runs" / "sit" / "seed_0" / "checkpoints" / "latest").is_file()
    results = read_results(tmp_path)
    assert results.waiting == ("sit/seed_0",) and not results.failed


@pytest.mark.slow
def test_submitit_runs_the_same(finished: Path, tmp_path: Path) -> None:
    grid = Grid("small", {name: GRID.variants[name] for name in ("hopeless", "sra-dts-as")})
    write_study(tmp_path, Study(grid, SETTINGS, (0,), measurement=MEASUREMENT))
    status = list(launch(tmp_path, LaunchConfig(launcher="submitit-local")))[-1]
    assert status.done == 1 and status.failed == ("hopeless/seed_0",)
    whole, own = read_results(finished), read_results(tmp_path)
    assert _without_clocks(own) == _without_clocks(whole)[1:]
    for status in launch(tmp_path, LaunchConfig(launcher="submitit-local")):
        assert status.done == 1, "what is done is not run again"


def test_a_job_that_vanishes_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that a cluster ends for the memory it took."""

    class Vanishing:
        def submit(self, job: Job) -> None:
            (tmp_path / "runs" / job.name).mkdir(parents=True)

        def running(self) -> set[str]:
            return set()

        def active(self) -> bool:
            return False

        def stop(self) -> None:
            pass

    monkeypatch.setattr("selfalign.study.launch._make_launcher", lambda *_: Vanishing())
    write_study(tmp_path, Study(Grid("one", {"sit": Variant("sit")}), SETTINGS, (0,)))
    assert list(launch(tmp_path, LaunchConfig()))[-1].failed == ("sit/seed_0",)
    assert read_results(tmp_path).failed[0].message == "it ended without a result"


def test_slurm_where_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    out = tmp_path / "study"
    command = ["study", "paper", "--out", str(out), "--profile", "smoke", "--launcher", "slurm"]
    assert cli.main(command) == 2
    assert "--launcher slurm" in capsys.readouterr().err


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = tmp_path / "one.yaml"
    grid.write_text("variants: {sit: {recipe: sit}}")
    out = tmp_path / "study"
    command = ["study", str(grid), "--out", str(out), "--profile", "smoke", "--seeds", "1"]
    command += ["--training.steps", "4", "--model.size", "tiny/4", "--training.warmup-steps", "0"]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "1 of 1 runs done" in said and (out / "report.html").is_file()
    assert cli.main(command) == 0, "finished, it only writes its report anew"
    assert cli.main(["study", "report", str(out)]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing.yaml", "--out", "x"], "nothing.yaml does not exist"),
        (["--out", "x"], "the grid comes first"),
        (["paper"], "--out"),
        (["paper", "--out", "x", "--seeds", "0"], "--seeds is 0"),
        (["paper", "--out", "x", "--processes", "0"], "--processes is 0"),
        (["paper", "--out", "x", "--profile", "huge"], "smoke"),
        (["paper", "--out", "x", "--data.train-fraction", "2"], "data.train_fraction is 2.0"),
        (["paper", "--out", "x", "--model.size", "tiny/3"], "tiny/3"),
        (["paper", "--out", "x", "--data.name", "mnist", "--data.root", "none"], "mnist"),
        (["report"], "takes the folder of a study"),
        (["report", "nowhere"], "'nowhere' is not a study"),
    ],
)
def test_wrong_commands_are_one_line(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(SystemExit):
        assert cli.main(["study", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not os.listdir(tmp_path), "nothing was written"  # noqa: PTH208
