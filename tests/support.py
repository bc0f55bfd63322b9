"""Small models, configs and draws that the tests share, and commands in two processes."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from selfalign import Draw, RunConfig, SiT, draw_views, recipe, resolve
from selfalign.randomness import make_generator

RECIPE_NAMES = ("sit", "sra", "self-flow", "sra-dts", "sra-as", "sra-dts-as")


def resolved(
    name: str,
    overrides: Mapping[str, Any] | None = None,
    *,
    channels: int = 1,
    image_size: tuple[int, int] = (8, 8),
    num_classes: int = 5,
) -> RunConfig:
    """The resolved tree of a recipe at the `tiny` size."""
    tree = recipe(name, {"model.size": "tiny", **(overrides or {})})
    return resolve(tree, channels, image_size, num_classes)


def randomize(model: nn.Module, seed: int = 0, std: float = 0.2) -> None:
    """Random weights everywhere: a fresh SiT's blocks are the identity and would prove little."""
    generator = make_generator(seed, "weights")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std, generator=generator)


def small_model(seed: int = 0, dtype: torch.dtype = torch.float64, **settings: Any) -> SiT:
    """A model of width 24 and three blocks with random weights."""
    defaults: dict[str, Any] = {
        "channels": 2,
        "image_size": (4, 6),
        "patch_size": 1,
        "hidden_size": 24,
        "depth": 3,
        "heads": 3,
        "num_classes": 5,
        "projection_head": True,
    }
    model = SiT(**{**defaults, **settings})
    randomize(model, seed)
    return model.to(dtype)


def float64_draw(config: RunConfig, shape: tuple[int, int, int, int], seed: int = 0) -> Draw:
    """A draw in float64, with timesteps on a grid that float32 holds exactly."""
    draw = draw_views(config, shape, make_generator(seed, "draw"))
    return replace(
        draw,
        noise=draw.noise.double(),
        timesteps=(draw.timesteps.double() * 1024).round() / 1024,
        teacher_interval=(draw.teacher_interval.double() * 1024).round() / 1024,
    )


class AnalyticModel(nn.Module):
    """Stands in for a trained SiT: a velocity in closed form, and a record of every call."""

    def __init__(self, function: Callable[..., Tensor], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        # Samplers run a model in its own parameters' dtype, which they read here.
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Linear(1, 1, dtype=dtype)
        self.function = function
        self.calls: list[dict[str, Any]] = []

    def velocity(self, xt: Tensor, timesteps: Tensor, labels: Tensor, groups: Any = None) -> Tensor:
        """`function(x, t, labels)`, with t and labels broadcast against images."""
        self.calls.append({"x": xt, "t": timesteps, "labels": labels, "groups": groups})
        return self.function(xt, timesteps[:, None, None, None], labels[:, None, None, None])


def in_two_processes(*arguments: object) -> list[tuple[int, str]]:
    """Run a command in two processes, over gloo on the CPU: the exit code and stderr of each.

    Without torchrun, which would end one process when the other fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "selfalign.cli", *map(str, arguments)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=180)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]
