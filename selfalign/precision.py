"""Arithmetic that stays in full precision under autocast."""

import contextlib
from contextlib import AbstractContextManager

import torch


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Within it autocast lowers nothing on a device; the meta device, which computes nothing, has none."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
