"""`selfalign inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from selfalign.cli.console import console, make_bar, parse
from selfalign.errors import UserError
from selfalign.inspect.analyses import ANALYSES
from selfalign.recipes import RECIPES

if TYPE_CHECKING:
    AnalysisName = str
    RecipeName = str
else:
    AnalysisName = Literal[tuple(ANALYSES)]
    RecipeName = Literal[tuple(RECIPES)]


@dataclass(frozen=True)
class InspectData:
    """The data set: of a run it is known, and its root is given where it has moved."""

    name: str | None = None
    """Data set of a released checkpoint: what it is shown."""
    root: str | None = None
    """Folder that holds the files."""
    image_size: int | None = None
    """Side of the square that a folder's images are cropped and resized to."""


@dataclass(frozen=True)
class InspectArguments:
    """Look into a run or a released checkpoint."""

    subject: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, or a released .safetensors or .pt file."""
    only: tuple[AnalysisName, ...] = ()
    """Which analyses; left out: all. The page then holds these."""
    out: Path | None = None
    """Folder for report.html and the numbers; left out: inspect in the run's, or in one beside the file."""
    weights: Literal["ema", "raw"] = "ema"
    """Which weights of a run."""
    step: int | None = None
    """Step of the checkpoint of a run; left out: the last one."""
    beside: Path | None = None
    """Another seed of the same training, which controls are measured with: a run, or a file."""
    features: str | None = None
    """Network for Fréchet distances and to compare features with: classifier, inception, dinov2 or timm:NAME;
    left out: classifier for small images, else none."""
    data: InspectData = field(default_factory=InspectData)
    source: Literal["sit", "repa", "self-flow", "sra"] | None = None
    """Project of a released checkpoint, where its layout fits several."""
    recipe: RecipeName | None = None
    """Recipe whose views a released checkpoint is looked at with; left out: its project's."""
    heads: int | None = None
    """Attention heads of a released checkpoint, where its width is of no named size."""
    channels: int = 4
    """Channels of a released Self-Flow checkpoint."""
    null_row: bool = True
    """Whether the last label of a released checkpoint is the null class."""


def inspect_command(arguments: Sequence[str]) -> int:
    """`selfalign inspect`."""
    listed = "; ".join(f"{name}: {summary}" for name, summary in ANALYSES.items())
    parsed = parse(
        InspectArguments,
        arguments,
        "selfalign inspect",
        "Look into a run or a released checkpoint: writes inspect/report.html and a file of numbers per "
        "analysis. Examples: selfalign inspect runs/digits; selfalign inspect runs/digits --only probes pca; "
        "selfalign inspect SiT-XL-2-256x256.pt --source sit --data.name latents --data.root imagenet256. "
        f"Analyses: {listed}",
    )
    if not parsed.subject.exists():
        raise UserError(
            f"{parsed.subject} does not exist: allowed are a run, a .safetensors or a .pt file"
        )
    return _inspect(parsed)


def _inspect(parsed: InspectArguments) -> int:
    """Imports what takes time once the options have been read."""
    from selfalign.disk import require_writable
    from selfalign.inspect.page import FOLDER, inspect
    from selfalign.inspect.subject import Release, open_subject
    from selfalign.processes import open_accelerator

    if parsed.out is not None:
        require_writable(parsed.out)
    subject = open_subject(
        parsed.subject,
        weights=parsed.weights,
        step=parsed.step,
        data={name: value for name, value in asdict(parsed.data).items() if value is not None},
        beside=parsed.beside,
        features=parsed.features,
        release=Release(
            parsed.source, parsed.recipe, parsed.heads, parsed.channels, parsed.null_row
        ),
        device=open_accelerator().device,
    )
    bar = make_bar("{task.description}")
    tasks: dict[str, Any] = {}

    def show(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total)
        bar.update(tasks[what], completed=done, total=total)

    with bar:
        page = inspect(subject, parsed.only, parsed.out or subject.folder / FOLDER, show)
    console.print(f"{page}, and the numbers of each analysis beside it")
    return 0
