"""Runs and released checkpoints looked into from the command line, and the pages read in a browser."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL
from reading import WIDTHS, assert_fits, assert_outline, assert_pictures, opened, smallest_text
from safetensors.torch import save_file
from support import resolved

from selfalign import build_student, override, recipe
from selfalign.cli import main
from selfalign.inspect import (
    alignment,
    attention,
    batch,
    interventions,
    labels,
    pca,
    probes,
    similarity,
    timesteps,
)
from selfalign.inspect.analyses import ANALYSES
from selfalign.runs.start import start_run

FEW = {
    (timesteps, "IMAGES"): 8,
    (timesteps, "LEVELS"): (0.0, 0.5, 1.0),
    (probes, "IMAGES"): 120,
    (probes, "DRAWS"): 1,
    (probes, "TIMESTEPS"): (0.1, 0.7),
    (pca, "IMAGES"): 12,
    (attention, "IMAGES"): 8,
    (attention, "LEVELS"): (0.2, 0.8),
    (interventions, "IMAGES"): 20,
    (interventions, "LEVELS"): (0.2, 0.8),
    (interventions, "PAIRS"): 20,
    (interventions, "SAMPLES"): 40,
    (interventions, "STEPS"): 2,
    (similarity, "IMAGES"): 60,
    (alignment, "IMAGES"): 16,
    (labels, "PAIRS"): 40,
    (batch, "PAIRS"): 40,
    (batch, "VISITS"): 50,
}
"""What the analyses take of images and timesteps here, so that they take seconds."""


@pytest.fixture(scope="module", autouse=True)
def _few_images() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), value in FEW.items():
            patch.setattr(module, name, value)
        yield


@pytest.fixture(scope="module")
def run(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a run, which may be written into."""
    folder = tmp_path_factory.mktemp("looked into") / "a run"
    shutil.copytree(small_run, folder)
    return folder


@pytest.fixture(scope="module")
def report(run: Path) -> Path:
    """Of all analyses, with another seed beside it (the same one: the ceiling is 1)."""
    assert main(["inspect", str(run), "--beside", str(run)]) == 0
    return run / "inspect" / "report.html"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in SRA's layout, of the shape of digits."""
    config = resolved("sra", {"model.size": "tiny/2"}, num_classes=10)
    model = build_student(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    file = tmp_path_factory.mktemp("released") / "sra.safetensors"
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, file)
    return file


class TestInABrowser:
    @pytest.fixture(scope="class")
    @staticmethod
    def page(browser: object, report: Path) -> Iterator[object]:
        with opened(browser, report) as page:
            yield page

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("width", WIDTHS)
    def test_nothing_overflows(self, page, width, scheme):
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert_fits(page, width, scheme)

    def test_a_row_leaves_room_for_its_numbers_on_a_phone(self, page):
        page.set_viewport_size({"width": WIDTHS[0], "height": 900})
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        widest = page.evaluate(
            "Math.max(...[...document.querySelectorAll('tbody th')].map(e => e.offsetWidth))"
        )
        assert widest <= WIDTHS[0] / 2

    def test_text_is_large_enough_on_a_phone(self, page):
        assert smallest_text(page) >= 9.5

    def test_pictures_are_there_and_described(self, page):
        assert_pictures(page, images=20, within_charts=30)

    def test_it_is_told_in_order(self, page, report):
        assert_outline(page)
        headings = page.locator("h2").all_inner_texts()
        assert len(headings) == len(ANALYSES) + 1
        text = " ".join(page.inner_text("main").split())
        for word in ("Definition", "Control", "shuffled labels", "best linear denoiser"):
            assert word in text
        assert "nan" not in text.lower().split()
        assert page.errors == []
        assert [u for u in page.requests if not u.startswith("data:")] == [report.as_uri()]

    def test_links_lead_to_their_sections(self, page):
        for link in page.locator(".findings a").all():
            assert page.locator(f"h2{link.get_attribute('href')}").count() == 1


class TestFiles:
    def test_numbers_of_every_analysis(self, report):
        for name in ANALYSES:
            numbers = json.loads((report.parent / f"{name}.json").read_text())
            assert numbers["analysis"] == name and numbers["subject"] == "a run"
            assert numbers["step"] == 6 and len(numbers["data_fingerprint"]) == 16
        text = report.read_text()
        assert str(report.parent) not in text and 'src="http' not in text

    def test_the_same_every_time(self, report, run, tmp_path):
        again = ["inspect", str(run), "--beside", str(run), "--out", str(tmp_path / "again")]
        assert main(again) == 0
        for name in ANALYSES:
            first, second = (
                (folder / f"{name}.json").read_bytes()
                for folder in (report.parent, tmp_path / "again")
            )
            assert first == second, name

    def test_separated_training_is_seen(self, report):
        """The recipe of this run separates attention: nothing crosses, exactly."""
        numbers = json.loads((report.parent / "interventions.json").read_text())
        assert numbers["trained_with"] == "separated"
        changes = numbers["changes"]
        assert all(value == 0 for table in changes.values() for row in table for value in row)
        ceiling = json.loads((report.parent / "similarity.json").read_text())["pairs"]
        twins = [pair for name, pair in ceiling.items() if "another seed" in name]
        blocks = json.loads((report.parent / "similarity.json").read_text())["blocks"]
        assert len(twins) == len(blocks), "a ceiling for every block"
        assert all(twin["cka"]["value"] == pytest.approx(1) for twin in twins)


class TestReleases:
    def test_a_released_checkpoint(self, release, capsys):
        """It brings no images and no training: it is shown a data set's, and its recipe's views."""
        shown = ["--data.name", "digits", "--only", "timesteps", "attention", "alignment", "labels"]
        assert main(["inspect", str(release), "--source", "sra", *shown]) == 0
        folder = release.with_suffix("") / "inspect"
        numbers = json.loads((folder / "timesteps.json").read_text())
        assert numbers["step"] is None and numbers["trained_with"] == "full"
        assert "not known" in (folder / "report.html").read_text()

    def test_with_another_recipes_views(self, release, tmp_path):
        arguments = ["--data.name", "digits", "--recipe", "sra-dts-as", "--only", "batch", "views"]
        out = ["--out", str(tmp_path / "out")]
        assert main(["inspect", str(release), *arguments, *out]) == 0
        numbers = json.loads((tmp_path / "out" / "views.json").read_text())
        assert numbers["attention"] == ["within groups"]
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
            "batch.json",
            "report.html",
            "views.json",
        ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere does not exist: allowed are a run"),
        (["{release}"], "brings no images: --data.name names a data set"),
        (["{release}", "--data.name", "mnist", "--data.root", "x"], "mnist"),
        (["{run}", "--data.name", "mnist"], "a run knows its data; allowed is data.root"),
        (["{run}", "--step", "5"], "5"),
        (["{run}", "--only", "everything"], "--only"),
        (["{run}", "--beside", "nowhere"], "'nowhere' is not a run"),
        (["{run}", "--features", "magic"], "--features is 'magic': allowed are inception"),
        (["{run}", "--out", "{release}/x"], "is not a folder"),
    ],
)
def test_mistakes_are_one_line(words, message, run, release, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [word.format(run=run, release=release) for word in words]
    assert main(["inspect", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("selfalign: error: ") and said.count("\n") == 1 and message in said
    assert list(tmp_path.iterdir()) == []


def test_another_seed_has_the_same_shape(run, tmp_path, capsys, small_config):
    other = override(small_config, {"model.num_classes": 0, "training.steps": 1})
    start_run(other, tmp_path / "unlike", lambda state, values: None, monitors=())
    assert main(["inspect", str(run), "--beside", str(tmp_path / "unlike")]) == 2
    assert "another seed has the same model and data" in capsys.readouterr().err


class TestOtherRuns:
    def test_without_classes_and_alignment(self, tmp_path):
        """What has no labels and no teacher is left out with its reason."""
        changes = {
            "model.size": "tiny/2",
            "model.num_classes": 0,
            "training.steps": 2,
            "training.batch_size": 8,
            "training.log_every": 1,
            "training.trackers": (),
        }
        config = recipe("sit", changes)
        start_run(config, tmp_path / "run", lambda state, values: None, monitors=())
        chosen = ["batch", "attention", "similarity", "alignment", "labels", "probes"]
        assert main(["inspect", str(tmp_path / "run"), "--only", *chosen]) == 0
        text = (tmp_path / "run" / "inspect" / "report.html").read_text()
        assert "Left out: the model or its data has no two classes." in text
        assert "This recipe aligns nothing" in text

    def test_samples_of_unequal_lengths(self, tmp_path, monkeypatch):
        """What looks at tokens leaves them out and says so; no classifier is trained for nothing."""
        generator = np.random.default_rng(0)
        arrays = {"samples": generator.normal(size=(60, 2, 12)), "labels": np.arange(60) % 3}
        np.savez(tmp_path / "a.npz", **arrays, lengths=3 + np.arange(60) % 10)
        changes = {
            **SMALL,
            "data.name": "arrays",
            "data.root": str(tmp_path / "a.npz"),
            "data.sources.arrays.lengths": "lengths",
            "training.steps": 2,
        }
        run = tmp_path / "run"
        start_run(recipe("sra-dts-as", changes), run, lambda state, values: None, monitors=())
        monkeypatch.delattr("selfalign.inspect.subject.feature_network")
        assert main(["inspect", str(run), "--only", "timesteps", "labels"]) == 0
        text = (run / "inspect" / "report.html").read_text()
        assert text.count("Left out: it looks at samples that are equally long") == 1
        numbers = json.loads((run / "inspect" / "labels.json").read_text())
        assert numbers["this model"]["overall"] is not None


class TestRunsSideBySide:
    @pytest.fixture(scope="class")
    @staticmethod
    def compared(
        run: Path, small_config: object, tmp_path_factory: pytest.TempPathFactory
    ) -> tuple[Path, Path]:
        """A page of two runs that differ in seed and rate, and one of one run."""
        folder = tmp_path_factory.mktemp("beside")
        changes = {"seed": 1, "training.learning_rate": 2e-3}
        start_run(override(small_config, changes), folder / "<b>$x$", lambda state, values: None)
        assert (
            main(["report", str(run), str(folder / "<b>$x$"), "--out", str(folder / "two.html")])
            == 0
        )
        assert main(["report", str(run)]) == 0
        return folder / "two.html", run / "report.html"

    @pytest.fixture(scope="class")
    @staticmethod
    def page(browser: object, compared: tuple[Path, Path]) -> Iterator[object]:
        with opened(browser, compared[0]) as page:
            yield page

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("width", WIDTHS)
    def test_nothing_overflows(self, page, width, scheme):
        assert_fits(page, width, scheme)

    def test_it_can_be_read(self, page, compared):
        assert smallest_text(page) >= 9.5
        assert_pictures(page, images=4, within_charts=0)
        assert_outline(page)
        assert page.errors == []
        assert [u for u in page.requests if not u.startswith("data:")] == [compared[0].as_uri()]

    def test_what_differs(self, page):
        table = page.locator("table", has=page.get_by_text("Settings that differ"))
        names = table.locator("tbody th").all_inner_texts()
        assert names == ["seed", "training.learning_rate"]
        assert table.locator("thead th").all_inner_texts()[1:] == ["a run", "<b>$x$"]

    def test_the_numbers(self, compared):
        numbers = json.loads(compared[0].with_suffix(".json").read_text())
        assert set(numbers["runs"]) == {"a run", "<b>$x$"}
        assert set(numbers["runs"]["a run"]["terms"]) == {"denoising", "alignment"}
        assert numbers["settings"]["different"]["a run"]["seed"] == "0"
        assert numbers["runs"]["a run"]["images_per_second"] > 0

    def test_one_run(self, compared):
        text = compared[1].read_text()
        assert "<h1>a run</h1>" in text and "What differs" not in text

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ([], "report"),
            (["nowhere"], "'nowhere' is not a run"),
            (["{run}", "{run}"], "is named twice"),
            (["{run}", "--out", "page.txt"], "allowed is a name that ends in .html"),
        ],
    )
    def test_mistakes_are_one_line(self, words, message, run, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert main(["report", *(word.format(run=run) for word in words)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and message in said
        assert list(tmp_path.iterdir()) == []

    def test_no_other_file_is_written_over(self, run, tmp_path, capsys):
        copy = shutil.copytree(run, tmp_path / "run")
        config = (copy / "config.json").read_bytes()
        assert main(["report", str(run), "--out", str(copy / "config.html")]) == 2
        assert "config.json: that is another file" in capsys.readouterr().err
        assert (copy / "config.json").read_bytes() == config
        for name in ("page.html", "page.json"):
            (tmp_path / name).mkdir()
            assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 2
            assert f"{name} is a folder" in capsys.readouterr().err
            (tmp_path / name).rmdir()


def test_a_recipe_that_drops_a_group_shows_its_views(tmp_path: Path) -> None:
    dropped = {"views.mask_ratios": (0.25, 0.5, 0.25), "views.hidden_groups": 1}
    config = recipe("sra-dts-as", {**SMALL, "training.steps": 1, **dropped})
    start_run(config, tmp_path / "run", lambda state, values: None, monitors=())
    assert main(["inspect", str(tmp_path / "run"), "--only", "views"]) == 0
    (page,) = (tmp_path / "run").rglob("*.html")
    assert "<svg" in page.read_text()
