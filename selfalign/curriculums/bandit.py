"""A learned curriculum: a bandit over groupings, rewarded by how fast the loss falls under each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from selfalign.curriculums import Curriculum, State, parse_grouping
from selfalign.errors import UserError
from selfalign.parts import register

if TYPE_CHECKING:
    from selfalign.config import RunConfig
    from selfalign.sections import ViewsConfig


@register("bandit")
@dataclass(frozen=True)
class Bandit(Curriculum):
    """Discounted UCB (Garivier and Moulines, arXiv:0805.3415) over partitions and mask ratios.

    An arm is played for some steps. Its reward is the share by which the student's denoising loss fell in
    them, on pairs of a training image and a timestep that never change; held-out images have no part in it.
    """

    arms: tuple[str, ...] = ("random:0.25", "random:0.5", "blocks:0.25", "blocks:0.5")
    """PARTITION:RATIOS[:WHOLE] each, as in blocks:0.25 or random:0.2,0.3,0.5:0.25."""
    every: int = 100
    """Steps for which an arm is played, and after which the loss is measured."""
    pairs: int = 500
    """Pairs of a training image and a timestep of which the loss is measured."""
    exploration: float = 0.5
    """Weight of what is not yet known, relative to the spread of the rewards."""
    discount: float = 0.95
    """What a reward still counts for after every further one: losses fall ever more slowly."""

    def check(self) -> None:
        """Limits of the numbers."""
        self.require(len(self.arms) >= 2, "arms", "allowed are two or more")
        self.require(len(set(self.arms)) == len(self.arms), "arms", "allowed is each once")
        self.require_number("every", 1, 10**9, "a number from 1")
        self.require_number("pairs", 10, 10**7, "a number from 10")
        self.require_number("exploration", 0, 1e6, "a number from 0")
        self.require_number("discount", 0.01, 1, "a number from 0.01 to 1")

    def all_views(self, config: RunConfig) -> tuple[ViewsConfig, ...]:
        """Those of the arms, and `views`, which inspection shows."""
        return tuple(dict.fromkeys([config.views, *self.groupings(config.views)]))

    def views(self, config: RunConfig, step: int) -> ViewsConfig:
        """Those of the first arm: what comes later is learnt."""
        return self.groupings(config.views)[0]

    def groupings(self, views: ViewsConfig) -> tuple[ViewsConfig, ...]:
        """Those of the arms, in their order."""
        return _parse(self.arms, views, self.dotted("arms"))

    def learner(self, config: RunConfig) -> BanditLearner:
        """What chooses."""
        return BanditLearner(self, self.groupings(config.views))


@lru_cache(maxsize=16)
def _parse(arms: tuple[str, ...], views: ViewsConfig, setting: str) -> tuple[ViewsConfig, ...]:
    return tuple(parse_grouping(arm, views, setting) for arm in arms)


class BanditLearner:
    """Plays one arm after the other; a function of the losses it is told.

    Args:
        settings: of the bandit.
        groupings: of the arms.
    """

    def __init__(self, settings: Bandit, groupings: tuple[ViewsConfig, ...]) -> None:
        self.settings, self.groupings = settings, groupings
        self.every, self.pairs = settings.every, settings.pairs
        self.arm = 0
        self.loss: float | None = None
        """The last one measured."""
        self.plays = [0.0] * len(groupings)
        """Discounted, of each arm."""
        self.rewards = [0.0] * len(groupings)
        """Their discounted sum."""
        self.squares = 0.0
        """Discounted sum of all squared rewards."""

    def views(self) -> ViewsConfig:
        """Those of the arm that is played."""
        return self.groupings[self.arm]

    def observe(self, loss: float) -> None:
        """Reward the arm with log(loss before / loss now), and choose the next one."""
        if self.loss is not None and loss > 0 and self.loss > 0 and math.isfinite(loss):
            reward, keep = math.log(self.loss / loss), self.settings.discount
            self.plays = [keep * count for count in self.plays]
            self.rewards = [keep * total for total in self.rewards]
            self.squares = keep * self.squares + reward**2
            self.plays[self.arm] += 1
            self.rewards[self.arm] += reward
        self.loss = loss
        self.arm = self._next()

    def _next(self) -> int:
        """An arm that has not been played, or the one with the largest upper bound."""
        if 0.0 in self.plays:
            return self.plays.index(0.0)
        total = sum(self.plays)
        mean = sum(self.rewards) / total
        spread = math.sqrt(max(0.0, self.squares / total - mean**2))

        def bound(arm: int) -> float:
            unknown = math.sqrt(2 * math.log(max(total, 1.0)) / self.plays[arm])
            bonus = self.settings.exploration * spread * unknown
            return self.rewards[arm] / self.plays[arm] + bonus

        return max(range(len(self.plays)), key=bound)

    def state(self) -> State:
        """Arm, loss, and what each arm has brought."""
        return {
            "arms": list(self.settings.arms),
            "arm": self.arm,
            "loss": self.loss,
            "plays": self.plays,
            "rewards": self.rewards,
            "squares": self.squares,
        }

    def load(self, state: State) -> None:
        """See `Learner.load`."""
        if state.get("arms") != list(self.settings.arms):
            raise UserError(
                f"{self.settings.dotted('arms')} is {self.settings.arms!r}: the checkpoint has learnt about "
                f"{state.get('arms')!r}"
            )
        count = len(self.groupings)
        numbers = [state.get("squares"), *_list(state, "plays", count)]
        numbers += _list(state, "rewards", count)
        arm, loss = state.get("arm"), state.get("loss")
        good = all(isinstance(n, int | float) and math.isfinite(n) for n in numbers)
        if not good or not isinstance(arm, int) or not 0 <= arm < count:
            raise UserError(f"the checkpoint's state of {self.settings.section} is damaged")
        self.arm, self.loss = arm, None if loss is None else float(loss)
        self.plays, self.rewards = list(state["plays"]), list(state["rewards"])
        self.squares = float(state["squares"])


def _list(state: State, name: str, count: int) -> list[Any]:
    held = state.get(name)
    return held if isinstance(held, list) and len(held) == count else [None]
