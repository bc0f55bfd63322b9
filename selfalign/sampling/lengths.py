"""How long samples are, where those of the data are of unequal lengths."""

import torch
from jaxtyping import Int
from torch import Tensor

from selfalign.data.source import Split
from selfalign.randomness import make_generator

AT_ONCE = 256
"""Training samples that are read at once."""


def draw_lengths(train: Split, labels: Int[Tensor, "M"], seed: int) -> tuple[int, ...]:
    """For samples 0, 1, … of these classes the lengths of drawn training samples of the same class.

    Sample i's is a function of the data, its class, the seed and i. A class that was not trained on has
    the lengths of all.
    """
    parts = []
    for first in range(0, len(train), AT_ONCE):
        samples, _ = train.read(range(first, min(first + AT_ONCE, len(train))))
        # What lies beyond the end is NaN in every channel and pixel: one of each place tells.
        places = samples[:, 0].reshape(len(samples), samples.shape[2], -1)[..., 0]
        parts.append(places.isfinite().sum(dim=1))
    lengths = torch.cat(parts)
    by_class = {int(label): lengths[train.labels == label] for label in labels.unique()}
    drawn = []
    for i, label in enumerate(labels.tolist()):
        own = by_class[label] if len(by_class[label]) else lengths
        generator = make_generator(seed, "sample length", i)
        drawn.append(int(own[torch.randint(len(own), (1,), generator=generator)]))
    return tuple(drawn)
