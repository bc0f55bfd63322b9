"""Curriculums: how a run's grouping changes while it goes on (mask ratio, number of groups, whole images)."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from selfalign.errors import UserError
from selfalign.parts import Part
from selfalign.sections import ViewsConfig

if TYPE_CHECKING:
    from selfalign.config import RunConfig

State = Mapping[str, Any]
"""What a learner has learnt, as JSON can hold it."""


class Learner(Protocol):
    """Chooses groupings by what it measures; whatever it knows is its state."""

    every: int
    """Steps between two measurements."""
    pairs: int
    """Pairs of a training image and a timestep of which the denoising loss is measured."""

    def views(self) -> ViewsConfig:
        """How the next step's batch is grouped."""
        ...

    def observe(self, loss: float) -> None:
        """Learn from the denoising loss after `every` steps, and choose anew."""
        ...

    def state(self) -> State:
        """All that it has learnt."""
        ...

    def load(self, state: State) -> None:
        """Go on from a state. A UserError if it is another curriculum's."""
        ...


@dataclass(frozen=True)
class Curriculum(Part):
    """Says how each step's batch is grouped, as a section `views` of that step."""

    kind: ClassVar[str] = "curriculum"

    @abstractmethod
    def all_views(self, config: RunConfig) -> tuple[ViewsConfig, ...]:
        """Every grouping that a run may come to use."""

    @abstractmethod
    def views(self, config: RunConfig, step: int) -> ViewsConfig:
        """How the batch of optimizer step `step`, counted from 0, is grouped."""

    def learner(self, config: RunConfig) -> Learner | None:
        """What chooses in place of `views` by what it measures; None by default."""
        return None

    def uses(self, config: Any) -> Iterable[Part]:
        """The partitions."""
        names = dict.fromkeys(views.partition for views in self.all_views(config))
        return [config.partitions[name] for name in names]


def parse_grouping(text: str, views: ViewsConfig, setting: str) -> ViewsConfig:
    """`PARTITION:RATIOS[:WHOLE]`, as in `blocks:0.25` or `random:0.2,0.3,0.5:0.25`.

    Args:
        text: the partition's name (nothing: that of `views`), the groups' shares, the whole images' share.
        views: what is left out, and all else, comes from here.
        setting: where the text stands, for messages.

    Raises:
        UserError: it says something else, or what is not allowed.
    """
    partition, _, rest = text.partition(":")
    ratios, _, whole = rest.partition(":")
    try:
        shares = tuple(float(word) for word in ratios.split(","))
        fraction = float(whole) if whole else views.whole_image_fraction
    except ValueError:
        raise UserError(
            f"{setting} is {text!r}: allowed are PARTITION:RATIOS or PARTITION:RATIOS:WHOLE, as in "
            "blocks:0.25 or random:0.2,0.3,0.5:0.25"
        ) from None
    try:
        return dataclasses.replace(
            views,
            partition=partition or views.partition,
            mask_ratios=shares,
            whole_image_fraction=fraction,
        )
    except UserError as error:
        raise UserError(f"{setting} is {text!r}: {error}") from None
