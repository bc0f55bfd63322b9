"""Weights on disk."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from selfalign.weights import write_safetensors


def test_what_cannot_be_written_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        write_safetensors(tmp_path / "missing" / "a.safetensors", {"a": torch.zeros(2)})


def test_facts_are_kept(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)}, {"made by": "us"})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"made by": "us"}
