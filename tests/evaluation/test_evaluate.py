"""`selfalign evaluate` from end to end, on digits."""

import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from support import in_two_processes, on_cpus, torchrun

from selfalign import UserError
from selfalign.cli import main
from selfalign.data.datasets import open_data
from selfalign.data.shapes import to_uint8
from selfalign.evaluation import generation, reference
from selfalign.evaluation.classifier import get_classifier
from selfalign.evaluation.config import EvaluationConfig, EvaluationData
from selfalign.evaluation.evaluate import evaluate
from selfalign.evaluation.features import extract, feature_network
from selfalign.evaluation.frechet import fit, frechet_distance
from selfalign.evaluation.generation import samples_folder
from selfalign.evaluation.inputs import open_split
from selfalign.evaluation.report import Evaluation
from selfalign.runs.load import load_run
from selfalign.sampling.generate import generate
from selfalign.sampling.settings import SamplingConfig
from selfalign.sections import DataConfig

SAMPLING = SamplingConfig(solver="euler", steps=2)
SOURCE = open_data(DataConfig())


def digits(split: str, count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Images (M, 8, 8, 1) and labels of digits, as a samples file holds them."""
    images, labels = getattr(SOURCE, split).read(range(count))
    return to_uint8(images).permute(0, 2, 3, 1).numpy(), labels.numpy()


@pytest.fixture
def heldout(tmp_path: Path) -> Path:
    """Real images in the place of samples: the held-out digits."""
    images, labels = digits("heldout")
    np.savez(tmp_path / "heldout.npz", arr_0=images, arr_1=labels)
    return tmp_path / "heldout.npz"


def run(subject: Path, **settings: object) -> Evaluation:
    """Evaluate in this process."""
    found = evaluate(subject, EvaluationConfig(**settings), SAMPLING, Accelerator())  # type: ignore[arg-type]
    assert found is not None
    return found


class TestSamples:
    def test_real_images_are_good_samples(self, heldout: Path) -> None:
        found = run(heldout, reference="digits")
        values = {name: estimate.value for name, estimate in found.metrics.items()}
        assert set(values) == {
            "fd_classifier",
            "precision",
            "recall",
            "class_consistency",
            "memorised_share",
            "nearer_than_heldout",
            "planted_copies_found",
        }
        assert values["class_consistency"] == found.settings["features"]["heldout_accuracy"] > 0.97
        assert values["precision"] > 0.8 and values["recall"] > 0.8
        # They are the held-out images that they are measured by.
        assert values["memorised_share"] == pytest.approx(0.05, abs=0.003)
        assert values["nearer_than_heldout"] == pytest.approx(0.5)
        assert values["planted_copies_found"] > 0.9
        assert found.baseline["fd_classifier"] == found.metrics["fd_classifier"]

    @on_cpus
    def test_the_distance_is_that_of_the_classifiers_features(self, heldout: Path) -> None:
        found = run(heldout, reference="digits", metrics=("fd",))
        module = get_classifier(SOURCE, "digits").module
        with torch.no_grad():
            fits = [
                fit(module(to_uint8(split.read(range(len(split)))[0]))["features"])
                for split in (SOURCE.heldout, SOURCE.train)
            ]
        assert found.metrics["fd_classifier"].value == pytest.approx(frechet_distance(*fits), 1e-6)

    @pytest.mark.slow
    def test_real_images_are_at_no_distance_once_it_is_extrapolated(self, heldout: Path) -> None:
        found = run(heldout, reference="digits", metrics=("fd", "fd-infinity"))
        plain, extrapolated = (found.metrics[n] for n in ("fd_classifier", "fd_infinity"))
        assert plain.value > 2 * plain.standard_error, "few images alone make a distance"
        assert abs(extrapolated.value) < 2 * extrapolated.standard_error
        assert found.baseline["fd_infinity"] == extrapolated, "held-out images are measured as well"

    def test_copies_of_training_images_are_found(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "copies.npz", arr_0=digits("train", 200)[0])
        found = run(tmp_path / "copies.npz", reference="digits", metrics=("memorisation",))
        assert found.metrics["memorised_share"].value == 1
        assert found.metrics["nearer_than_heldout"].value == 1

    def test_writes_everything_that_matters(self, heldout: Path, tmp_path: Path) -> None:
        found = run(heldout, reference="digits", out=tmp_path / "out", num=100)
        written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
        assert written == json.loads(json.dumps(found.as_json()))
        settings = written["settings"]
        assert settings["samples"]["count"] == 100
        assert settings["reference"]["count"] == len(SOURCE.train)
        assert settings["reference"]["fingerprint"] == f"{SOURCE.fingerprint}:training"
        assert len(settings["features"]["weight_hash"]) == 16
        assert settings["versions"].keys() >= {"selfalign", "torch"}
        assert (tmp_path / "out" / "evaluation.png").read_bytes()[:4] == b"\x89PNG"

    def test_another_set_of_samples_is_a_reference(self, heldout: Path, tmp_path: Path) -> None:
        np.savez(tmp_path / "train.npz", arr_0=digits("train", 1397)[0])
        data = EvaluationData(name="digits")
        to_file = run(heldout, reference=str(tmp_path / "train.npz"), data=data)
        to_name = run(heldout, reference="digits")
        assert set(to_file.metrics) == {"fd_classifier", "precision", "recall", "class_consistency"}
        for name, estimate in to_file.metrics.items():
            assert estimate == to_name.metrics[name]


class TestReference:
    def test_round_trip_in_adms_format(self, heldout: Path, tmp_path: Path) -> None:
        file = tmp_path / "reference.npz"
        first = run(heldout, reference="digits", metrics=("fd",), write_reference=file)
        arrays = np.load(file)
        assert {"arr_0", "mu", "sigma"} <= set(arrays)
        data = EvaluationData(name="digits")
        with_images = run(
            heldout, reference=str(file), metrics=("fd", "precision-recall"), data=data
        )
        assert with_images.metrics["fd_classifier"] == first.metrics["fd_classifier"]
        np.savez(file, mu=arrays["mu"], sigma=arrays["sigma"])
        statistics = run(heldout, reference=str(file), data=data)
        assert statistics.metrics["fd_classifier"] == first.metrics["fd_classifier"]
        with pytest.raises(UserError, match="precision-recall needs a reference with images"):
            run(heldout, reference=str(file), metrics=("precision-recall",), data=data)

    def test_is_computed_once(self, heldout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = run(heldout, reference="digits", metrics=("fd",))

        def compute(*arguments: object) -> None:
            raise AssertionError("the statistics were in the cache")

        monkeypatch.setattr(reference, "_compute", compute)
        assert run(heldout, reference="digits", metrics=("fd",)).metrics == first.metrics

    def test_a_damaged_cache_is_computed_again(self, heldout: Path, cache: Path) -> None:
        first = run(heldout, reference="digits", metrics=("fd",))
        for file in (cache / "references").iterdir():
            file.write_bytes(file.read_bytes()[:1000])
        assert run(heldout, reference="digits", metrics=("fd",)).metrics == first.metrics

    def test_statistics_are_numpys(self) -> None:
        network = feature_network("classifier", SOURCE, "digits")
        images = open_split("digits", SOURCE, "training")
        accelerator = Accelerator()
        measured = reference.measure(
            reference.ReferenceSource(images.name, images.fingerprint, images),
            network,
            lambda x: extract(network, x, accelerator, 64),
            accelerator,
        )
        features = measured.features
        assert features is not None
        double = features.double().numpy()
        gaussian = measured.gaussians["features"]
        np.testing.assert_allclose(gaussian.mean.numpy(), double.mean(0), rtol=1e-10)
        np.testing.assert_allclose(
            gaussian.covariance.numpy(), np.cov(double, rowvar=False), rtol=1e-9, atol=1e-12
        )


class TestRun:
    def test_samples_are_those_of_the_sampler_and_are_reused(
        self, run_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(generation, "SHARD", 16)
        found = run(run_folder, num=40)
        assert set(found.denoising) == {"ema", "raw"}
        assert found.denoising["ema"] != found.denoising["raw"]
        assert found.settings["samples"]["sampling"]["solver"] == "euler"
        loaded = load_run(run_folder)
        expected = next(generate(loaded.model, "linear", SAMPLING, 40, batch_size=40))
        arrays = np.load(found.folder / "samples.npz")
        np.testing.assert_array_equal(
            arrays["arr_0"], to_uint8(expected.images).permute(0, 2, 3, 1).numpy()
        )
        np.testing.assert_array_equal(arrays["arr_1"], expected.labels.numpy())
        assert sorted(path.name for path in found.folder.iterdir()) == [
            "evaluation.json",
            "evaluation.png",
            "samples.npz",
            "sampling.json",
        ]

        def never(*arguments: object) -> None:
            raise AssertionError("these samples exist")

        monkeypatch.setattr(generation, "_write_shard", never)
        again = run(run_folder, num=30, metrics=("fd", "consistency"))
        assert again.settings["samples"]["count"] == 30

    def test_generation_continues_where_it_was_interrupted(
        self, run_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(generation, "SHARD", 16)
        write, written, allowed = generation._write_shard, [], [2]

        def counting(*arguments: object) -> None:
            if len(written) == allowed[0]:
                raise KeyboardInterrupt
            written.append(arguments[1])
            write(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(generation, "_write_shard", counting)
        with pytest.raises(KeyboardInterrupt):
            run(run_folder, num=40, metrics=("fd",))
        folder = samples_folder(load_run(run_folder), "ema", SAMPLING)
        assert not (folder / "samples.npz").exists()
        assert len(list((folder / "shards").glob("*.npz"))) == 2
        allowed[0] = 100
        whole = run(run_folder, num=40, metrics=("fd",))
        assert written == [range(16), range(16, 32), range(32, 40)]
        more = run(run_folder, num=60, metrics=("fd",))  # goes on from the 40
        assert written[3:] == [range(40, 56), range(56, 60)]
        shutil.rmtree(folder)
        for count, interrupted in ((40, whole), (60, more)):
            assert run(run_folder, num=count, metrics=("fd",)).metrics == interrupted.metrics

    def test_weights_and_settings_do_not_share_samples(self, run_folder: Path) -> None:
        folders = {
            samples_folder(load_run(run_folder, weights), weights, sampling)
            for weights in ("ema", "raw")
            for sampling in (
                SAMPLING,
                SamplingConfig(solver="heun", steps=2),
                SamplingConfig(seed=1),
            )
        }
        assert len(folders) == 6

    def test_new_settings_keep_the_folders_of_old_ones(self, run_folder: Path) -> None:
        """A setting that did not exist counts in the folder's name only where it is not the default."""
        loaded = load_run(run_folder)
        before = (
            "SamplingConfig(solver='euler', steps=2, guidance_scale=1.0, guidance_interval=(0.0, 1.0), "
            "mask_ratio=0.0, mask_type='fixed', seed=0)"
        )
        digest = hashlib.sha256(before.encode())
        for name, tensor in sorted(loaded.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.numpy().tobytes())
        folder = samples_folder(loaded, "ema", SAMPLING)
        assert folder.name == f"step_00000001-ema-{digest.hexdigest()[:12]}"
        others = {
            samples_folder(loaded, "ema", SAMPLING, "balanced"),
            samples_folder(loaded, "ema", SAMPLING, (1, 2)),
            samples_folder(loaded, "ema", replace(SAMPLING, guidance_channels="first-three")),
        }
        assert len({folder, *others}) == 4


def test_several_processes_give_the_numbers_of_one(
    run_folder: Path, cache: Path, tmp_path: Path
) -> None:
    """Sharded generation and feature extraction under torchrun, over gloo on the CPU."""
    get_classifier(SOURCE, "digits")
    numbers = []
    for processes in (1, 2, 3):
        folder = tmp_path / f"run{processes}"
        shutil.copytree(run_folder, folder)
        environment = {
            **os.environ,
            "SELFALIGN_CACHE": str(tmp_path / f"cache{processes}"),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "ACCELERATE_USE_CPU": "true",
        }
        shutil.copytree(cache / "classifiers", tmp_path / f"cache{processes}" / "classifiers")
        command = [
            *(*torchrun(processes), "-m", "selfalign.cli"),
            *("evaluate", str(folder)),
            # torchrun would take --num for an abbreviation of an option of its own.
            *("--num-samples", "600", "--steps", "1", "--out", str(tmp_path / f"out{processes}")),
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        numbers.append(json.loads((tmp_path / f"out{processes}" / "evaluation.json").read_text()))
    assert [n["settings"]["processes"] for n in numbers] == [1, 2, 3]
    for part in ("metrics", "heldout_images", "heldout_denoising_loss"):
        assert numbers[0][part] == numbers[1][part] == numbers[2][part]
    fingerprints = {n["settings"]["samples"]["fingerprint"] for n in numbers}
    assert len(fingerprints) == 1


@pytest.mark.parametrize(
    "fails_in",
    [
        pytest.param("all processes", marks=pytest.mark.slow),
        pytest.param("the main one", marks=pytest.mark.slow),
        "the other one",
    ],
)
def test_what_one_process_cannot_do_ends_all_with_one_line(
    fails_in: str, cache: Path, tmp_path: Path
) -> None:
    get_classifier(SOURCE, "digits")
    folder = tmp_path / "images"
    folder.mkdir()
    for number, image in enumerate(digits("heldout", 70)[0][:, :, :, 0]):
        Image.fromarray(image).save(folder / f"{number:02}.png")
    options, message = {
        "all processes": (["--reference", "absent"], "absent does not exist"),
        "the main one": (["--num", "19", "--metrics", "fd"], "needs at least 20 samples"),
        "the other one": (["--metrics", "fd"], "67.png is not a readable image"),  # in batch 1
    }[fails_in]
    if fails_in == "the other one":
        (folder / "67.png").write_bytes(b"no image")
    command = ("evaluate", folder, "--data.name", "digits", "--reference", "digits", *options)
    codes, said = zip(*in_two_processes(*command), strict=True)
    assert codes == (2, 2), said
    assert said[0].count("\n") == 1 and message in said[0]
    assert said[1] == ""


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("--reference absent.npz --data.name digits", "absent.npz does not exist"),
            ("--reference digits --features clip", "allowed are inception, dinov2, classifier"),
            ("--reference digits --metrics fid", "--metrics fid needs --features inception"),
            ("--reference digits --metrics denoising", "denoising needs a run, not samples"),
            ("--reference digits --metrics fids", "--metrics"),
            ("--reference digits --num 0", "--num is 0: allowed is a number from 1"),
            ("--reference digits --num 401", "--num is 401: heldout.npz holds 400 images"),
            ("--reference digits --num 19 --metrics fd", "at least 20 samples, here are 19"),
            ("--reference digits --num 3 --metrics precision-recall", "more than 3 samples"),
            ("--reference digits --write-reference x.txt", "allowed is a name ending in .npz"),
            ("", "--reference is left out"),
        ],
    )
    def test_one_line_and_exit_code_2(
        self, heldout: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
    ) -> None:
        assert main(["evaluate", str(heldout), *options.split()]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1

    def test_other_sizes_and_channels(
        self, tmp_path: Path, heldout: Path, run_folder: Path
    ) -> None:
        large = np.zeros((30, 16, 16, 1), np.uint8)
        colour = np.zeros((30, 8, 8, 3), np.uint8)
        for images in (large, colour):
            np.savez(tmp_path / "x.npz", arr_0=images)
            with pytest.raises(UserError, match="the classifier was trained on"):
                run(tmp_path / "x.npz", reference="digits")
            with pytest.raises(UserError, match=r"shape|both must be the same"):
                run(heldout, reference=str(tmp_path / "x.npz"), data=EvaluationData(name="digits"))
        with pytest.raises(UserError, match="does not exist: allowed are a run"):
            run(tmp_path / "absent")

    def test_statistics_of_another_network(self, heldout: Path, tmp_path: Path) -> None:
        file, data = tmp_path / "r.npz", EvaluationData(name="digits")
        np.savez(file, mu=np.zeros(2048), sigma=np.eye(2048))
        with pytest.raises(UserError, match="64 features and the reference statistics 2048"):
            run(heldout, reference=str(file), data=data)
        np.savez(file, mu=np.zeros(64), sigma=np.eye(63))
        with pytest.raises(UserError, match=r"mu and sigma of .* have the shapes"):
            run(heldout, reference=str(file), data=data)
        np.savez(file, mu=np.zeros(64), sigma=np.eye(64), network="inception 0123456789abcdef")
        with pytest.raises(UserError, match="holds statistics of inception"):
            run(heldout, reference=str(file), data=data)
        np.savez(file, labels=np.zeros(64))
        with pytest.raises(UserError, match="holds labels: a reference holds images"):
            run(heldout, reference=str(file), data=data)


def test_prints_a_table(heldout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(heldout), "--reference", "digits", "--metrics", "fd"]) == 0
    said = capsys.readouterr().out
    assert "fd_classifier" in said and "recognises" in said and "evaluation.json" in said
