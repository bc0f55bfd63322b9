"""Diffusion transformers that teach themselves: flow matching with self-representation alignment."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"

if TYPE_CHECKING:
    from selfalign.backbones.sit.model import SiT
    from selfalign.config import ResolvedConfig, RunConfig, override, resolve
    from selfalign.errors import UserError
    from selfalign.objective import Losses, Objective, Pass
    from selfalign.parts import load_plugin, register
    from selfalign.randomness import make_generator
    from selfalign.recipes import RECIPES, recipe
    from selfalign.student import build_student
    from selfalign.tokens import TokenGrid, TokenGroups
    from selfalign.training.ema import EMA
    from selfalign.views import Draw, draw_views

_HOMES = {
    "EMA": "training.ema",
    "RECIPES": "recipes",
    "Draw": "views",
    "Losses": "objective",
    "Objective": "objective",
    "Pass": "objective",
    "ResolvedConfig": "config",
    "RunConfig": "config",
    "SiT": "backbones.sit.model",
    "TokenGrid": "tokens",
    "TokenGroups": "tokens",
    "UserError": "errors",
    "build_student": "student",
    "draw_views": "views",
    "load_plugin": "parts",
    "make_generator": "randomness",
    "override": "config",
    "recipe": "recipes",
    "register": "parts",
    "resolve": "config",
}
"""Where each public name lives; imported when it is first asked for, since torch takes seconds."""

__all__ = [
    "EMA",
    "RECIPES",
    "Draw",
    "Losses",
    "Objective",
    "Pass",
    "ResolvedConfig",
    "RunConfig",
    "SiT",
    "TokenGrid",
    "TokenGroups",
    "UserError",
    "build_student",
    "draw_views",
    "load_plugin",
    "make_generator",
    "override",
    "recipe",
    "register",
    "resolve",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'selfalign' has no attribute {name!r}")
    return getattr(importlib.import_module(f"selfalign.{_HOMES[name]}"), name)
