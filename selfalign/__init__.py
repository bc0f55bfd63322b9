"""Diffusion transformers that teach themselves: flow matching with self-representation alignment."""

from selfalign.config import RunConfig, override, resolve
from selfalign.errors import UserError
from selfalign.models.sit import SiT
from selfalign.objective import Losses, Objective, Predictions
from selfalign.randomness import make_generator
from selfalign.recipes import RECIPES, recipe
from selfalign.training.ema import EMA
from selfalign.views import Draw, TokenGroups, draw_views

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "RECIPES",
    "Draw",
    "Losses",
    "Objective",
    "Predictions",
    "RunConfig",
    "SiT",
    "TokenGroups",
    "UserError",
    "draw_views",
    "make_generator",
    "override",
    "recipe",
    "resolve",
]
