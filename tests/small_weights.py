"""Small random weights in the layouts of released checkpoints."""

from typing import Any

import torch
from support import randomize, small_model
from torch import nn

from selfalign import SiT

HEADS = 2


def network(seed: int = 0, **changes: Any) -> SiT:
    """A small model in which every parameter matters."""
    settings: dict[str, Any] = {
        "channels": 3,
        "image_size": (8, 8),
        "patch_size": 2,
        "hidden_size": 24,
        "depth": 2,
        "heads": HEADS,
        "num_classes": 5,
    }
    settings |= changes
    head = 1 if settings.pop("projection_head", False) else None
    model = small_model(seed, torch.float32, head_after=head, **settings)
    randomize(model, seed, std=0.1)
    return model.eval()


def projectors(widths: tuple[int, ...] = (16,)) -> nn.ModuleList:
    """REPA's, as its model holds them."""

    def one(width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(24, 20), nn.SiLU(), nn.Linear(20, 20), nn.SiLU(), nn.Linear(20, width)
        )

    return nn.ModuleList(one(width) for width in widths)
