"""Mask ratios and whole images that move to their final values."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from selfalign.curriculums import Curriculum
from selfalign.errors import UserError
from selfalign.parts import register

if TYPE_CHECKING:
    from selfalign.config import RunConfig
    from selfalign.sections import ViewsConfig


@register("ramp")
@dataclass(frozen=True)
class Ramp(Curriculum):
    """Shares begin where this part says and end where the section views says."""

    mask_ratios: tuple[float, ...] = ()
    """Share of the tokens in each group at the start, as views.mask_ratios; left out: those."""
    whole_image_fraction: float | None = None
    """Share of whole images at the start; left out: that of the section views."""
    steps: int = 10_000
    """Steps until the shares of the section views are reached."""
    shape: Literal["linear", "cosine"] = "linear"
    """Along a line, or half a cosine."""
    levels: int = 8
    """How many steps up or down there are: every one has group sizes of its own."""

    def check(self) -> None:
        """Limits of the numbers."""
        self.require_number("steps", 1, 10**12, "a number from 1")
        self.require_number("levels", 1, 1000, "a number from 1 to 1000")

    def check_in(self, config: Any) -> None:
        """As many groups at both ends."""
        start, end = _levels(self, config.views)[0], config.views
        self.require(
            len(start.mask_ratios) == len(end.mask_ratios),
            "mask_ratios",
            f"allowed are as many groups as views.mask_ratios has, {len(end.mask_ratios)}",
        )

    def all_views(self, config: RunConfig) -> tuple[ViewsConfig, ...]:
        """The levels, the last of which is `views`."""
        return tuple(dict.fromkeys([config.views, *_levels(self, config.views)]))

    def views(self, config: RunConfig, step: int) -> ViewsConfig:
        """The level that is reached."""
        done = min(1.0, step / self.steps)
        if self.shape == "cosine":
            done = 0.5 * (1 - math.cos(math.pi * done))
        return _levels(self, config.views)[math.floor(done * self.levels)]


@lru_cache(maxsize=16)
def _levels(ramp: Ramp, views: ViewsConfig) -> tuple[ViewsConfig, ...]:
    """The section `views` at each level, from the start to the end."""
    ratios = ramp.mask_ratios or views.mask_ratios
    whole = ramp.whole_image_fraction
    try:
        start = dataclasses.replace(
            views,
            mask_ratios=ratios,
            whole_image_fraction=views.whole_image_fraction if whole is None else whole,
        )
    except UserError as error:
        raise UserError(f"{ramp.section} begins with what is not allowed: {error}") from None

    def between(share: float) -> ViewsConfig:
        def mixed(a: float, b: float) -> float:
            return a + share * (b - a)

        return dataclasses.replace(
            views,
            mask_ratios=tuple(map(mixed, start.mask_ratios, views.mask_ratios)),
            whole_image_fraction=mixed(start.whole_image_fraction, views.whole_image_fraction),
        )

    inner = [between(level / ramp.levels) for level in range(1, ramp.levels)]
    return (start, *inner, views)
