"""Where features are taken: blocks by number, by share of the depth, and modules by name."""

import pytest

from selfalign import UserError
from selfalign.backbones import find_tap


@pytest.mark.parametrize(
    ("block", "depth", "tap"),
    [
        (1, 6, 1),
        (6, 6, 6),
        (0.3, 6, 2),
        (0.7, 6, 4),
        (0.3, 12, 4),
        (0.7, 12, 8),
        (0.3, 24, 7),
        (0.7, 24, 17),
        (0.3, 28, 8),
        (0.7, 28, 20),
        (1.0, 28, 28),
        (0.01, 6, 1),  # never block 0
        ("blocks.3.attn", 6, "blocks.3.attn"),
    ],
)
def test_known_answers(block, depth, tap):
    found = find_tap(block, depth, "setting")
    assert found == tap and type(found) is type(tap)


@pytest.mark.parametrize(
    "block", [0, -1, 7, 0.0, -0.3, 1.5, 7.0, float("nan"), float("inf"), 10**400]
)
def test_blocks_that_are_not_there_are_refused(block):
    with pytest.raises(UserError) as error:
        find_tap(block, 6, "some.setting")
    assert str(error.value) == (
        f"some.setting is {block}: allowed are a block from 1 to 6, a share of the depth up to 1, "
        "or a module's name"
    )
