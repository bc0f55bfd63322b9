"""A folder of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.data.sources import Source
from selfalign.parts import register

if TYPE_CHECKING:
    from selfalign.data.contents import Recorded
    from selfalign.data.source import DataSource
    from selfalign.sections import DataConfig


@register("folder")
@dataclass(frozen=True)
class Folder(Source):
    """Class subfolders of images, or images alone, below data.root; a tenth is held out."""

    def open(self, config: DataConfig) -> DataSource:
        """See `open_folder`."""
        from selfalign.data.folder import open_folder

        return open_folder(config)

    def reopen(self, config: DataConfig, recorded: Recorded) -> DataSource:
        """See `open_folder`."""
        from selfalign.data.folder import open_folder

        return open_folder(config, recorded)
