"""What selfalign prepare stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.data.sources import Source
from selfalign.parts import register

if TYPE_CHECKING:
    from selfalign.data.source import DataSource
    from selfalign.sections import DataConfig


@register("latents")
@dataclass(frozen=True)
class Latents(Source):
    """Latents, or pixels, that `selfalign prepare` stored in data.root."""

    decodes = True

    def open(self, config: DataConfig) -> DataSource:
        """See `open_latents`."""
        from selfalign.data.latents.reader import open_latents

        return open_latents(config)
