"""Named transformer sizes (SiT, Table 1; `tiny` is ours, for CPUs)."""

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
}


def parse_size(name: str) -> tuple[Size, int]:
    """Split `S/2` into its size and its patch size; `tiny` alone means `tiny/1`.

    Raises:
        UserError: the name is not one of SIZES, or the patch size not one of PATCH_SIZES.
    """
    size, _, patch = (f"{name}/1" if name == "tiny" else name).partition("/")
    if size not in SIZES or patch not in map(str, PATCH_SIZES):
        raise UserError(
            f"model.size is {name!r}: allowed are {', '.join(SIZES)} followed by "
            f"/{', /'.join(map(str, PATCH_SIZES))}, as in S/2"
        )
    return SIZES[size], int(patch)
