"""Numbers as people write them, for the templates."""

import math
from collections.abc import Sequence
from typing import Protocol


class Measured(Protocol):
    """A number with its uncertainty, as charts and tables show it."""

    @property
    def mean(self) -> float:
        """The number."""
        ...

    def interval(self) -> tuple[float, float] | None:
        """Ends of its 95 % interval; None where nothing shows a spread."""
        ...

    def half_width(self) -> float | None:
        """Half of that interval's width."""
        ...


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float, digits: int = 3) -> str:
    """With that many significant digits and a true minus sign."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    exponent = math.floor(math.log10(abs(value)))
    if -4 <= exponent < 6:
        text = f"{value:,.{max(0, digits - 1 - exponent)}f}"
    else:
        mantissa = value / 10.0**exponent
        text = f"{mantissa:.{digits - 1}f}·10{str(exponent).translate(_SUPERSCRIPT)}"
    return text.replace("-", "−")


def signed(value: float, digits: int = 3) -> str:
    """With its sign, plus included."""
    return ("+" if value > 0 else "") + number(value, digits)


def span(interval: Sequence[float], digits: int = 3) -> str:
    """An interval's ends, with their signs."""
    return f"{signed(interval[0], digits)} to {signed(interval[1], digits)}"


def share(value: float, reference: float, sign: bool = False) -> str:
    """A value relative to another, in per cent; empty where that has no meaning."""
    if reference <= 0:
        return ""
    relative = 100 * value / reference
    return f"{signed(relative, 2) if sign else number(abs(relative), 2)} %"


def plus_minus(mean: Measured) -> str:
    """Mean ± half of the interval, with as many decimals as the interval bears."""
    half = mean.half_width()
    if half is None:
        return f"{number(mean.mean)} (1 seed)"
    if half < 1e-12 * abs(mean.mean) or half == 0:
        return f"{number(mean.mean)} ± 0"
    decimals = min(6, max(0, 1 - math.floor(math.log10(half))))
    return f"{mean.mean:,.{decimals}f} ± {half:,.{decimals}f}".replace("-", "−")


def p_value(value: float) -> str:
    """A p-value, to two digits or a bound."""
    return "< .001" if value < 0.001 else f"{value:.2g}".removeprefix("0")
