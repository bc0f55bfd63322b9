"""Targets: what the student's features are aligned with (Eq. 3 and 7)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from selfalign.parts import Part

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from selfalign.config import ResolvedConfig
    from selfalign.data.source import DataSource, Features
    from selfalign.network import Tap
    from selfalign.objective import Pass


class BuiltTarget(Protocol):
    """What a run asks of a target in every step."""

    def taps(self, config: ResolvedConfig) -> tuple[Tap, ...]:
        """See `Target.taps`."""
        ...

    def features(self, forward: Pass) -> Float[Tensor, "B N Z"]:
        """See `Target.features`."""
        ...


@dataclass(frozen=True)
class Target(Part):
    """Features to compare with, without gradient, token by token in the student's order."""

    kind: ClassVar[str] = "target"
    sees_images: ClassVar[bool] = False
    """Whether a network looks at the clean images, whatever space the model works in."""

    def build(self, config: ResolvedConfig) -> BuiltTarget:
        """What gives the features in a run: this part, unless it has networks to load first."""
        return self

    def taps(self, config: ResolvedConfig) -> tuple[Tap, ...]:
        """Features of the student's own pass that the target is made of. None by default."""
        return ()

    def teacher_taps(self, config: ResolvedConfig) -> tuple[Tap, ...]:
        """Features of the EMA teacher that the target is made of. None by default."""
        return ()

    def completed(self, config: ResolvedConfig, source: DataSource) -> Target:
        """The same part with what a run records of it besides its settings; itself by default.

        Args:
            config: the tree in which it is chosen.
            source: the run's data.

        Raises:
            UserError: something that the target needs is not there, or does not fit.
        """
        return self

    def stored(self, config: ResolvedConfig, source: DataSource) -> Mapping[str, Features]:
        """Features of the training images that are to come with every batch. None by default."""
        return {}

    def stored_shapes(self, config: ResolvedConfig) -> Mapping[str, tuple[int, ...]]:
        """Shapes (h, w, Z) of what comes with every sample, for who counts or measures without data."""
        return {}

    def live(self) -> Target:
        """The same target of the batch alone, for images of which nothing is stored; itself by default."""
        return self

    def part_widths(self, config: ResolvedConfig) -> tuple[int | None, ...]:
        """Features of each of the parts that the target's features consist of, side by side.

        A part has a projector and a distance of its own; encoders are such parts. None stands for the
        student's own width D.
        """
        return (None,)

    @abstractmethod
    def features(self, forward: Pass) -> Float[Tensor, "B N Z"]:
        """The target's features of a batch.

        Args:
            forward: the batch, its views and draw, the student's output and the EMA teacher.

        Returns:
            In group order; Z is the sum of `part_widths`.
        """
