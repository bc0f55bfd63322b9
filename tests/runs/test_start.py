"""Run folders: what starting and resuming leave behind, and what they refuse."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SMALL
from filelock import FileLock
from PIL import Image
from small_images import make_images, random_image

from selfalign import RunConfig, UserError, override, recipe
from selfalign.cli import main
from selfalign.data.latents import reader
from selfalign.data.latents.prepare import prepare
from selfalign.data.latents.settings import PrepareConfig
from selfalign.evaluation import classifier
from selfalign.runs.folder import LOCK, read_record
from selfalign.runs.load import load_run
from selfalign.runs.start import resume_run, start_run
from selfalign.training.checkpoint import latest_checkpoint, step_of
from selfalign.training.loop import TrainingState
from selfalign.training.tracking import read_metrics


def quiet(state: TrainingState, values: dict[str, float]) -> None:
    """No progress."""


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def run(small_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, to be damaged."""
    return shutil.copytree(small_run, tmp_path / "run")


def test_a_run_that_fails_before_its_first_step_leaves_no_folder(
    tmp_path: Path, small_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a" / "b"
    wild = {"training.learning_rate": float("1e38"), "views.mask_ratios": (1e-9,)}
    with pytest.raises(UserError, match="mask_ratios"):
        start_run(override(small_config, wild), folder, quiet)
    assert list(tmp_path.iterdir()) == []
    images = make_images(tmp_path / "images", 12)
    for path in images.rglob("*.png"):
        path.write_bytes(b"no image")
    data = {"data.name": "folder", "data.root": str(images), "data.image_size": 8}
    with pytest.raises(UserError, match="is not a readable image"):
        start_run(override(small_config, data), folder, quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
    # A shard that is damaged is read when the run has begun; trackers write from threads of their own.
    store = tmp_path / "store"
    prepare(
        str(make_images(tmp_path / "whole", 12)), store, PrepareConfig(image_size=8, vae="none")
    )
    monkeypatch.setattr(reader, "CHECKED_RECORDS", 0)
    shard = store / "shard-00000.bin"
    shard.write_bytes(bytes(shard.stat().st_size))
    stored = {
        "data.name": "latents",
        "data.root": str(store),
        "model.size": "tiny/4",
        "training.trackers": ("tensorboard",),
    }
    with pytest.raises(UserError, match="is damaged"):
        start_run(override(small_config, stored), folder, quiet)
    assert not (tmp_path / "a").exists()
    folder.mkdir(parents=True)  # one that was there stays
    with pytest.raises(UserError, match="is not a readable image"):
        start_run(override(small_config, data), folder, quiet)
    assert list(folder.iterdir()) == []
    start_run(override(small_config, {"training.steps": 1}), folder, quiet)


def test_a_run_that_died_before_its_first_checkpoint_starts_anew(
    tmp_path: Path, small_config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    class KilledError(Exception):
        pass

    def kill(state: TrainingState, values: dict[str, float]) -> None:
        raise KilledError

    with pytest.raises(KilledError):
        start_run(small_config, tmp_path / "run", kill)
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert main(["train", "sit", "--out", str(tmp_path / "run")]) == 2
    assert "go on with `selfalign train --resume" in capsys.readouterr().err
    state = resume_run(tmp_path / "run", None, quiet)
    assert state is not None and state.step == 6
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "loss" in line] == [2, 4, 6]


def test_resuming_a_finished_run_is_a_success_that_says_so(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    assert main(["train", "--resume", str(run)]) == 0
    assert "is finished" in capsys.readouterr().out
    assert contents(run) == before


DAMAGE = {
    "config.json": b'{"config": {}}',
    "metrics.jsonl": None,
    "checkpoints/latest": b"step_00000099",
    "checkpoints/step_00000006/model.safetensors": b"x",
    "checkpoints/step_00000006/ema.safetensors": b"x",
    "checkpoints/step_00000006/optimizer.safetensors": b"x",
    "checkpoints/step_00000006/state.json": b"{}",
    "checkpoints/step_00000006/checksums.json": b"[]",
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("checksums", [True, False])
def test_a_failed_resume_changes_nothing(
    run: Path, name: str, checksums: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if not checksums and name.endswith("checksums.json"):
        pytest.skip("as version 0.1.0 wrote it")
    if not checksums:
        (run / "checkpoints/step_00000006/checksums.json").unlink()
    damage = DAMAGE[name]
    (run / name).unlink()
    if damage is None:
        (run / name).mkdir()
    else:
        (run / name).write_bytes(damage)
    before = contents(run)
    assert main(["train", "--resume", str(run), "--training.steps", "8"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("selfalign: error: ") and said.count("\n") == 1
    assert Path(name).name in said or name == "checkpoints/latest"
    assert contents(run) == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("training", None),
        ("model", {"num_classes": 10**12}),
        ("model", {"num_classes": 10.0}),
        ("model", {"image_size": [4_000_000, 4_000_000]}),
        ("model", {"image_size": [8, [8]]}),
        ("training", {"batch_size": 10**30}),
        ("training", {"steps": -1}),
        ("training", {"unknown": 1}),
        ("data", {"root": ["x"]}),
        ("flow", "linear"),
        ("nothing", {}),
        ("seed", {"seed": {"deep": [1]}}),
    ],
)
def test_a_tree_that_is_none_is_one_line(
    run: Path, field: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "config.json"
    record = json.loads(path.read_text())
    section = record["config"].get(field)
    merge = isinstance(section, dict) and isinstance(value, dict)
    record["config"][field] = {**section, **value} if merge else value
    path.write_text(json.dumps(record))
    for command in (["train", "--resume", str(run)], ["sample", str(run), "--out", str(run / "o")]):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"selfalign: error: {path} cannot be read: ")
        assert said.count("\n") == 1


def test_going_back_to_an_earlier_checkpoint(tmp_path: Path, small_config: RunConfig) -> None:
    config = override(small_config, {"training.checkpoint_every": 3})
    start_run(config, tmp_path / "run", quiet)
    end = contents(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints" / "step_00000006" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="--step 3"):
        resume_run(tmp_path / "run", None, quiet)
    with pytest.raises(UserError, match="step_00000004 does not exist; .*--step 3"):
        load_run(tmp_path / "run", "raw", step=4)
    assert load_run(tmp_path / "run", "raw", step=3).step == 3
    resume_run(tmp_path / "run", None, quiet, step=3)
    assert contents(tmp_path / "run" / "checkpoints") == end


@pytest.fixture
def held(run: Path) -> Iterator[Path]:
    """A run that another process trains, as far as its lock says."""
    code = (
        "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
        "print(1, flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run / LOCK)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    yield run
    process.kill()
    process.wait()


def test_a_second_process_is_refused(held: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(held)
    assert main(["train", "--resume", str(held), "--training.steps", "8"]) == 2
    assert "in use: another process trains this run" in capsys.readouterr().err
    assert contents(held) == before
    assert main(["sample", str(held), "--out", str(held / "o"), "--num", "2", "--steps", "1"]) == 0


def test_what_a_killed_process_left_is_no_obstacle(run: Path) -> None:
    (run / LOCK).touch()
    (run / "checkpoints" / ".step_00000003.dropped.partial").mkdir()
    (run / ".123.partial.config.json").touch()
    assert resume_run(run, None, quiet) is None
    assert not list(run.rglob(".*"))


def test_a_run_killed_before_its_monitors_were_through_calls_them(
    small_run: Path, run: Path
) -> None:
    expected = read_metrics(small_run)
    (run / "checkpoints" / "monitored").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:-1]) + '\n{"step": 6, "other": 1}\n{"st')
    (run / "curves.png").unlink()
    state = resume_run(run, None, quiet)
    assert state is not None and state.step == 6
    assert read_metrics(run) == expected
    assert (run / "curves.png").is_file()
    assert resume_run(run, None, quiet) is None


def test_data_that_moved(tmp_path: Path, small_config: RunConfig) -> None:
    images = make_images(tmp_path / "images", 12)
    data = {"data.name": "folder", "data.root": str(images), "data.image_size": 8}
    start_run(override(small_config, data), tmp_path / "run", quiet)
    images.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="no such folder; if .* moved, --data.root names its place"):
        resume_run(tmp_path / "run", 8, quiet)
    with pytest.raises(UserError, match="--data.root names its place"):
        _ = load_run(tmp_path / "run").source
    assert len(load_run(tmp_path / "run", data_root=str(tmp_path / "moved")).source.train)
    command = ["train", "--resume", str(tmp_path / "run"), "--training.steps", "8"]
    assert main([*command, "--data.root", str(tmp_path / "moved")]) == 0
    assert read_record(tmp_path / "run").config.data.root == str(tmp_path / "moved")
    make_images(tmp_path / "other", 12)
    for path in (tmp_path / "other").rglob("*.png"):
        Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(
        UserError, match="the data of .* has changed.*and 19 more are of another size"
    ):
        resume_run(tmp_path / "run", 9, quiet, data_root=str(tmp_path / "other"))


def test_looking_into_a_run_tells_what_became_of_its_data(
    tmp_path: Path, small_config: RunConfig
) -> None:
    images = make_images(tmp_path / "images", 12)
    data = {"data.name": "folder", "data.root": str(images), "data.image_size": 8}
    start_run(override(small_config, data), tmp_path / "run", quiet)
    before = load_run(tmp_path / "run").source
    (images / "a" / "003.png").unlink()
    with pytest.warns(UserWarning, match="has changed since it was started: a/003.png is gone"):
        after = load_run(tmp_path / "run").source
    assert len(after.train) == len(before.train)
    (images / "a").rename(images / "c")
    (images / "b").rename(images / "d")
    with pytest.raises(UserError, match="--data.root names the place of that which it was trained"):
        _ = load_run(tmp_path / "run").source


def test_evaluating_tells_what_became_of_the_data(
    tmp_path: Path,
    small_config: RunConfig,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(classifier, "STEPS", 3)
    monkeypatch.setenv("SELFALIGN_CACHE", str(tmp_path / "cache"))
    images = make_images(tmp_path / "images", 12)
    data = {"data.name": "folder", "data.root": str(images), "data.image_size": 8}
    start_run(override(small_config, data), tmp_path / "run", quiet)
    images.rename(tmp_path / "moved")
    evaluate = ["evaluate", str(tmp_path / "run"), "--num", "30", "--steps", "1", "--metrics"]
    evaluate += ["denoising", "--features", "classifier", "--data.root"]
    assert main([*evaluate, str(tmp_path / "moved")]) == 0
    assert "changed" not in capsys.readouterr().out
    (tmp_path / "moved" / "a" / "003.png").unlink()
    random_image(1, 8, 8).save(tmp_path / "moved" / "b" / "new.png")  # was never trained on
    assert main([*evaluate, str(tmp_path / "moved")]) == 0
    assert "a/003.png is gone; what is there was compared" in " ".join(
        capsys.readouterr().out.split()
    )
    other = tmp_path / "other"
    other.mkdir()
    for number in range(24):
        random_image(number, 8, 8).save(other / f"{number}.png")
    assert main([*evaluate, str(other)]) == 2
    assert "--data.name and --data.root compare the run with other" in capsys.readouterr().err
    assert main([*evaluate, str(tmp_path / "nowhere")]) == 2
    assert "nowhere': there is no such folder" in capsys.readouterr().err


def test_images_that_were_repaired_or_are_gone(tmp_path: Path, small_config: RunConfig) -> None:
    images = make_images(tmp_path / "images", 12)
    data = {"data.name": "folder", "data.root": str(images), "data.image_size": 8}
    folder = tmp_path / "run"
    start_run(override(small_config, data), folder, quiet)
    Image.new("RGB", (9, 9)).save(images / "a" / "003.png")  # the same path and label
    with pytest.warns(
        UserWarning, match="changed since .*: a/003.png is of another size; .*goes on"
    ):
        resume_run(folder, 8, quiet)
    resume_run(folder, 9, quiet)  # and from then on it is the run's
    (images / "b" / "005.png").unlink()
    random_image(1, 8, 8).save(images / "b" / "new.png")
    before = contents(folder)
    with pytest.raises(UserError, match="b/005.png is gone; with --data.accept-changes"):
        resume_run(folder, 10, quiet)
    assert contents(folder) == before
    command = ["train", "--resume", str(folder), "--training.steps", "10"]
    with pytest.warns(UserWarning, match="b/005.png is gone; the run goes on"):
        assert main([*command, "--data.accept-changes"]) == 0
    resume_run(folder, 11, quiet)


@pytest.mark.parametrize("kind", ["file", "lost link", "loop"])
def test_checkpoints_out_of_reach_are_not_begun_anew(run: Path, kind: str) -> None:
    """A disk that is not mounted must not cost the run its metrics."""
    place = run / "checkpoints"
    place.rename(run.parent / "elsewhere")
    if kind == "file":
        place.touch()
    else:
        place.symlink_to("checkpoints" if kind == "loop" else "/nonexistent/checkpoints")
    before = contents(run)
    with pytest.raises(UserError, match="nothing is begun anew"):
        resume_run(run, 8, quiet)
    assert contents(run) == before
    place.unlink()
    place.symlink_to(run.parent / "elsewhere")
    state = resume_run(run, 8, quiet)
    assert state is not None and state.step == 8


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("optimizer", "muon", "step_00000006 is of 'adamw'"),
        ("image_size", [4, 16], r"model.image_size is \(4, 16\): the data has \(8, 8\)"),
    ],
)
def test_a_config_that_was_changed_by_hand(
    run: Path, setting: str, value: object, message: str
) -> None:
    path = run / "config.json"
    record = json.loads(path.read_text())
    section = "training" if setting == "optimizer" else "model"
    record["config"][section][setting] = value
    path.write_text(json.dumps(record))
    before = contents(run)
    with pytest.raises(UserError, match=message):
        resume_run(run, 8, quiet)
    assert contents(run) == before


def test_an_image_that_breaks_meanwhile_costs_no_step(
    tmp_path: Path, small_config: RunConfig
) -> None:
    """It is named, what has been done is kept, and the run goes on once it is repaired."""
    images = make_images(tmp_path / "images", 12)
    config = override(
        small_config,
        {
            **{"data.name": "folder", "data.root": str(images), "data.image_size": 8},
            **{"training.log_every": 1, "training.steps": 8},
        },
    )
    folder, broken = tmp_path / "run", images / "a" / "003.png"
    content = broken.read_bytes()

    def breaks(state: TrainingState, values: dict[str, float]) -> None:
        if state.step == 3:
            broken.write_bytes(b"x" * len(content))

    with pytest.raises(UserError, match="a/003.png is not a readable image"):
        start_run(config, folder, breaks)
    done = step_of(latest_checkpoint(folder / "checkpoints"))
    assert done >= 3
    broken.write_bytes(content)
    state = resume_run(folder, None, quiet)
    assert state is not None and state.step == 8
    assert [line["step"] for line in read_metrics(folder) if "loss" in line] == list(range(1, 9))


def test_a_run_of_version_0_1_0_goes_on(run: Path) -> None:
    """It had no checksums, no mark of its monitors, and its numbers as they came."""
    checkpoint = latest_checkpoint(run / "checkpoints")
    (checkpoint / "checksums.json").unlink()
    (checkpoint / "state.json").write_text('{\n  "scaler": null,\n  "step": 6\n}')
    (run / "checkpoints" / "monitored").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "gradient_norm": Infinity, "other": NaN}\n')
    assert resume_run(run, None, quiet) is None
    assert load_run(run).step == 6
    state = resume_run(run, 8, quiet)
    assert state is not None and state.step == 8
    assert len([line for line in read_metrics(run) if "heldout_ema" in line]) == 2
    json.loads((run / "metrics.jsonl").read_text().splitlines()[-1], parse_constant=pytest.fail)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts")
def test_a_read_only_run_is_sampled_and_evaluated_elsewhere(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mount = subprocess.run(["mount", "--bind", "-o", "ro", run, run], check=False)
    if mount.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        sample = ["sample", str(run), "--num", "2", "--steps", "1", "--out"]
        assert main([*sample, str(tmp_path / "samples")]) == 0
        assert main([*sample, str(run / "samples_here")]) == 2
        assert main(["train", "--resume", str(run), "--training.steps", "8"]) == 2
        said = capsys.readouterr().err
        assert said.count("selfalign: error: ") == said.count("\n") == 2
        evaluate = ["evaluate", str(run), "--num", "30", "--steps", "1", "--metrics", "denoising"]
        assert main([*evaluate, "--out", str(tmp_path / "evaluation")]) == 0
        assert (tmp_path / "evaluation" / "evaluation.json").is_file()
    finally:
        subprocess.run(["umount", run], check=True)


def test_the_lock_is_released(run: Path) -> None:
    resume_run(run, None, quiet)
    with FileLock(run / LOCK, blocking=False):
        pass


def test_a_recipe_of_other_steps_is_refused_in_a_used_folder(run: Path) -> None:
    with pytest.raises(UserError, match="holds a run already"):
        start_run(recipe("sit", SMALL), run, quiet)
