"""Weights on disk."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from selfalign import UserError
from selfalign.weights import read_safetensors, write_safetensors


def test_what_cannot_be_written_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        write_safetensors(tmp_path / "missing" / "a.safetensors", {"a": torch.zeros(2)})


def test_facts_are_kept(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)}, {"made by": "us"})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"made by": "us"}


def test_numbers_that_nothing_computes_with_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(2), "b": torch.zeros(2).to(torch.float8_e5m2)}, path)
    with pytest.raises(UserError, match=r"weights\.safetensors cannot be used: b .float8_e5m2. is"):
        read_safetensors(path)
