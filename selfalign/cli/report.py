"""`selfalign report`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from selfalign.cli.console import MovedData, console, make_bar, parse
from selfalign.errors import UserError


@dataclass(frozen=True)
class ReportArguments:
    """Compare runs on one page."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of one or more runs."""
    out: Path | None = None
    """File of the page, which ends in .html; left out: report.html in the first run's folder."""
    weights: Literal["ema", "raw"] = "ema"
    """Which weights are sampled."""
    data: MovedData = field(default_factory=MovedData)


def report_command(arguments: Sequence[str]) -> int:
    """`selfalign report`."""
    parsed = parse(
        ReportArguments,
        arguments,
        "selfalign report",
        "Compare runs on one page: curves by term, samples from the same noise and labels, throughput, and "
        "the settings that differ. Example: selfalign report runs/sra runs/sra-dts --out compared.html",
    )
    if not parsed.runs:
        raise UserError("selfalign report takes the folders of one or more runs")
    from selfalign.inspect.comparison import compare_runs
    from selfalign.processes import open_accelerator

    bar = make_bar("samples")
    with bar:
        task = bar.add_task("", total=len(parsed.runs))
        page = compare_runs(
            parsed.runs,
            parsed.out,
            parsed.weights,
            open_accelerator().device,
            lambda what, done, total: bar.update(task, completed=done),
            parsed.data.root,
        )
    console.print(f"{page}, and its numbers in {page.with_suffix('.json')}")
    return 0
