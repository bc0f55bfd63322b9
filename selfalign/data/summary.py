"""What was found where a data set was opened, in a few lines for a person."""

from collections.abc import Mapping
from dataclasses import dataclass

from selfalign.weights import listed

SHOWN = 5
"""How many names or kinds a line lists at most."""


@dataclass(frozen=True)
class Summary:
    """Counts of images by class, and of what is not part of the set."""

    training: tuple[int, ...]
    """Training images of each class; one number for a set without classes."""
    heldout: tuple[int, ...]
    """Held-out images of each class."""
    class_names: tuple[str, ...]
    left_out: Mapping[str, int]
    """Files or rows that are not part of the set, by what they are."""

    @property
    def untrained(self) -> tuple[str, ...]:
        """Names of the classes without a training image."""
        counts = zip(self.class_names, self.training, strict=True) if self.class_names else ()
        return tuple(name for name, count in counts if not count)

    def lines(self) -> list[str]:
        """Images, classes with the smallest and the largest, which have none, and what was left out."""
        said = f"images: {sum(self.training):,} to train on, {sum(self.heldout):,} held out"
        counts = [a + b for a, b in zip(self.training, self.heldout, strict=True)]
        if len(self.class_names) > 1:
            low, high = (edge(counts) for edge in (min, max))
            smallest, largest = (self.class_names[counts.index(count)] for count in (low, high))
            said += f", {len(counts):,} classes of "
            said += (
                f"{low:,} ({smallest!r}) to {high:,} ({largest!r})" if low < high else f"{low:,}"
            )
        elif self.class_names:
            said += f", 1 class ({self.class_names[0]})"
        else:
            said += ", no classes"
        found = [said]
        if self.untrained:
            found.append(
                f"warning: no training image of the classes {listed(self.untrained, SHOWN)}: a model learns "
                "nothing of them"
            )
        if self.left_out:
            kinds = sorted(self.left_out.items(), key=lambda item: (-item[1], item[0]))
            counted = [f"{count:,} {kind}" for kind, count in kinds]
            found.append(f"left out: {listed(counted, SHOWN)}")
        return found
