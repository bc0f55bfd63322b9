"""One grouping after another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from selfalign.curriculums import Curriculum, parse_grouping
from selfalign.errors import UserError
from selfalign.parts import register

if TYPE_CHECKING:
    from selfalign.config import RunConfig
    from selfalign.sections import ViewsConfig


@register("stages")
@dataclass(frozen=True)
class Stages(Curriculum):
    """Partition, mask ratios, number of groups and share of whole images change at given steps."""

    stages: tuple[str, ...] = ()
    """STEP:PARTITION:RATIOS[:WHOLE] each, as in 1000:blocks:0.25 or 5000:random:0.2,0.3,0.5:0.25; before the
    first of these steps, as the section views says."""

    def check_in(self, config: Any) -> None:
        """There must be stages, in the order of their steps."""
        self.require(bool(self.stages), "stages", "allowed are one or more, as in 1000:blocks:0.25")
        first = [step for step, _ in self._parsed(config.views)]
        self.require(
            first == sorted(set(first)), "stages", "each step must be larger than the last"
        )

    def all_views(self, config: RunConfig) -> tuple[ViewsConfig, ...]:
        """Those of `views`, and of the stages."""
        return tuple(dict.fromkeys([config.views, *(v for _, v in self._parsed(config.views))]))

    def views(self, config: RunConfig, step: int) -> ViewsConfig:
        """That of the last stage that has begun."""
        reached = [views for first, views in self._parsed(config.views) if first <= step]
        return reached[-1] if reached else config.views

    def _parsed(self, views: ViewsConfig) -> tuple[tuple[int, ViewsConfig], ...]:
        return _parse(self.stages, views, self.dotted("stages"))


@lru_cache(maxsize=16)
def _parse(
    stages: tuple[str, ...], views: ViewsConfig, setting: str
) -> tuple[tuple[int, ViewsConfig], ...]:
    found = []
    for text in stages:
        step, _, grouping = text.partition(":")
        if not step.isdecimal():
            raise UserError(f"{setting} is {text!r}: it begins with a step, as in 1000:blocks:0.25")
        found.append((int(step), parse_grouping(grouping, views, setting)))
    return tuple(found)
