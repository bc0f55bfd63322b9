"""Transformer sizes: named (SiT, Table 1; `tiny` and those named by parameters are ours), or by numbers."""

import re
from dataclasses import dataclass

from selfalign.errors import UserError
from selfalign.sections import PATCH_SIZES


@dataclass(frozen=True)
class Size:
    """Width D, number of blocks, and attention heads."""

    hidden_size: int
    depth: int
    heads: int


SIZES: dict[str, Size] = {
    "tiny": Size(hidden_size=96, depth=6, heads=3),
    "S": Size(hidden_size=384, depth=12, heads=6),
    "B": Size(hidden_size=768, depth=12, heads=12),
    "L": Size(hidden_size=1024, depth=24, heads=16),
    "XL": Size(hidden_size=1152, depth=28, heads=16),
    "2B": Size(hidden_size=1792, depth=36, heads=28),
    "5B": Size(hidden_size=2560, depth=42, heads=40),
    "10B": Size(hidden_size=3328, depth=50, heads=52),
}


MAX_WIDTH, MAX_DEPTH = 2**16, 2**10
_BY_NUMBERS = re.compile(r"(\d{1,5})x(\d{1,4})x(\d{1,4})")


def parse_size(name: str) -> tuple[Size, int]:
    """Split `S/2` into its size and its patch size; `tiny` alone means `tiny/1`.

    A size that has no name is written by its numbers, WIDTHxDEPTHxHEADS: `384x12x6/2` is `S/2`.

    Raises:
        UserError: the name is not one of SIZES nor three numbers, or the patch size not one of PATCH_SIZES.
    """
    size, _, patch = (f"{name}/1" if name == "tiny" else name).partition("/")
    found = SIZES.get(size)
    if numbers := _BY_NUMBERS.fullmatch(size):
        found = Size(*map(int, numbers.groups()))
        if not (
            0 < found.heads <= found.hidden_size <= MAX_WIDTH
            and 0 < found.depth <= MAX_DEPTH
            and found.hidden_size % found.heads == 0
        ):
            raise UserError(
                f"model.size is {name!r}: as numbers allowed are a width up to {MAX_WIDTH}, a depth up to "
                f"{MAX_DEPTH}, and heads that divide the width"
            )
    if found is None or patch not in map(str, PATCH_SIZES):
        raise UserError(
            f"model.size is {name!r}: allowed are {', '.join(SIZES)} followed by "
            f"/{', /'.join(map(str, PATCH_SIZES))}, as in S/2, or WIDTHxDEPTHxHEADS for the name"
        )
    return found, int(patch)


def size_name(size: Size, patch_size: int) -> str:
    """What `parse_size` reads as this: a name where there is one."""
    numbers = f"{size.hidden_size}x{size.depth}x{size.heads}"
    named = next((name for name, known in SIZES.items() if known == size), numbers)
    return f"{named}/{patch_size}"
