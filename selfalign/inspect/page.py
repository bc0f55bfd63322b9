"""From a run or a released checkpoint to inspect/report.html and a file of numbers per analysis."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import selfalign
from selfalign.disk import require_writable, write_whole
from selfalign.evaluation.config import Progress
from selfalign.inspect.analyses import ANALYSES, look
from selfalign.inspect.section import Section
from selfalign.inspect.subject import Subject
from selfalign.names import printable
from selfalign.pages.render import render
from selfalign.records import write_json

FOLDER = "inspect"
REPORT_FILE = "report.html"


def inspect(
    subject: Subject,
    only: Sequence[str] = (),
    out: Path | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Path:
    """Run the analyses, and write their numbers and one page.

    Args:
        subject: from `open_subject`.
        only: names of ANALYSES; left out: all of them.
        out: folder for the files; left out: `inspect` in the subject's.
        progress: told of long work.

    Returns:
        The page. Each analysis has a file NAME.json beside it, which is there as soon as it is done.

    Raises:
        UserError: a file cannot be written.
    """
    folder = out or subject.folder / FOLDER
    require_writable(folder)
    sections: dict[str, Section] = {}
    for name in (name for name in ANALYSES if not only or name in only):
        sections[name] = look(name, subject, progress)
        content = {**_of(subject), "analysis": name, **sections[name].numbers}
        write_json(folder / f"{name}.json", plain(content))
    page = render(
        "selfalign.inspect",
        "inspect.html.j2",
        title=f"What {printable(subject.name)} learnt and saw",
        subject=subject,
        facts=_facts(subject),
        sections=sections,
        selfalign_version=selfalign.__version__,
    )
    write_whole(folder / REPORT_FILE, lambda path: path.write_bytes(page))
    return folder / REPORT_FILE


def _of(subject: Subject) -> dict[str, Any]:
    """What numbers are of."""
    return {
        "selfalign_version": selfalign.__version__,
        "torch": str(torch.__version__),
        "subject": printable(subject.name),
        "step": subject.step,
        "data_fingerprint": subject.source.fingerprint,
    }


def _facts(subject: Subject) -> list[tuple[str, str]]:
    """The status line, fact by fact."""
    config = subject.config
    sizes = "+".join(map(str, config.group_sizes))
    terms = ", ".join(config.used_terms())
    return [
        ("data set", config.data.name),
        (
            "model",
            f"{config.model.backbone} {config.model.size}, {len(subject.model.blocks)} blocks",
        ),
        ("step", "not known" if subject.step is None else f"{subject.step:,}"),
        ("timesteps", config.views.timesteps),
        ("attention", config.views.attention),
        ("tokens per group", sizes),
        ("terms", terms),
        ("held-out images", f"{len(subject.source.heldout):,}"),
    ]


def plain(value: Any) -> Any:
    """As JSON can hold it: dataclasses as objects, what is not finite as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
