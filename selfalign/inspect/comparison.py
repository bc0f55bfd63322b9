"""Runs side by side on one page: curves by term, samples, throughput, settings."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import selfalign
from selfalign.config import config_to_dict
from selfalign.data.shapes import to_uint8
from selfalign.disk import require_no_folder, require_writable, write_whole
from selfalign.errors import UserError
from selfalign.evaluation.config import Progress
from selfalign.evaluation.estimate import Estimate
from selfalign.inspect.alignment import logged
from selfalign.inspect.page import plain
from selfalign.inspect.section import Table
from selfalign.inspect.views import first_channels
from selfalign.names import printable
from selfalign.pages.figures import Chart, Series, line_chart
from selfalign.pages.render import render
from selfalign.pages.settings import Settings, compare, flatten
from selfalign.records import read_plain, write_json
from selfalign.runs.load import LoadedRun, load_run
from selfalign.runs.monitors import GRID_STEPS
from selfalign.sampling.generate import generate
from selfalign.sampling.pictures import column_labels, column_names, data_uri, tile
from selfalign.sampling.settings import SamplingConfig
from selfalign.training.tracking import FOR_CURVES, read_metrics

REPORT_FILE = "report.html"
ROWS, COLUMNS = 2, 10
HELDOUT = {
    "heldout_ema": "held-out denoising loss, EMA",
    "heldout_raw": "held-out loss, raw weights",
}


_FIELDS = {"selfalign_version", "runs", "settings"}
"""Of the file of numbers."""


@dataclass(frozen=True)
class Strip:
    """A run's samples in one picture."""

    address: str
    width: int
    height: int
    undecoded: str = ""
    """Why the picture is of the latents' first channels and not of images; empty where it is of images."""


@dataclass(frozen=True)
class Compared:
    """A run as the page shows it."""

    name: str
    run: LoadedRun
    metrics: Sequence[Mapping[str, Any]]
    """The lines of its metrics.jsonl."""

    @property
    def parameters(self) -> int:
        """Of the backbone and its heads."""
        return sum(parameter.numel() for parameter in self.run.model.parameters())

    @property
    def throughput(self) -> float | None:
        """Median images per second over the logged steps."""
        rates = [
            line["samples_per_second"] for line in self.metrics if "samples_per_second" in line
        ]
        return statistics.median(rates) if rates else None

    @property
    def terms(self) -> list[str]:
        """Names of what was logged of the loss."""
        names = [name for line in self.metrics for name in line if name.endswith("_loss")]
        return [name.removesuffix("_loss") for name in dict.fromkeys(names)]

    def heldout(self, name: str) -> list[tuple[float, Estimate]]:
        """A held-out loss over steps."""
        points = [(line["step"], line[name]) for line in self.metrics if name in line]
        return [(step, Estimate(v, 0.0)) for step, v in points if math.isfinite(v)]


def compare_runs(
    folders: Sequence[Path],
    out: Path | None = None,
    weights: Literal["ema", "raw"] = "ema",
    device: torch.device | str = "cpu",
    progress: Progress = lambda what, done, total: None,
    data_root: str | None = None,
) -> Path:
    """Write one page, and its numbers beside it.

    Args:
        folders: of the runs, each with a whole checkpoint.
        out: the page's file, which ends in .html; left out: report.html in the first run's folder.
        weights: which are sampled.
        device: where to.
        progress: told of long work.
        data_root: where the data of all the runs is now, by which latents are decoded; None: where it was.

    Raises:
        UserError: a run cannot be loaded, or the page cannot be written.
    """
    file = out or folders[0] / REPORT_FILE
    if file.suffix != ".html":
        raise UserError(f"--out is {str(file)!r}: allowed is a name that ends in .html")
    require_writable(file.parent)
    numbers = file.with_suffix(".json")
    _require_ours(file, numbers)
    runs = []
    for folder, name in zip(folders, _names(folders), strict=True):
        run = load_run(folder, weights, device, data_root=data_root)
        runs.append(Compared(name, run, read_metrics(folder, FOR_CURVES)))
    strips = {}
    for done, compared in enumerate(runs, 1):
        strips[compared.name] = _strip(compared.run)
        progress("samples", done, len(runs))
    settings = compare({c.name: flatten(config_to_dict(c.run.config)) for c in runs})
    labels = column_labels(runs[0].run.model.num_classes, COLUMNS)
    page = render(
        "selfalign.inspect",
        "runs.html.j2",
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs side by side",
        names=[compared.name for compared in runs],
        overview=_overview(runs),
        lines=[Series(compared.name, style) for style, compared in enumerate(runs)],
        curves=_curves(runs),
        strips=strips,
        columns=column_names(labels, runs[0].run.class_names) if labels else [],
        steps=GRID_STEPS,
        weights=weights,
        settings=settings,
        different=_different(settings),
        selfalign_version=selfalign.__version__,
    )
    write_json(numbers, plain(_numbers(runs, settings)))
    write_whole(file, lambda path: path.write_bytes(page))
    return file


def _require_ours(page: Path, numbers: Path) -> None:
    """Refuse a page whose numbers would go over another file, such as a run's config.json."""
    require_no_folder(page, numbers)
    if numbers.exists():
        held = read_plain(numbers) if numbers.stat().st_size else None
        if not isinstance(held, dict) or not held.keys() >= _FIELDS:
            raise UserError(
                f"--out is {str(page)!r}, whose numbers go to {numbers}: that is another file; allowed is "
                "another name"
            )


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = [printable("/".join(part[-length:])) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{folders[0]} is named twice: a run is compared with others")


def _strip(run: LoadedRun) -> Strip:
    """Samples of a run: a class per column, always from the same noise."""
    labels = column_labels(run.model.num_classes, COLUMNS)
    columns = len(labels) if labels else COLUMNS
    sampling = SamplingConfig(solver="heun", steps=GRID_STEPS)
    count = ROWS * columns
    batches = generate(
        run.model, run.config.flow.path, sampling, count, batch_size=count, labels=labels
    )
    samples = torch.cat([batch.images for batch in batches])
    undecoded = ""
    try:
        images = to_uint8(run.decode(samples)).cpu()
    except UserError as error:
        undecoded = printable(str(error))
        images = torch.stack([first_channels(sample) for sample in samples])
    picture = tile(images, columns)
    return Strip(data_uri(picture), picture.shape[1], picture.shape[0], undecoded)


def _overview(runs: Sequence[Compared]) -> Table:
    rows = []
    for compared in runs:
        heldout = compared.heldout("heldout_ema")
        rows.append(
            (
                compared.name,
                (
                    compared.run.step,
                    heldout[-1][1].value if heldout else None,
                    compared.throughput,
                    compared.parameters,
                ),
            )
        )
    columns = ("run", "step", "held-out loss, EMA", "images per second", "parameters")
    return Table("The runs", columns, rows)


def _curves(runs: Sequence[Compared]) -> list[Chart]:
    """A chart of each held-out loss and of each term, a line per run that has it."""
    charts = []
    for name, title in HELDOUT.items():
        charts += _chart(title, [compared.heldout(name) for compared in runs], runs)
    for term in dict.fromkeys(term for compared in runs for term in compared.terms):
        title = f"training loss, {term}"
        charts += _chart(title, [logged(compared.metrics, term) for compared in runs], runs)
    return charts


def _chart(
    title: str, points: Sequence[Sequence[tuple[float, Estimate]]], runs: Sequence[Compared]
) -> list[Chart]:
    lines = [
        Series(compared.name, style, of_run)
        for style, (compared, of_run) in enumerate(zip(runs, points, strict=True))
        if of_run
    ]
    return [Chart(title, line_chart(lines, "step", title))] if lines else []


def _different(settings: Settings) -> Table:
    """A row per setting that is not the same in all runs."""
    runs = list(settings.different)
    names = list(next(iter(settings.different.values())))
    rows = [(name, [settings.different[run][name] for run in runs]) for name in names]
    return Table("Settings that differ", ("setting", *runs), rows)


def _numbers(runs: Sequence[Compared], settings: Settings) -> dict[str, Any]:
    return {
        "selfalign_version": selfalign.__version__,
        "runs": {
            compared.name: {
                "step": compared.run.step,
                "data_fingerprint": compared.run.fingerprint,
                "parameters": compared.parameters,
                "images_per_second": compared.throughput,
                "heldout_ema": [(step, e.value) for step, e in compared.heldout("heldout_ema")],
                "terms": {term: logged(compared.metrics, term) for term in compared.terms},
            }
            for compared in runs
        },
        "settings": dataclasses.asdict(settings),
    }
