"""A run folder that version 0.1.0 wrote: it resumes, and samples, with the numbers that 0.1.0 gave.

The run is `sra-dts-as` on digits, tiny/4, four steps of batch 8. Its weights, averages and moments were
thinned out to a fiftieth and rounded to 16 bits, so that the folder is small; 0.1.0 itself went on from
there, and these are its numbers.
"""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from support import on_cpus

from selfalign.cli import main

ARCHIVE = Path(__file__).parent.parent / "golden" / "run_v0.1.0.tar.xz"
LOSSES = {  # loss, denoising, alignment, gradient norm
    5: (2.182647466659546, 1.7175548076629639, 0.9301851391792297, 10.924918174743652),
    6: (1.7957205772399902, 1.6193145513534546, 0.3528120517730713, 6.613236427307129),
    7: (1.6022191047668457, 1.5535751581192017, 0.09728789329528809, 2.7361037731170654),
    8: (1.6296825408935547, 1.6113531589508057, 0.036658644676208496, 1.6185767650604248),
}
HELDOUT_EMA, HELDOUT_RAW = 1.5818252623081208, 1.5683685839176178
LABELS = [9, 1, 8, 9]
SUMS = [7864, 8544, 9001, 8423]
"""Of each sample's bytes: raw weights, Euler, 5 steps."""
FIRST_ROW = [216, 192, 0, 113, 40, 28, 35, 19]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The run's folder."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run_v0.1.0"


@on_cpus
def test_resumes_with_the_same_numbers(folder: Path) -> None:
    assert main(["train", "--resume", str(folder), "--training.steps", "8"]) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in lines if "loss" in line}
    assert list(steps) == list(range(1, 9))
    for step, expected in LOSSES.items():
        line = steps[step]
        found = [line[k] for k in ("loss", "denoising_loss", "alignment_loss", "gradient_norm")]
        assert found == pytest.approx(expected, rel=2e-5)
    heldout = [line for line in lines if "heldout_ema" in line and line["step"] == 8][-1]
    assert heldout["heldout_ema"] == pytest.approx(HELDOUT_EMA, rel=2e-5)
    assert heldout["heldout_raw"] == pytest.approx(HELDOUT_RAW, rel=2e-5)


def test_samples_the_same_images(folder: Path, tmp_path: Path) -> None:
    words = ["--num", "4", "--steps", "5", "--weights", "raw", "--out", str(tmp_path / "samples")]
    assert main(["sample", str(folder), *words]) == 0
    samples = np.load(tmp_path / "samples" / "samples.npz")
    assert samples["arr_1"].tolist() == LABELS
    images = samples["arr_0"].astype(int)
    # A byte may be rounded to its neighbour.
    assert np.abs(images[0, 0, :, 0] - FIRST_ROW).max() <= 1
    assert np.abs(images.reshape(4, -1).sum(axis=1) - SUMS).max() <= 4


def test_options_of_0_1_0_mean_what_they_did(tmp_path: Path) -> None:
    words = (
        "train self-flow --data.name digits --model.size tiny/4 --training.steps 1 "
        "--training.batch-size 4 --training.trackers --training.heldout-samples 10 "
        "--views.timesteps dual --alignment.weight 0.3 --alignment.distance smooth-l1 "
        "--alignment.student-block 2 --alignment.teacher-block=5 "
        "--alignment.teacher-timestep self-flow --alignment.teacher_interval 0.1 "
        "--alignment.no-teacher-groups --alignment.teacher-labels dropped"
    )
    assert main([*words.split(), "--out", str(tmp_path / "run")]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert config["views"]["timesteps"] == "independent"
    alignment, ema = config["terms"]["alignment"], config["targets"]["ema"]
    assert (alignment["weight"], alignment["distance"], alignment["block"]) == (0.3, "smooth-l1", 2)
    assert (ema["block"], ema["timestep"], ema["interval"]) == (5, "minimum", 0.1)
    assert (ema["groups"], ema["labels"]) == (False, "dropped")
