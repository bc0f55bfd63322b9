"""The report of a made-up study, read in a browser as a person would read it."""

import dataclasses
import html
import itertools
import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from reading import (
    WIDTHS,
    assert_fits,
    assert_outline,
    assert_pictures,
    opened,
    smallest_text,
)
from study.synthetic import EFFECT, GRID, SETTINGS, write_synthetic_study

from selfalign.cli.console import parse
from selfalign.cli.train import TrainArguments
from selfalign.cli.tree import build_tree, options_of
from selfalign.errors import UserError
from selfalign.pages.figures import Bar, forest_plot
from selfalign.recipes import recipe
from selfalign.study.estimates import Estimate
from selfalign.study.grid import Effect, Grid, Row, Table, Variant
from selfalign.study.grids import GRIDS
from selfalign.study.paper import PAPER, QUESTION
from selfalign.study.plan import Study, write_study
from selfalign.study.report import write_report
from selfalign.study.report.page import _bar
from selfalign.study.report.pictures import find_data, sample_strips
from selfalign.study.report.provenance import study_command, train_command
from selfalign.study.results import read_results
from selfalign.study.verdicts import EffectEstimate


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a study that is not finished: one run failed, two are waited for."""
    folder = tmp_path_factory.mktemp("studies") / "small"
    write_synthetic_study(
        folder,
        fractions=(0.25, 1.0),
        keep=lambda variant, seed: not (variant == "sra-dts-as" and seed < 2),
    )
    return write_report(folder)


@pytest.fixture(scope="module")
def page(browser, report: Path) -> Iterator[object]:
    """The report, opened, and what went wrong and over the network while it was."""
    with opened(browser, report) as page:
        yield page


def test_learning_curves_are_of_every_share_of_the_data(report: Path) -> None:
    """With less data a model may get worse again, which only its curve shows."""
    numbers = json.loads((report.parent / "report.json").read_text())
    by_share = numbers["curves_by_train_fraction"]
    assert list(by_share) == ["1", "0.25"] and by_share["1"] == numbers["curves"]
    points = by_share["0.25"]["heldout_loss"]["sra"]
    assert [point["step"] for point in points] == [100, 200, 300, 400]
    best = numbers["sample_efficiency"]["heldout_best"]["sra"]
    assert best["0.25"]["mean"] == pytest.approx(points[-1]["mean"])
    page = report.read_text()
    assert ", 25 % of the images" in page and ", 100 % of the images" in page


def test_a_share_of_which_nothing_is_done_is_not_told(tmp_path: Path) -> None:
    write_synthetic_study(tmp_path / "s", fractions=(0.25, 1.0))
    for run in (tmp_path / "s" / "runs").glob("*_data0.25"):
        shutil.rmtree(run)
    page = write_report(tmp_path / "s").read_text()
    assert "25 % of the training images, exploratory" not in page
    assert "25 % of the images</" not in page.partition('id="curves"')[2].partition("</section>")[0]


def assert_texts_apart(page, chosen: str, charts: int) -> None:
    """No text of a chart lies over another, or outside."""
    boxes = page.evaluate(
        "chosen => [...document.querySelectorAll(chosen)].map(s => [s.getBoundingClientRect(),"
        " ...[...s.querySelectorAll('text')].map(t => t.getBoundingClientRect())]"
        ".map(r => [r.left, r.top, r.right, r.bottom]))",
        chosen,
    )
    assert len(boxes) == charts
    for (left, top, right, bottom), *texts in boxes:
        for a, b in itertools.combinations(texts, 2):
            apart = a[2] <= b[0] + 1 or b[2] <= a[0] + 1 or a[3] <= b[1] + 2 or b[3] <= a[1] + 2
            assert apart, f"two texts overlap: {a}, {b}"
        assert all(t[0] >= left - 2 and t[2] <= right + 2 for t in texts)
        assert all(t[1] >= top - 2 and t[3] <= bottom + 2 for t in texts)


@pytest.mark.parametrize("name", GRIDS)
def test_effects_keep_their_whole_names_in_charts(name: str, browser, report: Path) -> None:
    """Beside the longest note: of names that are cut off, two may be one."""
    titles = [effect.title for effect in GRIDS[name][0].effects]
    found = Estimate({0: -0.00013, 1: 0.0011})
    bars = [Bar(title, found, "unsure", "−0.00013, cannot be told") for title in titles]
    with opened(browser, report) as page:
        page.set_viewport_size({"width": 1280, "height": 900})
        texts = page.evaluate(
            "svg => { const chart = document.querySelector('.front svg.chart');"
            " const place = chart.parentElement; place.id = 'chart'; chart.outerHTML = svg;"
            " return [...place.querySelectorAll('svg text')].map(t => t.textContent); }",
            forest_plot(bars, "lower", "a"),
        )
        whole = "".join("".join(texts).split())
        assert all("".join(title.split()) in whole for title in titles)
        assert_texts_apart(page, "#chart svg", charts=1)


class TestInABrowser:
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("width", WIDTHS)
    def test_nothing_overflows(self, page, width, scheme):
        assert_fits(page, width, scheme)

    def test_text_is_large_enough_on_a_phone(self, page):
        assert smallest_text(page) >= 9.5

    def test_text_in_charts_keeps_apart(self, page):
        """Labels in a forest plot lie beside each other, and within their chart."""
        page.set_viewport_size({"width": 1280, "height": 900})
        assert_texts_apart(page, ".front svg.chart", charts=2)

    def test_every_image_is_there_and_described(self, page):
        assert_pictures(page, images=6, within_charts=8)

    def test_sorting_sorts(self, page):
        table = page.locator("table.sortable", has=page.get_by_text("Methods")).first
        heading = table.locator("th", has_text="held-out denoising loss")

        def shown() -> list[float]:
            cells = table.locator(f"tbody tr td:nth-child({column})").all_inner_texts()
            return [float(cell.split()[0]) for cell in cells]

        column = 1 + heading.evaluate("cell => cell.cellIndex")
        before = shown()
        heading.get_by_role("button").click()
        assert heading.get_attribute("aria-sort") == "ascending"
        assert shown() == sorted(before) != before
        heading.get_by_role("button").press("Enter")
        assert heading.get_attribute("aria-sort") == "descending"
        assert shown() == sorted(before, reverse=True)
        figures = table.locator("th", has_text="paper: FID")
        figures.get_by_role("button").click()
        index = 1 + figures.evaluate("cell => cell.cellIndex")
        texts = table.locator(f"tbody tr td:nth-child({index})").all_inner_texts()
        assert texts == ["1.440", "1.580", "2.060", "–"], "what is missing stays last"

    def test_tabs_by_click_and_keyboard(self, page):
        tabs = page.locator("[role=tablist]").first.locator("[role=tab]")
        assert tabs.all_inner_texts() == [effect.title for effect in GRID.effects]

        def open_panels() -> list[str]:
            panels = page.locator(".tabs").first.locator("[role=tabpanel]:visible")
            return [
                page.locator(f"#{p.get_attribute('aria-labelledby')}").inner_text()
                for p in panels.all()
            ]

        tabs.nth(1).click()
        assert open_panels() == ["Both"]
        for key, expected in (
            ("ArrowRight", "Unclaimed"),
            ("ArrowRight", "Separation"),
            ("ArrowLeft", "Unclaimed"),
            ("Home", "Separation"),
            ("End", "Unclaimed"),
        ):
            page.keyboard.press(key)
            assert open_panels() == [expected]
            assert page.evaluate("document.activeElement.textContent") == expected
            assert page.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"
        assert tabs.nth(0).get_attribute("tabindex") == "-1"

    def test_headings_are_in_order(self, page):
        assert_outline(page)

    def test_answers_and_failures_are_told(self, page):
        text = " ".join(page.inner_text("main").split())
        assert "Of 4 tests of the paper’s claims, " in text
        assert "supported there is a gain: held-out denoising loss 0.0" in text
        assert "smallest detectable effect 0.0" in text and "margin 0.0" in text
        assert "What sets the variants of small apart?" in text
        assert (
            "This study is not complete. 20 of 24 runs are done, 2 failed, 2 are not there yet"
            in text
        )
        assert "ValueError: <b>no</b> & nothing" in text
        assert "whether it is worth more with 25 % of the training images" in text, "of the trends"
        told = text.count("with 25 % of the training images, exploratory: held-out denoising")
        assert told == len(GRID.effects)
        assert "2 effects on 2 metrics, p-values adjusted by Holm" in text
        assert "All else on this page is exploratory" in text
        assert "another model, other data and another metric" in text
        assert "Nothing was registered beforehand" not in text

    def test_real_held_out_images_stay_below_every_table(self, page):
        rows = page.locator("table.sortable tfoot tr").all_inner_texts()
        assert len(rows) == len(GRID.tables)
        assert all(row.startswith("real held-out images") and "1.10" in row for row in rows)

    def test_paper_shows_what_a_screen_folds_away(self, page):
        page.emulate_media(media="print")
        try:
            curves = 2 * len(GRID.tables)  # at two shares of the data
            panels = page.locator("[role=tabpanel]:visible").count()
            assert panels == len(GRID.effects) + curves
            assert not page.locator("[role=tablist]:visible").count()
        finally:
            page.emulate_media(media="screen")

    def test_no_errors_and_no_network(self, page, report):
        assert page.errors == []
        assert [url for url in page.requests if not url.startswith("data:")] == [report.as_uri()]


class TestFiles:
    def test_the_page_is_whole_and_small(self, report):
        text = report.read_text()
        assert len(text) < 4_000_000
        assert 'src="http' not in text and "@import" not in text and str(report.parent) not in text

    def test_the_numbers(self, report):
        numbers = json.loads((report.parent / "report.json").read_text())
        assert len(numbers["runs"]["done"]) == 20 and len(numbers["runs"]["failed"]) == 2
        assert numbers["headline_metrics"] == ["heldout_loss", "fd_classifier"]
        effect = numbers["effects"][0]
        assert effect["outcome"] == "helps" and effect["paper"] == "supported"
        low, high = effect["difference"]["interval"]
        assert low < effect["difference"]["mean"] < high < 0
        assert set(effect["difference"]["by_seed"]) == {"0", "1", "2"}
        assert effect["headline"] and effect["margin"] > 0 and effect["smallest_detectable"] > 0
        assert set(effect["p_values_holm"]) == {"gain", "small", "equal", "differs"}
        assert numbers["registered_beforehand"] and numbers["study"]["registration"]["seeds"] == 3
        assert set(numbers["sample_efficiency"]["heldout_loss"]["sra"]) == {"0.25", "1"}
        assert numbers["answers"].keys() == {effect.title for effect in GRID.effects}


@pytest.mark.parametrize(("margin", "shaded"), [(0.01, True), (-0.01, False), (None, False)])
def test_only_a_margin_is_shaded(margin, shaded):
    """Half of a gain that is none is no margin."""
    estimate = EffectEstimate(EFFECT, "heldout_loss", Estimate({0: 0.1}), margin=margin)
    assert ("var(--band" in forest_plot([_bar(estimate, "a")], "lower", "a")) == shaded


class TestOtherStudies:
    def test_of_one_seed_nothing_done(self, tmp_path):
        write_synthetic_study(tmp_path / "s", seeds=(0,), keep=lambda variant, seed: False)
        assert "0 of 4 runs are done" in " ".join(write_report(tmp_path / "s").read_text().split())

    def test_of_a_grid_without_effects_and_tables(self, tmp_path):
        grid = Grid("bare", {"a": Variant("sit"), "b": Variant("sra")})
        write_synthetic_study(tmp_path / "s", grid=grid, seeds=(0,), metrics=("fid", "recall"))
        text = write_report(tmp_path / "s").read_text()
        assert "This grid asks for no effect" in text and "All variants of bare" in text

    def test_of_the_paper(self, tmp_path):
        write_synthetic_study(tmp_path / "s", grid=PAPER, seeds=(0, 1))
        text = write_report(tmp_path / "s").read_text()
        assert f"<h1>{QUESTION}</h1>" in text and "paper: FID 800K" in text

    @pytest.mark.parametrize(
        "name", [n if n == "partitions" else pytest.param(n, marks=pytest.mark.slow) for n in GRIDS]
    )
    def test_of_every_grid(self, tmp_path, name):
        write_synthetic_study(tmp_path / "s", grid=GRIDS[name][0], seeds=(0,))
        text = write_report(tmp_path / "s").read_text()
        assert text.count("<svg") > len(GRIDS[name][0].variants)

    @pytest.mark.parametrize("sides", [(8,), (4, 8, 8)], ids=["signals", "videos"])
    def test_of_other_data_than_images(self, tmp_path, sides):
        samples = np.random.default_rng(0).normal(size=(20, 1, *sides)).astype(np.float32)
        np.savez(tmp_path / "a.npz", samples=samples, labels=np.arange(20) % 2)
        data = {"data.name": "arrays", "data.root": str(tmp_path / "a.npz")}
        write_synthetic_study(tmp_path / "s", settings={**SETTINGS, **data}, seeds=(0, 1))
        assert "views are drawn of data with two axes" in write_report(tmp_path / "s").read_text()

    @pytest.mark.parametrize("readable", [True, False])
    def test_shows_samples_of_videos_in_frames(self, tmp_path, readable):
        """A few frames beside each other, in fewer columns; where the data is gone nobody knows of them."""
        sides = (16, 8, 8)
        samples = np.zeros((20, 1, *sides), np.float32)
        np.savez(tmp_path / "a.npz", samples=samples, labels=np.arange(20) % 10)
        data = {"data.name": "arrays", "data.root": str(tmp_path / "a.npz")}
        study = write_synthetic_study(tmp_path / "s", settings={**SETTINGS, **data}, seeds=(0,))
        for made in (tmp_path / "s").rglob("samples.npz"):
            np.savez(made, arr_0=np.zeros((40, 16 * 8, 8, 1), np.uint8), arr_1=np.arange(40) % 10)
        if not readable:
            (tmp_path / "a.npz").unlink()
        runs = read_results(tmp_path / "s").done
        strips = sample_strips(tmp_path / "s", runs, 0, find_data(study.jobs()))
        frames, columns = (5 * (4 * 8 + 1) + 1, 2 * 9 + 1), (10 * 3 + 1, 2 * 43 + 1)
        sizes = {(strip.width, strip.height) for strip in strips}
        assert sizes == {frames if readable else columns}

    def test_that_registered_nothing(self, tmp_path):
        """As those of version 0.1.0."""
        write_synthetic_study(tmp_path / "s", registered=False)
        text = write_report(tmp_path / "s").read_text()
        assert "Nothing was registered beforehand" in text and "Applied afterwards" in text

    def test_with_more_seeds_than_were_planned(self, tmp_path):
        study = write_synthetic_study(tmp_path / "s", seeds=(0, 1))
        write_study(tmp_path / "s", dataclasses.replace(study, seeds=(0, 1, 2)))
        assert (
            "2 seeds were planned, and 3 were asked for" in write_report(tmp_path / "s").read_text()
        )

    def test_whose_runs_are_elsewhere_keeps_its_numbers(self, tmp_path):
        write_synthetic_study(tmp_path / "s")
        write_report(tmp_path / "s")
        shutil.rmtree(tmp_path / "s" / "runs")
        numbers = (tmp_path / "s" / "report.json").read_text()
        with pytest.raises(UserError, match="the numbers of 12 runs and none of the runs"):
            write_report(tmp_path / "s")
        assert (tmp_path / "s" / "report.json").read_text() == numbers

    def test_with_names_from_outside(self, tmp_path):
        """Names are text: no mathtext, no markup, no HTML, no path, whatever they hold."""
        names = [
            "$x$",
            "<b>a</b>",
            "$\\frac$",
            "[red]a[/red]",
            "[/x]",
            "שלום",
            "a {{ b }}",
            "x" * 300,
            "🙂",
        ]
        pairs = tuple(itertools.pairwise(names))
        grid = Grid(
            "<i>$g$[/]",
            {name: Variant("sit") for name in names},
            (
                Table(
                    "<t>$", tuple(Row(n, {"$f": "<f>"}, {"[p]": 1.0}) for n in names), "line\nline"
                ),
            ),
            tuple(Effect(f"{a} & {b}"[:300], "<q>", ((a, b),), "Yes <c>") for a, b in pairs[:4]),
        )
        write_synthetic_study(tmp_path / "s", grid=grid)
        report = write_report(tmp_path / "s")
        text = report.read_text()
        assert "&lt;b&gt;a&lt;/b&gt;" in text and "<b>a</b>" not in text and "<c>" not in text
        assert all(html.escape(name) in text for name in names)
        assert {path.name for path in (tmp_path / "s").iterdir()} == {
            "study.json",
            "runs",
            "report.html",
            "report.json",
        }

    def test_with_settings_that_are_no_unicode(self, tmp_path):
        settings = {**SETTINGS, "data.name": "folder", "data.root": "gone\udcff"}
        write_synthetic_study(tmp_path / "s", settings=settings)
        assert "gone\\udcff" in write_report(tmp_path / "s").read_text()

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("{", "cannot be read"),
            ("[]", "Expected `object`"),
            ('{"variant": 3}', "variant|missing"),
            ("\udcff", "cannot be read"),
        ],
    )
    def test_with_a_damaged_result(self, tmp_path, text, said):
        write_synthetic_study(tmp_path / "s")
        file = tmp_path / "s" / "runs" / "sra" / "seed_1" / "result.json"
        file.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(UserError, match=said) as caught:
            write_report(tmp_path / "s")
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "changes",
        [
            {"metrics": {"heldout_loss": 1e308}},
            {"heldout_by_timestep": [1e308]},
            {"curves": {"heldout_loss": [[1, -1e308]]}},
        ],
    )
    def test_with_numbers_that_nothing_can_have_measured(self, tmp_path, changes):
        write_synthetic_study(tmp_path / "s")
        file = tmp_path / "s" / "runs" / "sra" / "seed_1" / "result.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        with pytest.raises(UserError, match=r"allowed are numbers up to 1e.100"):
            write_report(tmp_path / "s")

    def test_of_runs_that_took_no_time(self, tmp_path):
        write_synthetic_study(tmp_path / "s")
        for file in tmp_path.rglob("result.json"):
            nothing = {"seconds": 0, "seconds_per_step": 0, "flops_per_step": 0}
            file.write_text(json.dumps(json.loads(file.read_text()) | nothing))
        assert write_report(tmp_path / "s").is_file()

    def test_with_a_registered_metric_that_is_not_known(self, tmp_path):
        write_synthetic_study(tmp_path / "s")
        file = tmp_path / "s" / "study.json"
        record = json.loads(file.read_text())
        record["registration"]["metrics"] = ["nosuch"]
        file.write_text(json.dumps(record))
        with pytest.raises(UserError, match="registration.metrics has the unknown 'nosuch'"):
            write_report(tmp_path / "s")

    def test_of_data_that_is_not_here(self, tmp_path):
        settings = {**SETTINGS, "data.name": "folder", "data.root": "gone"}
        write_synthetic_study(tmp_path / "s", settings=settings)
        text = write_report(tmp_path / "s").read_text()
        assert "There are no diagrams, as the data set could not be opened here" in text


class TestCommands:
    def test_a_runs_command_makes_its_config(self):
        settings = {**SETTINGS, "training.trackers": (), "model.qk_norm": True}
        grids = (PAPER, GRIDS["partitions"][0])
        both = [Study(grid, settings, (3,), (0.5,)) for grid in grids]
        for study, job in ((one, job) for one in both for job in one.jobs()):
            program, command, name, *options = shlex.split(train_command(study, job))
            assert (program, command) == ("selfalign", "train")
            start = recipe(name)
            parsed = parse(TrainArguments, options, "train", "", config=options_of(start))
            assert build_tree(parsed.config, start) == job.config

    def test_every_grids_runs_have_a_command(self):
        for grid, _ in GRIDS.values():
            study = Study(grid, SETTINGS, (3,), (1.0,))
            for job in study.jobs():
                assert train_command(study, job).startswith("selfalign train "), job.name

    def test_a_studys_command_names_what_differs_from_its_profile(self):
        study = Study(
            PAPER, {**SETTINGS, "data.name": "digits"}, (0, 1), (0.5, 1.0), profile="laptop"
        )
        words = study_command(study)
        assert words.startswith("selfalign study paper --out OUT --profile laptop --seeds 2 ")
        assert "--data.train-fraction 0.5 1.0" in words and "--training.steps 400" in words
        assert study_command(Study(PAPER, {}, (7,), profile="laptop")) == ""
