"""Which images of a set without splits of its own are held out: a function of their names."""

import hashlib
from collections import Counter
from collections.abc import Sequence

from selfalign.names import encode_name


def order_by_hash(names: Sequence[str]) -> list[int]:
    """Positions of the images in the order of their names' hashes."""
    hashes = [hashlib.sha256(encode_name(name)).digest() for name in names]
    return sorted(range(len(names)), key=hashes.__getitem__)


def split_in_order(
    order: Sequence[int], share: float, labels: Sequence[int] | None = None
) -> tuple[list[int], list[int]]:
    """Positions of the training part and of the held-out part, which are the first of the order.

    The last training image of a class is not held out, unless every class has only one: then one image
    is.

    Args:
        order: what `order_by_hash` made of the names, so that the split never changes.
        share: of the images that is held out.
        labels: their classes; None for the rule of version 0.1.0, which minds no classes.
    """
    count = max(1, int(len(order) * share))
    if labels is None:
        return list(order[count:]), list(order[:count])
    left = Counter(labels)
    kept: list[int] = []
    heldout: list[int] = []
    for index in order:
        if len(heldout) < count and left[labels[index]] > 1:
            left[labels[index]] -= 1
            heldout.append(index)
        else:
            kept.append(index)
    if not heldout:  # every class has one image
        heldout.append(kept.pop(0))
    return kept, heldout
