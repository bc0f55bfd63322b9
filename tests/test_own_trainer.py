"""docs/beyond.md: the method in somebody else's trainer is the method."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from support import randomize, resolved

from selfalign import draw_views, make_generator
from selfalign.objective import Objective
from selfalign.student import build_student
from selfalign.training.ema import EMA

PAGE = (Path(__file__).parent.parent / "docs" / "beyond.md").read_text()
LONGEST = 40


@pytest.fixture(scope="module")
def code() -> str:
    section = PAGE.partition("## In your own trainer")[2]
    match = re.search(r"```python\n(.*?)```", section, re.S)
    assert match is not None
    return match[1]


@pytest.fixture
def trainer(code):
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(code, "docs/beyond.md", "exec"), names)  # as the page has it
    return names


def test_is_short(code):
    lines = [line for line in code.splitlines() if line.strip()]
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    assert len(lines) - len(imports) <= LONGEST


def test_trains(trainer):
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randn(8, 16, 4, generator=generator)
    text, pooled = torch.zeros(8, 3, 24), torch.zeros(8, 20)
    before = [p.clone() for p in trainer["teacher"].parameters()]
    losses = [trainer["train_step"](x0, text, pooled).item() for _ in range(30)]
    assert sum(losses[-10:]) < sum(losses[:10])
    after = list(trainer["teacher"].parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_its_loss_is_the_packages_own(trainer, tmp_path):
    model = trainer["model"]
    randomize(model, 0, std=0.15)
    trainer["teacher"].load_state_dict(model.state_dict())
    model.save_pretrained(tmp_path)
    config = resolved(
        "sra-dts-as",
        {
            "model.backbone": "diffusers",
            "backbones.diffusers.folder": str(tmp_path),
            "model.size": "S/1",
            "terms.alignment.block": 1,
            "targets.ema.block": 3,
        },
        channels=4,
        image_size=(4, 4),
    )
    student = build_student(config)
    head = student.get_submodule("ap_head")
    trainer["head"][0].load_state_dict(head.linear1.state_dict())
    trainer["head"][2].load_state_dict(head.linear2.state_dict())

    generator = make_generator(0, "views")
    x0 = torch.randn(6, 4, 4, 4, generator=generator)
    text = torch.randn(6, 3, 24, generator=generator)
    pooled = torch.randn(6, 20, generator=generator)
    teacher = EMA(student, 0.9).model
    for each in (student, teacher):
        each._read = lambda condition, like: (text, pooled)
    draw = draw_views(config, x0, generator)
    draw = dataclasses.replace(draw, order=draw.order[:1].expand(6, -1))
    labels = torch.zeros(6, dtype=torch.int64)
    expected = Objective(config)(student, teacher, x0, labels, draw).total
    packed = config.grid.patchify(x0)
    noise = config.grid.patchify(draw.noise)
    found = trainer["loss_of"](
        packed, noise, draw.order[0], config.group_sizes, draw.timesteps,
        draw.teacher_interval, text, pooled,
    )  # fmt: skip
    assert torch.allclose(found, expected, atol=1e-5)
