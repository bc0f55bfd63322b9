"""The adaptive solver: exactness, tolerances, and agreement with the fixed steps."""

import math

import pytest
import torch
from support import AnalyticModel, small_model

from selfalign import UserError, make_generator
from selfalign.flow import PATHS
from selfalign.sampling.guidance import GuidedModel
from selfalign.sampling.settings import Guidance, SamplingConfig
from selfalign.sampling.solvers.dopri5 import Dopri5
from selfalign.sampling.solvers.heun import Heun

pytest.importorskip("torchdiffeq")
LABELS = torch.tensor([0, 3, 4])


def no_noise(step):
    raise AssertionError("an ODE has no noise")


@torch.no_grad()
def solved(solver, model, noise, steps=1, guidance=None):
    guided = GuidedModel(model, LABELS, torch.full_like(LABELS, 5), guidance or Guidance())
    return solver.solve(guided, noise.double(), steps, PATHS["linear"], no_noise)


def noise_of(shape=(3, 2, 4, 6)):
    return torch.randn(shape, generator=make_generator(0, "noise"))


@pytest.mark.parametrize("rate", [-2.0, 0.8, 3.0])
def test_a_linear_equation_is_solved_exactly(rate):
    noise = noise_of()
    out = solved(Dopri5(), AnalyticModel(lambda x, t, y: rate * x), noise)
    assert out.dtype == torch.float64
    exact = noise.double() * math.exp(-rate)
    assert ((out - exact).abs() / exact.abs().clamp(min=1)).max() < 1e-4


def test_an_equation_that_depends_on_time_is_solved_exactly():
    noise = noise_of()
    out = solved(Dopri5(), AnalyticModel(lambda x, t, y: torch.cos(9 * t).expand_as(x)), noise)
    assert torch.allclose(out, noise.double() - math.sin(9) / 9, atol=1e-4)


def test_smaller_tolerances_cost_more_and_err_less():
    noise, errors, calls = noise_of(), [], []
    for tolerance in (1e-2, 1e-4, 1e-6):
        model = AnalyticModel(lambda x, t, y: torch.sin(20 * t) * x)
        out = solved(Dopri5(rtol=tolerance, atol=tolerance), model, noise)
        exact = noise.double() * math.exp((math.cos(20) - 1) / 20)
        errors.append((out - exact).abs().max().item())
        calls.append(len(model.calls))
    assert errors[0] > errors[1] > errors[2]
    assert calls[0] < calls[1] < calls[2]


def test_the_number_of_steps_has_no_effect():
    model = AnalyticModel(lambda x, t, y: x * t)
    noise = noise_of()
    assert torch.equal(solved(Dopri5(), model, noise, 1), solved(Dopri5(), model, noise, 99))
    assert Dopri5().evaluations(50) is None


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(2.0)])
def test_agrees_with_many_steps_of_heun_on_a_transformer(guidance):
    model, noise = small_model(image_size=(2, 3)), noise_of((3, 2, 2, 3))
    steps = solved(Heun(), model, noise, 100, guidance)
    errors = []
    for tolerance in (1e-3, 1e-4, 1e-5):
        adaptive = solved(Dopri5(rtol=tolerance, atol=tolerance), model, noise, guidance=guidance)
        errors.append((adaptive - steps).abs().max().item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3


def test_is_chosen_with_its_settings_by_name():
    config = SamplingConfig("dopri5")
    assert config.make_solver() == Dopri5()
    finer = SamplingConfig("dopri5", solvers=config.solvers.override("dopri5", {"rtol": 1e-6}))
    assert finer.make_solver() == Dopri5(rtol=1e-6)
    assert "solver_settings" not in config.record()
    assert finer.record()["solver_settings"] == {"rtol": 1e-6, "atol": 1e-5}


@pytest.mark.parametrize("name", ["rtol", "atol"])
@pytest.mark.parametrize("value", [0.0, -1.0, 1e-9, 2.0, math.nan])
def test_tolerances_that_make_no_sense_are_refused(name, value):
    with pytest.raises(UserError, match=rf"solvers\.dopri5\.{name} is {value}: allowed is"):
        Dopri5(**{name: value})
