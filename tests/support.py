"""Small models, configs and draws that the tests share, and commands in two processes."""

import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from selfalign import Draw, ResolvedConfig, RunConfig, SiT, draw_views, recipe, resolve
from selfalign.backbones import find_tap
from selfalign.heads import ProjectionHead
from selfalign.network import Tap
from selfalign.randomness import make_generator
from selfalign.training.checkpoint import FILES, latest_checkpoint
from selfalign.training.tracking import read_metrics
from selfalign.views import View, Views

RECIPE_NAMES = ("sit", "sra", "self-flow", "sra-dts", "sra-as", "sra-dts-as")
on_cpus = pytest.mark.skipif(
    torch.accelerator.is_available(),
    reason="compares with what a CPU draws or rounds, or forks, which CUDA does not survive",
)
"""Marks what cannot hold on another device; everything else runs on the one there is."""
GROUPED = ("self-flow", "sra-dts", "sra-as", "sra-dts-as")
"""The recipes with more than one token group."""


def resolved(
    name: str,
    overrides: Mapping[str, Any] | None = None,
    *,
    channels: int = 1,
    image_size: tuple[int, ...] = (8, 8),
    num_classes: int = 5,
) -> ResolvedConfig:
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
    }
    head = settings.pop("head_after", 2)
    model = SiT(**{**defaults, **settings})
    if head is not None:
        model.add_head("ap_head", ProjectionHead(model.hidden_size), head)
    randomize(model, seed)
    return model.to(dtype)


def float64_draw(config: ResolvedConfig, shape: tuple[int, ...], seed: int = 0) -> Draw:
    """A draw in float64, with timesteps on a grid that float32 holds exactly."""
    draw = draw_views(config, shape, make_generator(seed, "draw"))
    return replace(
        draw,
        noise=draw.noise.double(),
        timesteps=(draw.timesteps.double() * 1024).round() / 1024,
        teacher_interval=(draw.teacher_interval.double() * 1024).round() / 1024,
    )


def draw_of(config: ResolvedConfig, batch: int = 8, seed: int = 0) -> Draw:
    """A step's draw for a batch of the tree's shape."""
    shape = (batch, config.model.channels, *config.model.image_size)
    return draw_views(config, shape, make_generator(seed, "views"))


def clean_images(config: ResolvedConfig, batch: int = 8, seed: int = 1) -> Tensor:
    """Random samples of the tree's shape."""
    shape = (batch, config.model.channels, *config.model.image_size)
    return torch.randn(shape, generator=make_generator(seed, "images"))


def timestep_of_token(view: View) -> Tensor:
    """(B, N) timesteps in image order."""
    return view.groups.restore(view.groups.broadcast(view.timesteps[..., None]))[..., 0]


def blocks_of(config: RunConfig) -> tuple[Tap, ...]:
    """The blocks that student and teacher compare."""
    parts = config.terms["alignment"], config.targets["ema"]
    return tuple(find_tap(part.block, config.depth, part.dotted("block")) for part in parts)


def teacher_view(config: ResolvedConfig, views: Views, draw: Draw) -> View:
    """What the EMA teacher of a tree sees of a batch."""
    view: View = config.targets["ema"].view(views, draw)
    return view


def assert_same_state(first: Path, second: Path) -> None:
    """Weights, EMA and optimizer of two runs' last checkpoints are bitwise the same."""
    for file in FILES[:3]:
        a, b = (load_file(latest_checkpoint(f / "checkpoints") / file) for f in (first, second))
        assert a.keys() == b.keys()
        assert [name for name in a if not torch.equal(a[name], b[name])] == []


def logged_losses(folder: Path) -> list[dict[str, float]]:
    """The logged losses, without what depends on the clock."""
    lines = read_metrics(folder)
    return [{k: v for k, v in line.items() if k != "samples_per_second"} for line in lines]


def assert_same_run(first: Path, second: Path) -> None:
    """State and metrics of two runs are the same, each step logged once."""
    assert_same_state(first, second)
    assert logged_losses(first) == logged_losses(second)


class AnalyticModel(nn.Module):
    """Stands in for a trained SiT: a velocity in closed form, and a record of every call."""

    def __init__(self, function: Callable[..., Tensor], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.dtype = dtype  # samplers run a model in its own
        self.function = function
        self.calls: list[dict[str, Any]] = []

    def velocity(self, xt: Tensor, timesteps: Tensor, labels: Tensor, groups: Any = None) -> Tensor:
        """`function(x, t, labels)`, with t and labels broadcast against images."""
        self.calls.append({"x": xt, "t": timesteps, "labels": labels, "groups": groups})
        return self.function(xt, timesteps[:, None, None, None], labels[:, None, None, None])


def in_two_processes(
    *arguments: object, largest_file: int = resource.RLIM_INFINITY
) -> list[tuple[int, str]]:
    """Run a command in two processes, over gloo on the CPU: the exit code and stderr of each.

    Without torchrun, which would end one process when the other fails.

    Args:
        arguments: of the command.
        largest_file: bytes of the largest file that may be written, as if the disk were full then.
    """
    sizes = (largest_file, resource.RLIM_INFINITY)
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
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, sizes),
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=180)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def torchrun(processes: int) -> list[str]:
    """The beginning of a command that torchrun starts in several processes on this machine."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    return [sys.executable, *launch]


def run_in_processes(processes: int, *words: str, timeout: int = 600) -> None:
    """Run a file of tests with arguments in several processes without a GPU; none may fail."""
    places = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*torchrun(processes), *words],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": places},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
