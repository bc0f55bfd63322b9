"""The step as accelerators will run it: on one device, without waiting, as one graph."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support import RECIPE_NAMES
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import selfalign
from selfalign import (
    Draw,
    Objective,
    ResolvedConfig,
    build_student,
    draw_views,
    make_generator,
    resolve,
)
from selfalign import recipe as make_recipe
from selfalign.backbones.sit.sizes import SIZES
from selfalign.benchmark.measure import StepBenchmark
from selfalign.network import Backbone
from selfalign.sections import TrainingConfig
from selfalign.training.accelerator import make_accelerator
from selfalign.training.step import compiles_blocks

MIXED = {"views.whole_image_fraction": 0.25, "views.mask_ratios": (0.2, 0.3, 0.5)}
DISPERSIVE = {"objective.terms": ("dispersive",)}
VARIANTS = [
    *((name, {}) for name in RECIPE_NAMES),
    ("sra-dts-as", MIXED),
    ("sra-dts-as", DISPERSIVE),
    *(("sra-dts-as", {"views.partition": name}) for name in ("blocks", "checkerboard", "stripes")),
]


def small(name: str, overrides: dict[str, Any]) -> ResolvedConfig:
    """A resolved tree with 16 tokens."""
    settings = {"model.size": "tiny/2", "training.batch_size": 8, "training.trackers": ()}
    return resolve(make_recipe(name, {**settings, **overrides}), 4, (8, 8), 10)


class Watch(TorchDispatchMode):
    """Fails where an operation has to wait for the device, or copies from it."""

    WAITING = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
        torch.ops.aten.equal.default,
        torch.ops.aten._unique2.default,
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        assert func not in self.WAITING, f"{func} waits for the device"
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
            assert not any(x.dtype == torch.bool for x in tensors[1:]), "boolean indexing waits"
        result = func(*args, **(kwargs or {}))
        if torch.is_tensor(result) and tensors:
            moved = result.device.type == "cpu" and any(x.device.type != "cpu" for x in tensors)
            assert not moved, f"{func} copies from the device and waits"
        return result


class WatchMethods(TorchFunctionMode):
    """Fails at the methods that copy to Python, which on a CPU dispatch to nothing."""

    WAITING = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        assert name not in self.WAITING, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def model_on_fake_gpu(config: ResolvedConfig) -> Backbone:
    """A model whose tensors say that they are on a GPU. Call under FakeTensorMode."""
    with unset_fake_temporarily():
        model = build_student(config)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, device="cuda")
                module._parameters[name] = torch.nn.Parameter(empty)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, device="cuda")
    return model


@pytest.mark.parametrize(("name", "overrides"), VARIANTS)
def test_nothing_in_a_step_waits(name: str, overrides: dict[str, Any]) -> None:
    benchmark = StepBenchmark(small(name, overrides))
    benchmark()
    with Watch(), WatchMethods():
        benchmark()


def test_the_watch_sees_what_it_should() -> None:
    x = torch.arange(4.0)
    methods = (lambda: x.sum().item(), lambda: x.tolist(), lambda: x.cpu(), lambda: x.nonzero())
    for wait in (*methods, lambda: x[x > 1], lambda: bool(x[0]), lambda: float(x.sum())):
        with Watch(), WatchMethods(), pytest.raises(AssertionError, match="waits"):
            wait()


@pytest.mark.parametrize(("name", "overrides"), VARIANTS)
def test_the_objective_stays_on_its_device(name: str, overrides: dict[str, Any]) -> None:
    config = small(name, overrides)
    with FakeTensorMode(), Watch():
        student, teacher = (model_on_fake_gpu(config) for _ in range(2))
        shape = (8, 4, 8, 8)
        groups = config.num_groups
        draw = Draw(
            noise=torch.empty(shape, device="cuda"),
            timesteps=torch.empty(8, groups, device="cuda"),
            order=torch.empty(8, 16, dtype=torch.int64, device="cuda") if groups > 1 else None,
            teacher_interval=torch.empty(8, groups, device="cuda"),
            label_dropout=torch.empty(8, dtype=torch.bool, device="cuda"),
        )
        x0 = torch.empty(shape, device="cuda")
        labels = torch.empty(8, dtype=torch.int64, device="cuda")
        losses = Objective(config)(student, teacher, x0, labels, draw)
        assert losses.total.device.type == "cuda"
        assert {term.device.type for term in losses.terms.values()} == {"cuda"}
        assert losses.terms.keys() == config.used_terms().keys()
        velocity = student.velocity(x0, torch.empty(8, device="cuda"), labels)
        assert velocity.device.type == "cuda"
        assert velocity.shape == shape


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("sra-dts-as", MIXED),
        pytest.param("self-flow", {}, marks=pytest.mark.slow),
        pytest.param("sra", DISPERSIVE, marks=pytest.mark.slow),
    ],
)
def test_compiles_to_one_graph_once(name: str, overrides: dict[str, Any], backend: str) -> None:
    config = small(name, overrides)
    student, teacher = build_student(config), build_student(config).requires_grad_(False)
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    objective = Objective(config)
    torch._dynamo.reset()
    compiled = torch.compile(objective, fullgraph=True, dynamic=False, backend=backend)
    x0, labels = torch.randn(8, 4, 8, 8), torch.randint(10, (8,))
    for step in range(20):
        draw = draw_views(config, x0.shape, make_generator(0, "views", step))
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            losses = compiled(student, teacher, x0, labels, draw)
            losses.total.backward()
        if step in (0, 19):
            gradients = [p.grad.clone() for p in student.parameters() if p.grad is not None]
            student.zero_grad()
            expected = objective(student, teacher, x0, labels, draw)
            expected.total.backward()
            assert torch.allclose(losses.total, expected.total, rtol=1e-5)
            own = [p.grad for p in student.parameters() if p.grad is not None]
            for a, b in zip(gradients, own, strict=True):
                assert torch.allclose(a, b, atol=2e-6)
        student.zero_grad()


def test_blocks_are_compiled_once_for_any_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for the student's blocks, one for the teacher's."""
    graphs, losses = {}, {}
    for depth in (3, 6):
        monkeypatch.setitem(SIZES, "tiny", dataclasses.replace(SIZES["tiny"], depth=depth))
        for compiled in (False, True):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            config = small(
                "sra-dts-as",
                {"training.compile": compiled, "training.compile_region": "blocks"},
            )
            benchmark = StepBenchmark(config)
            for model in (benchmark.take_step.student, benchmark.ema.model):
                for block in model.blocks if compiled else ():
                    block.compile(dynamic=False, fullgraph=True, backend="aot_eager")
            benchmark()
            found = benchmark.take_step.forward(1, benchmark.batch)
            losses[depth, compiled] = float(found.total.detach())
            graphs[depth] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert losses[depth, True] == pytest.approx(losses[depth, False], rel=1e-5)
    assert graphs == {3: 2, 6: 2}


@pytest.mark.parametrize(
    ("region", "depth", "sharded", "blocks"),
    [
        ("auto", 12, False, False),
        ("auto", 13, False, True),
        ("auto", 2, True, True),
        ("blocks", 2, False, True),
        ("objective", 28, False, False),
    ],
)
def test_what_is_compiled_as_one(region: Any, depth: int, sharded: bool, blocks: bool) -> None:
    assert compiles_blocks(TrainingConfig(compile_region=region), depth, sharded) is blocks


def test_weights_that_change_do_not_compile_again() -> None:
    decay = {"decay": "linear", "decay_steps": 8, "stop_step": 6}
    config = small("sra", {f"terms.alignment.{name}": value for name, value in decay.items()})
    student, teacher = build_student(config), build_student(config).requires_grad_(False)
    objective = Objective(config)

    @torch.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    def weighted(*arguments: Any) -> Any:
        return objective.losses(objective.predict(*arguments), arguments[-1])

    torch._dynamo.reset()
    x0, labels = torch.randn(8, 4, 8, 8), torch.randint(10, (8,))
    for step in range(8):
        draw = draw_views(config, x0.shape, make_generator(0, "views", step))
        weights = objective.weights(step, x0)
        assert weights.keys() == ({"denoising", "alignment"} if step < 6 else {"denoising"})
        # One graph, and another from the step on that the term stops at.
        with torch._dynamo.config.patch(error_on_recompile=step not in (0, 6)):
            losses = weighted(student, teacher, x0, labels, draw, weights)
        expected = objective(student, teacher, x0, labels, draw, step)
        assert torch.allclose(losses.total, expected.total, rtol=1e-5)


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    config = make_recipe("sit", {"training.batch_size": 8, "training.gradient_accumulation": 4})
    assert make_accelerator(config.training, tmp_path).num_processes == 1


def test_the_method_asks_no_device() -> None:
    """Devices are the accelerator's and the operations' matter, not that of models, views and losses."""
    package = Path(selfalign.__file__).parent
    names = ("objective", "views", "flow", "tokens", "network", "heads", "embedders", "student")
    files = [package / f"{name}.py" for name in names]
    for folder in (
        *("terms", "targets", "partitions", "schedules", "conditions", "backbones", "projectors"),
    ):
        files += (package / folder).rglob("*.py")
    asked = re.compile(r"\.cuda\b|device\.type|is_cuda|is_cpu|autocast\(|bfloat16|torch\.mps")
    found = [f"{path.name}: {line}" for path in files for line in path.read_text().splitlines()]
    assert len(files) > 30
    assert [line for line in found if asked.search(line)] == []
