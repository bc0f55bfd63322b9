"""Which form a call takes: by machine, tensors, environment and wish."""

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from selfalign import ops
from selfalign.errors import UserError
from selfalign.ops import cpu
from selfalign.ops.cpu import build

needs_kernels = pytest.mark.skipif(not ops.compiled(), reason="no kernels on this machine")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Counts the calls of a compiled operation."""
    counted = Mock(side_effect=cpu.gelu)
    monkeypatch.setattr(cpu, "gelu", counted)
    return counted


@needs_kernels
class TestAuto:
    def test_takes_the_kernels_for_float32_on_a_cpu(self, kernel: Mock) -> None:
        ops.gelu(torch.randn(3, 32))
        ops.gelu(torch.nn.Parameter(torch.randn(3, 32)))
        assert kernel.call_count == 2

    @pytest.mark.parametrize(
        "x",
        [
            torch.randn(3, 32, dtype=torch.float64),
            torch.randn(3, 32, dtype=torch.bfloat16),
            torch.randn(3, 30),
            torch.randn(3, 32, device="meta"),
        ],
        ids=["float64", "bfloat16", "rows of no whole vectors", "meta"],
    )
    def test_takes_torch_for_other_tensors(self, kernel: Mock, x: torch.Tensor) -> None:
        assert ops.gelu(x).dtype == x.dtype
        kernel.assert_not_called()

    def test_takes_torch_under_autocast(self, kernel: Mock) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ops.gelu(torch.randn(3, 32))
        kernel.assert_not_called()

    def test_takes_torch_in_transforms(self, kernel: Mock) -> None:
        x = torch.randn(3, 32)
        torch.func.grad(lambda x: ops.gelu(x).sum())(x)
        torch.func.jvp(ops.gelu, (x,), (x,))
        torch.func.vmap(ops.gelu)(x)
        with forward_ad.dual_level():
            ops.gelu(forward_ad.make_dual(x, x))
        kernel.assert_not_called()

    def test_takes_torch_where_operations_are_counted(self, kernel: Mock) -> None:
        with FlopCounterMode(display=False) as counter:
            ops.gelu(torch.randn(3, 32))
            ops.linear(torch.randn(3, 32), torch.randn(16, 32), torch.randn(16))
        kernel.assert_not_called()
        assert counter.get_total_flops() == 2 * 3 * 32 * 16


@needs_kernels
def test_can_be_set_for_good_and_for_a_while(kernel: Mock) -> None:
    x = torch.randn(3, 32)
    with ops.use("torch"):
        ops.gelu(x)
        assert not ops.compiled()
        ops.use("cpu")
        ops.use("torch")
        ops.gelu(x)
    kernel.assert_not_called()
    with pytest.raises(ZeroDivisionError), ops.use("torch"):
        raise ZeroDivisionError
    assert ops.compiled()
    ops.gelu(x)
    kernel.assert_called_once()


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(UserError, match="^ops is 'gpu': allowed are auto, torch, cpu$"):
        ops.use("gpu")
    with pytest.raises(UserError, match="^--ops is 'CPU': allowed are auto, torch, cpu$"):
        ops.use("CPU", "--ops")


def test_can_be_set_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def start() -> str:
        """The choice of a process that starts now."""
        spec = importlib.util.spec_from_file_location("fresh", ops.choice.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module._chosen

    monkeypatch.delenv("SELFALIGN_OPS", raising=False)
    assert start() == "auto"
    monkeypatch.setenv("SELFALIGN_OPS", "")
    assert start() == "auto"
    monkeypatch.setenv("SELFALIGN_OPS", "torch")
    assert start() == "torch"
    monkeypatch.setenv("SELFALIGN_OPS", "tpu")
    with pytest.raises(UserError, match="^SELFALIGN_OPS is 'tpu': allowed are auto, torch, cpu$"):
        start()


def forget_the_build() -> None:
    for function in (build.lacking, build.library, build._try_once):
        function.cache_clear()


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache folder, as on a machine that has never built the kernels."""
    monkeypatch.setenv("SELFALIGN_CACHE", str(tmp_path))
    forget_the_build()
    yield tmp_path
    forget_the_build()


@needs_kernels
def test_compiles_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.library()
    (made,) = (cache / "kernels").iterdir()
    forget_the_build()
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    build.library()
    assert list((cache / "kernels").iterdir()) == [made]


@pytest.mark.parametrize("missing", ["compiler", "system", "processor"])
def test_a_machine_that_lacks_something_has_none(
    missing: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing == "compiler":
        monkeypatch.setattr(shutil, "which", lambda name: None)
    elif missing == "system":
        monkeypatch.setattr(sys, "platform", "darwin")
    else:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert not ops.compiled()
    assert ops.gelu(torch.randn(3, 32)).isfinite().all()
    with pytest.raises(UserError, match="^ops is 'cpu', and here are no CPU kernels: they are "):
        ops.use("cpu")
    assert ops.gelu(torch.randn(3, 32)).isfinite().all()


@needs_kernels
@pytest.mark.parametrize("fault", ["source", "cache"])
def test_a_build_that_fails_is_one_warning_or_an_error(
    fault: str, cache: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    if fault == "source":
        broken = cache / "broken.cpp"
        broken.write_text("this is not C++\n")
        monkeypatch.setattr(build, "SOURCE", broken)
    else:
        (cache / "kernels").write_text("a file where the folder should be")
    for _ in range(2):
        assert ops.gelu(torch.randn(3, 32)).isfinite().all()
    (warning,) = recwarn
    assert "the CPU kernels are not used, training is slower: " in str(warning.message)
    with pytest.raises(UserError, match="^SELFALIGN_OPS is 'cpu', and here are no CPU kernels: "):
        ops.use("cpu", "SELFALIGN_OPS")
