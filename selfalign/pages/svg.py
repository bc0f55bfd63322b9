"""Matplotlib's figures as SVG that stands alone in a file, or in a page whose colours it takes."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the reader's font
    "svg.hashsalt": "selfalign",
    "text.parse_math": False,  # names from outside are text, whatever their dollar signs
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10.5,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.limits": (-4, 5),
}
_COLOUR = re.compile(r"#0d0([0-9a-f]{3})")
_UNWANTED = re.compile(
    r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->"
    r'|(?<=<g) id="[^"]*"',
    re.DOTALL,
)
"""What would act on the whole page, or stands twice in one with two figures."""
_SIZE = re.compile(r' (width|height)="[0-9.]+pt"')
_INK = "ink"


class _Palette:
    """Colours by the name of a CSS variable: numbers that no picture uses, until the SVG is written."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, name: str) -> str:
        if name not in self.names:
            self.names.append(name)
        return f"#0d0{self.names.index(name):03x}"


palette = _Palette()
"""`palette("helps")` is a colour for matplotlib that becomes `var(--helps)`; outside of a page that
sets such variables, it is the text's."""


@contextmanager
def drawing() -> Iterator[None]:
    """Make figures and write them within this: it sets their style, and says nothing of missing glyphs."""
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    colours: Any = dict.fromkeys(names, palette(_INK))
    with (
        mpl.rc_context({**_STYLE, **colours}),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", UserWarning)
        yield


def to_svg(figure: Figure, description: str) -> str:
    """A figure as an SVG element.

    Args:
        figure: of any size; a page scales it.
        description: read out in its place to those who cannot see it.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = _UNWANTED.sub("", text[text.index("<svg") :].strip())
    text = _SIZE.sub("", text, count=2)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
    text = _COLOUR.sub(
        lambda found: f"var(--{palette.names[int(found[1], 16)]}, currentColor)", text
    )
    return text.replace(
        "<svg", f'<svg class="chart" role="img" aria-label="{escape(description)}"', 1
    )
