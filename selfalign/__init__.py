"""Diffusion transformers that teach themselves: flow matching with self-representation alignment."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"

if TYPE_CHECKING:
    from selfalign.backbones.sit.model import SiT
    from selfalign.config import ResolvedConfig, RunConfig, override, resolve
    from selfalign.easy import evaluate, sample
    from selfalign.errors import UserError
    from selfalign.objective import Losses, Objective, Pass
    from selfalign.parts import load_plugin, register
    from selfalign.randomness import make_generator
    from selfalign.recipes import RECIPES, recipe
    from selfalign.runs.load import LoadedRun, load_run
    from selfalign.student import build_student
    from selfalign.tokens import TokenGrid, TokenGroups
    from selfalign.training.ema import EMA
    from selfalign.views import Draw, draw_views

_HOMES = {
    "EMA": "training.ema",
    "RECIPES": "recipes",
    "Draw": "views",
    "LoadedRun": "runs.load",
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
    "evaluate": "easy",
    "load_plugin": "parts",
    "load_run": "runs.load",
    "make_generator": "randomness",
    "override": "config",
    "recipe": "recipes",
    "register": "parts",
    "resolve": "config",
    "sample": "easy",
}
"""Where each public name lives; imported when it is first asked for, since torch takes seconds."""

__all__ = [
    "EMA",
    "RECIPES",
    "Draw",
    "LoadedRun",
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
    "evaluate",
    "load_plugin",
    "load_run",
    "make_generator",
    "override",
    "recipe",
    "register",
    "resolve",
    "sample",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'selfalign' has no attribute {name!r}")
    return getattr(importlib.import_module(f"selfalign.{_HOMES[name]}"), name)
