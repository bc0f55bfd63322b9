"""What the README promises."""

import re
from pathlib import Path

import torch

from selfalign import EMA, Objective, RunConfig, SiT, draw_views, make_generator

README = Path(__file__).parents[1] / "README.md"


def test_the_example_trains() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    names: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), names)
    config, student, ema = names["config"], names["student"], names["ema"]
    assert isinstance(config, RunConfig)
    assert isinstance(student, SiT)
    assert isinstance(ema, EMA)
    # The output starts as zero, and its average follows it.
    weights, averages = (model.final_layer.linear.weight for model in (student, ema.model))
    assert weights.abs().max() > averages.abs().max() > 0
    images, labels = names["images"], names["labels"]
    assert isinstance(images, torch.Tensor)
    draw = draw_views(config, images.shape, make_generator(0, "views", 0))
    trained = Objective(config)(student, ema.model, images, labels, draw).denoising.mean()
    untrained = Objective(config)(SiT.from_config(config), ema.model, images, labels, draw)
    assert trained < untrained.denoising.mean()


def test_its_links_lead_somewhere() -> None:
    for document in (README, *(README.parent / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
