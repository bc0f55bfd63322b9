"""Gather what the site is made of in build/docs, as it lies in the repository, so that links stay right.

    python docs/stage_site.py && mkdocs build --strict

Code is there too, since pages link to it; `reference/` is written here for mkdocstrings.
"""

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
STAGED = ROOT / "build" / "docs"
PARTS = (
    "*.md",
    "LICENSE",
    "CITATION.cff",
    "Makefile",
    "docs/**/*",
    "benchmarks/*",
    "examples/*.py",
    "tests/golden/README.md",
    "tests/golden/check.py",
    "selfalign/**/*.py",
)
REFERENCE = {
    "selfalign": (
        "What `import selfalign` offers",
        "selfalign.config.RunConfig",
        "selfalign.config.resolve",
        "selfalign.config.override",
        "selfalign.recipes.recipe",
        "selfalign.student.build_student",
        "selfalign.backbones.sit.model.SiT",
        "selfalign.objective.Objective",
        "selfalign.objective.Losses",
        "selfalign.views.draw_views",
        "selfalign.training.ema.EMA",
        "selfalign.runs.load.load_run",
        "selfalign.easy",
        "selfalign.parts.register",
        "selfalign.errors.UserError",
    ),
    "data": ("Data sets", "selfalign.data.datasets", "selfalign.data.source"),
    "sampling": (
        "Sampling",
        "selfalign.sampling.settings",
        "selfalign.sampling.generate",
        "selfalign.sampling.solvers",
    ),
    "interop": (
        "Released weights and export",
        "selfalign.interop.released",
        "selfalign.interop.imported",
        "selfalign.interop.export",
        "selfalign.card",
        "selfalign.interop.card",
        "selfalign.training.starting",
    ),
}
"""Pages of the reference: a title, and what mkdocstrings shows."""


def stage() -> None:
    """Copy all parts, and write the pages of the reference."""
    shutil.rmtree(STAGED, ignore_errors=True)
    for pattern in PARTS:
        for path in ROOT.glob(pattern):
            if path.is_file() and "__pycache__" not in path.parts:
                target = STAGED / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    for name, (title, *members) in REFERENCE.items():
        blocks = "\n\n".join(f"::: {member}" for member in members)
        page = STAGED / "reference" / f"{name}.md"
        page.parent.mkdir(exist_ok=True)
        page.write_text(f"# {title}\n\n{blocks}\n")


if __name__ == "__main__":
    stage()
