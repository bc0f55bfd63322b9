"""Files of JSON become checked values, or one line that names file and field."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfalign.errors import UserError
from selfalign.records import read_bytes, read_json, write_json
from selfalign.training.checkpoint import CheckpointState


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Stands for all of them."""

    name: str
    sizes: tuple[int, ...]
    more: dict[str, float] = {}


def test_a_record_comes_back(tmp_path: Path) -> None:
    record = Record("\udcff $x$ \n 名", (1, 2), {"a": 1.5})
    write_json(tmp_path / "a.json", record)
    assert read_json(tmp_path / "a.json", Record) == record
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b'{"name": NaN, "sizes": []}', "NaN is not allowed"),
        (b"[" * 200_000, "nested too deep"),
        (b"1" * 5000, "no JSON"),
        (b"null", "Expected `object`, got `null`"),
        (b'{"name": "a"}', "missing required field `sizes`"),
        (b'{"name": "a", "sizes": [], "extra": 1}', "unknown field `extra`"),
        (b'{"name": "a", "sizes": [1, "2"]}', r"sizes\[1\]: Expected `int`, got `str`"),
        (b'{"name": ["a"], "sizes": []}', "name: Expected `str`, got `array`"),
        (b'{"name": "a", "sizes": [], "more": {"\\udcff": "x"}}', "cannot be read"),
    ],
)
def test_anything_else_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as refusal:
        read_json(path, Record)
    assert str(refusal.value).startswith(f"{path} cannot be read: ")
    assert "\n" not in str(refusal.value)


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "large").write_bytes(b"x" * 11)
    for name in ("", "pipe", "loop", "large", "missing", "x/\0"):
        with pytest.raises(UserError, match="cannot be read: "):
            read_bytes(tmp_path / name, limit=10)


JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(max_examples=200, deadline=None)
@given(content=st.binary() | JSON.map(lambda values: json.dumps(values).encode()))
def test_no_content_is_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.json"
    path.write_bytes(content)
    for kind in (Record, CheckpointState, dict[str, Any]):
        with contextlib.suppress(UserError):
            read_json(path, kind)
