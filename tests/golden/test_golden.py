"""Every golden file in this folder, through the checker."""

from pathlib import Path

import pytest
from golden.check import TOLERANCE, check

from selfalign import kernels

FILES = sorted(Path(__file__).parent.glob("*.safetensors"))


@pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_reproduces_the_released_implementation(
    file: Path, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:  # as on a GPU, and where there is no compiler
        monkeypatch.setattr(kernels, "available", lambda: False)
    errors = dict(check(file))
    assert errors
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}
