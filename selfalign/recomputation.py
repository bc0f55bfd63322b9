"""What blocks compute again in the backward pass instead of keeping it (activation checkpointing)."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(policy: str, number: int, block: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Run a block and keep of it what the policy says.

    Args:
        policy: blocks: its input alone; alternate: the same of every second block, all of the others.
        number: of the block, from 1.
        block: a function of tensors.
        inputs: its arguments.
    """
    if policy == "alternate" and number % 2 == 0:
        return block(*inputs)
    result: Tensor = checkpoint(block, *inputs, use_reentrant=False)
    return result
