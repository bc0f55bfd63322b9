"""How long samples are, where those of the data are of unequal lengths."""

import torch

from selfalign.data.source import Split
from selfalign.randomness import make_generator
from selfalign.sampling.generate import Labels, sample_labels

AT_ONCE = 256
"""Training samples that are read at once."""


def draw_lengths(
    train: Split, labels: Labels | None, num_classes: int, seed: int, num: int
) -> tuple[int, ...]:
    """For the samples 0 to num-1 of `generate` the lengths of drawn training samples of the same class.

    Sample i's is a function of the data, its class, the seed and i. A class that was not trained on has
    the lengths of all.

    Args:
        train: the training samples, NaN beyond their ends.
        labels, seed: as for `generate`.
        num_classes: of the model.
        num: how many samples.
    """
    parts = []
    for first in range(0, len(train), AT_ONCE):
        samples, _ = train.read(range(first, min(first + AT_ONCE, len(train))))
        # What lies beyond the end is NaN in every channel and pixel: one of each place tells.
        places = samples[:, 0].reshape(len(samples), samples.shape[2], -1)[..., 0]
        parts.append(places.isfinite().sum(dim=1))
    lengths = torch.cat(parts)
    chosen = sample_labels(labels, num_classes, seed, range(num)).tolist()
    by_class = {label: lengths[train.labels == label] for label in set(chosen)}
    drawn = []
    for i, label in enumerate(chosen):
        own = by_class[label] if len(by_class[label]) else lengths
        generator = make_generator(seed, "sample length", i)
        drawn.append(int(own[torch.randint(len(own), (1,), generator=generator)]))
    return tuple(drawn)
