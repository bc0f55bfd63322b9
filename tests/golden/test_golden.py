"""Every golden file in this folder, through the checker."""

from pathlib import Path

import pytest
from golden.check import TOLERANCE, check

from selfalign import ops

FILES = sorted(Path(__file__).parent.glob("*.safetensors"))


@pytest.mark.parametrize("choice", ["auto", "torch"])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_reproduces_the_released_implementation(file: Path, choice: str) -> None:
    with ops.use(choice):
        errors = dict(check(file))
    assert errors
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}
