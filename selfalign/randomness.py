"""Randomness is a function: a generator for every (seed, purpose, key), and nothing else draws.

A run's state is therefore (step, weights, EMA, optimizer), and resuming is exact by construction.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


def derive_seed(seed: int, purpose: str, *key: int) -> int:
    """A 63-bit seed that is a function of all arguments."""
    text = "/".join(map(str, (seed, purpose, *key)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def make_generator(
    seed: int, purpose: str, *key: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A fresh generator, on `device`, whose numbers are a function of (seed, purpose, key).

    torch's CPU generator uses 32 bits of its seed: among 50,000 keys, two share their numbers with a
    probability of about a quarter.
    """
    return torch.Generator(device).manual_seed(derive_seed(seed, purpose, *key))


@dataclass(frozen=True)
class Share:
    """The samples of a step's batch that one process has at a time: one of several equal shares.

    Whoever draws for samples draws for those of all shares, so that the numbers of a sample do not depend
    on how many shares there are.
    """

    index: int = 0
    count: int = 1

    def own(self, values: Tensor) -> Tensor:
        """This share's rows of what was drawn for all; the others are not kept in memory."""
        if self.count == 1:
            return values
        size = len(values) // self.count
        return values[self.index * size : (self.index + 1) * size].clone()


WHOLE = Share()
"""All samples of a step."""
