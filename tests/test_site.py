"""The site builds, and a broken link would fail it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def pages(nav: object) -> list[str]:
    """Files that a navigation names."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in pages(part)]  # type: ignore[attr-defined]


def test_every_guide_is_in_the_navigation() -> None:
    class Loader(yaml.SafeLoader):
        """Leaves tags of mkdocs alone."""

    named = set(pages(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]))
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")}
    assert there <= named
    assert all((ROOT / page).is_file() for page in named if not page.startswith("reference/"))


@pytest.mark.slow
def test_the_site_builds_strictly() -> None:
    pytest.importorskip("mkdocs")
    subprocess.run([sys.executable, "docs/stage_site.py"], cwd=ROOT, check=True)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert (ROOT / "build" / "site" / "README.html").exists() or (
        ROOT / "build" / "site" / "index.html"
    ).exists()
