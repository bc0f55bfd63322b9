"""Pages read in headless Chromium, as a person would read them."""

import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

WIDTHS = (390, 1280)
"""Of a phone and of a screen."""


def chromium(playwright: Any) -> str:
    """Playwright's own browser, or the system's."""
    own = Path(playwright.chromium.executable_path)
    found = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if not own.is_file() and found is None:
        pytest.skip("no chromium: neither playwright's own, nor chromium or google-chrome on PATH")
    return str(own) if own.is_file() else str(found)


@contextmanager
def opened(browser: Any, file: Path) -> Iterator[Any]:
    """A page, and as its `errors` and `requests` what went wrong and over the network while it was open."""
    page = browser.new_page(viewport={"width": WIDTHS[-1], "height": 900})
    page.errors, page.requests = [], []
    page.on("console", lambda message: page.errors.append(message.text))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(file.as_uri())
    yield page
    page.close()


def assert_fits(page: Any, width: int, scheme: str) -> None:
    """Nothing is wider than a window, whichever tab is open, and the colours are those of the scheme."""
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    for tab in page.locator("[role=tab]").all() or [None]:
        if tab is not None:
            tab.click()
        widest = page.evaluate("document.documentElement.scrollWidth")
        assert widest <= width, f"wider than the window with {tab and tab.inner_text()} open"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(253, 253, 251)") == (scheme == "light")


def smallest_text(page: Any) -> float:
    """Size in pixels of the smallest visible text on a phone, that of charts as they are scaled."""
    page.set_viewport_size({"width": WIDTHS[0], "height": 900})
    size: float = page.evaluate(
        "Math.min(...[...document.querySelectorAll('main *')].filter(e => e.checkVisibility() &&"
        " [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).map(e => {"
        " const svg = e.closest('svg'), size = parseFloat(getComputedStyle(e).fontSize);"
        " return svg ? size * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width"
        " : size; }))"
    )
    return size


def assert_pictures(page: Any, images: int, within_charts: int) -> None:
    """More than so many pictures are there, and those outside of charts are described."""
    found = page.evaluate(
        "[...document.images].map(i => [i.naturalWidth, i.alt])"
        ".concat([...document.querySelectorAll('svg[role=img]')].map(s => [1,"
        " s.getAttribute('aria-label')]))"
    )
    assert len(found) > images
    assert all(width > 0 and description for width, description in found)
    # Pictures within charts have no naturalWidth: each is decoded on its own.
    assert page.evaluate(
        "Promise.all([...document.querySelectorAll('svg image')].map(async (i) => {"
        " const copy = new Image(); copy.src = i.href.baseVal; await copy.decode();"
        f" return copy.naturalWidth > 0; }})).then(all => all.length >= {within_charts} &&"
        " all.every(Boolean))"
    )


def assert_outline(page: Any) -> None:
    """One heading of the first level, and none that leaves out a level."""
    levels = page.evaluate(
        "[...document.querySelectorAll('h1, h2, h3, h4')].map(h => Number(h.tagName[1]))"
    )
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
