"""Which images of a set without splits of its own are held out: a function of their names."""

import hashlib
from collections import Counter
from collections.abc import Sequence

from selfalign.names import encode_name


def split_by_hash(
    names: Sequence[str], share: float, labels: Sequence[int] | None = None
) -> tuple[list[int], list[int]]:
    """Positions of the training part and of the held-out part: the names of the smallest hashes.

    A function of names and labels, so it never changes. The last training image of a class is not held
    out, unless every class has only one: then one image is.

    Args:
        names: of the images.
        share: of them that is held out.
        labels: their classes; None for the rule of version 0.1.0, which minds no classes.
    """
    by_hash = sorted(
        range(len(names)), key=lambda index: hashlib.sha256(encode_name(names[index])).digest()
    )
    count = max(1, int(len(names) * share))
    if labels is None:
        return by_hash[count:], by_hash[:count]
    left = Counter(labels)
    kept: list[int] = []
    heldout: list[int] = []
    for index in by_hash:
        if len(heldout) < count and left[labels[index]] > 1:
            left[labels[index]] -= 1
            heldout.append(index)
        else:
            kept.append(index)
    if not heldout:  # every class has one image
        heldout.append(kept.pop(0))
    return kept, heldout
