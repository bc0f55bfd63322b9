"""Steps that are not finite move nothing; more in a row than are allowed stop everything after them."""

import pytest
import torch

from selfalign.sections import TrainingConfig
from selfalign.training.finite import FiniteSteps


@pytest.mark.parametrize("fused", [True, False])
def test_nothing_moves_where_a_value_is_not_finite(fused: bool) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], fused=fused)
    steps = FiniteSteps(TrainingConfig(on_nonfinite="skip:2"), optimizer, parameter.device)

    def take(value: float) -> bool:
        parameter.grad = torch.full((3,), value)
        before = parameter.detach().clone(), str(optimizer.state_dict()["state"])
        steps.step(steps.judge([torch.tensor(1.0), torch.tensor(value)]), optimizer)
        return not (
            torch.equal(before[0], parameter) and before[1] == str(optimizer.state_dict()["state"])
        )

    nan, inf = float("nan"), float("inf")
    moved = [take(value) for value in (1.0, nan, -inf, 1.0, nan, inf)]
    assert moved == [True, False, False, True, False, False]
    assert steps.broken_since(6) is None and steps.skipped() == 4
    assert not take(nan)  # the third in a row
    assert not take(1.0)  # and now nothing moves, until somebody looks
    assert not take(1.0)
    assert steps.broken_since(9) == 5
    assert steps.skipped() == 5
