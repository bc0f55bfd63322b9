"""The same grouping in every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.curriculums import Curriculum
from selfalign.parts import register

if TYPE_CHECKING:
    from selfalign.config import RunConfig
    from selfalign.sections import ViewsConfig


@register("constant")
@dataclass(frozen=True)
class Constant(Curriculum):
    """As the section `views` says, from the first step to the last."""

    def all_views(self, config: RunConfig) -> tuple[ViewsConfig, ...]:
        """That one."""
        return (config.views,)

    def views(self, config: RunConfig, step: int) -> ViewsConfig:
        """That one."""
        return config.views
