"""Small random weights in the layouts of released checkpoints."""

from typing import Any

import torch
from torch import nn

from selfalign import SiT
from selfalign.heads import ProjectionHead

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
    with_head = changes.pop("projection_head", False)
    model = SiT(**(settings | changes))
    if with_head:
        model.add_head("ap_head", ProjectionHead(model.hidden_size), tap=1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def projectors(widths: tuple[int, ...] = (16,)) -> nn.ModuleList:
    """REPA's, as its model holds them."""

    def one(width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(24, 20), nn.SiLU(), nn.Linear(20, 20), nn.SiLU(), nn.Linear(20, width)
        )

    return nn.ModuleList(one(width) for width in widths)
