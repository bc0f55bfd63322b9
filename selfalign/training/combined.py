"""Several optimizers, each over weights of its own, as one."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class Combined(Optimizer):
    """Steps optimizers one after the other; parameter groups and state are theirs.

    Args:
        optimizers: over different weights.
    """

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([group for each in optimizers for group in each.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let the optimizers work on this one's groups and state."""
        first = 0
        for each in self.optimizers:
            count = len(each.param_groups)
            each.param_groups = self.param_groups[first : first + count]
            each.state = self.state
            first += count

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()  # loading a state replaces groups and state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move all weights."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for each in self.optimizers:
            each.step()
        return loss
