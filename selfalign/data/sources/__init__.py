"""Data sources: data sets by name, each with fixed, disjoint training and held-out splits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from selfalign.parts import Part

if TYPE_CHECKING:
    from selfalign.data.contents import Recorded
    from selfalign.data.source import DataSource
    from selfalign.sections import DataConfig


@dataclass(frozen=True)
class Source(Part):
    """Opens a data set. Folder, image size and augmentation come from the section `data`."""

    kind: ClassVar[str] = "source"

    small: ClassVar[bool] = False
    """Whether images are so small that Inception makes no sense and a classifier of their own is used."""

    decodes: ClassVar[bool] = False
    """Whether the model sees something else than pixels, so that samples need `DataSource.decode`."""

    holds_images: ClassVar[bool] = True
    """Whether it can be opened."""

    @property
    def padded(self) -> bool:
        """Whether samples are of unequal lengths along their first side: what is missing is NaN."""
        return False

    @abstractmethod
    def open(self, config: DataConfig) -> DataSource:
        """The data set.

        Raises:
            UserError: files are missing or unreadable; the message names them.
        """

    def decoder(self, config: DataConfig) -> Callable[[Any], Any] | None:
        """`DataSource.decode`, where that needs no images; None where the set has to be opened for it."""
        return None

    def reopen(self, config: DataConfig, recorded: Recorded) -> DataSource:
        """The data set for a run that goes on; images that a run recorded keep their places."""
        return self.open(config)
