"""What the folder of a model of diffusers says of it, read without torch and without diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from selfalign.errors import UserError
from selfalign.sections import MAX_CHANNELS, MAX_CLASSES, MAX_SIDE

DIT, FLUX = "DiTTransformer2DModel", "FluxTransformer2DModel"
LAYERS = ("num_layers", "num_single_layers")
LIMITS = {
    **dict.fromkeys(LAYERS, 1000),
    "in_channels": MAX_CHANNELS,
    "patch_size": MAX_SIDE,
    "sample_size": MAX_SIDE,
    "num_embeds_ada_norm": MAX_CLASSES,
}
"""The most of each number that is read here."""
USUAL: Mapping[str, Mapping[str, int]] = {
    DIT: {
        "num_layers": 28,
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 32,
        "num_embeds_ada_norm": 1000,
    },
    FLUX: {"num_layers": 19, "num_single_layers": 38, "in_channels": 64},
}
"""diffusers' defaults, which stand for what a config.json leaves out."""


@lru_cache(maxsize=16)
def read_settings(folder: str, setting: str) -> Mapping[str, Any]:
    """The config.json of a folder, with diffusers' defaults for what it leaves out.

    Args:
        folder: the folder.
        setting: where it is named, for messages.

    Raises:
        UserError: it is not there, of another kind, or describes no model.
    """
    from selfalign.records import convert, read_plain  # training by itself needs no msgspec

    path = Path(folder) / "config.json"
    if not folder or not path.is_file():
        raise UserError(
            f"{setting} is {folder!r}: needed is a folder of diffusers, with config.json"
        )
    found = convert(read_plain(path), dict[str, Any], f"{path} cannot be read")
    kind = found.get("_class_name")
    if kind not in (DIT, FLUX):
        raise UserError(f"{path} is of {kind!r}: allowed are {DIT} and {FLUX}")
    whole = {**USUAL[kind], **found}
    for name in USUAL[kind]:
        value, least = whole[name], 0 if kind == FLUX and name in LAYERS else 1
        if type(value) is not int or not least <= value <= LIMITS[name]:
            raise UserError(
                f"{path} is damaged: {name} is {value!r}; allowed are whole numbers from {least} to "
                f"{LIMITS[name]:,}"
            )
    if not sum(whole.get(name, 0) for name in LAYERS):
        raise UserError(f"{path} is damaged: it has no layers")
    return MappingProxyType(whole)
