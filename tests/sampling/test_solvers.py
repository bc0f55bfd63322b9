"""The solvers on velocities in closed form: exactness, order of convergence, and the SDE's law."""

import itertools
import math

import pytest
import torch
from support import AnalyticModel

from selfalign import UserError
from selfalign.flow import PATHS
from selfalign.sampling.guidance import GuidedModel
from selfalign.sampling.settings import Guidance
from selfalign.sampling.solvers.euler import Euler
from selfalign.sampling.solvers.heun import Heun
from selfalign.sampling.solvers.sde import EulerMaruyama

SDE = EulerMaruyama()


def guided_by(function, batch=3):
    model = AnalyticModel(function)
    labels = torch.zeros(batch, dtype=torch.long)
    return GuidedModel(model, labels, torch.ones_like(labels), Guidance())


@torch.no_grad()
def solve_ode(guided, noise, steps, heun=False):
    """From float32 noise, as `generate` hands it on."""
    return (Heun() if heun else Euler()).solve(
        guided, noise.double(), steps, PATHS["linear"], no_noise
    )


@torch.no_grad()
def solve_sde(guided, noise, steps, path, step_noise, solver=SDE):
    return solver.solve(guided, noise.double(), steps, path, step_noise)


def no_noise(step):
    raise AssertionError("an ODE has no noise")


def noise_of(batch=3, size=(1, 2, 2)):
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(0))


def gaussian_velocity(path, mean, std):
    """E[dx/dt | x_t] of data N(mean, std²): what a perfectly trained model says."""

    def velocity(x, t, labels):
        alpha, sigma = path.alpha(t), path.sigma(t)
        d_alpha, d_sigma = path.alpha_derivative(t), path.sigma_derivative(t)
        variance = alpha**2 * std**2 + sigma**2
        covariance = d_alpha * alpha * std**2 + d_sigma * sigma
        return d_alpha * mean + covariance / variance * (x - alpha * mean)

    return velocity


@pytest.mark.parametrize("heun", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 7])
class TestExactness:
    def test_constant_velocity(self, steps, heun):
        noise = noise_of()
        out = solve_ode(guided_by(lambda x, t, y: torch.full_like(x, 0.7)), noise, steps, heun=heun)
        assert torch.allclose(out, noise.double() - 0.7)

    def test_straight_paths_to_one_image(self, steps, heun):
        # All data in one point: x_t = (1-t)·x0 + t·noise is straight, whatever the step.
        x0 = torch.full((3, 1, 2, 2), 0.3, dtype=torch.float64)
        out = solve_ode(guided_by(lambda x, t, y: (x - x0) / t), noise_of(), steps, heun=heun)
        assert torch.allclose(out, x0)


def test_euler_on_a_linear_equation_is_its_power():
    rate, steps = 0.8, 5
    noise = noise_of()
    out = solve_ode(guided_by(lambda x, t, y: rate * x), noise, steps)
    assert torch.allclose(out, noise.double() * (1 - rate / steps) ** steps)


def test_heun_on_a_linear_equation_corrects_every_step_but_the_last():
    rate, steps = 0.8, 5
    noise = noise_of()
    out = solve_ode(guided_by(lambda x, t, y: rate * x), noise, steps, heun=True)
    z = rate / steps
    assert torch.allclose(out, noise.double() * (1 - z + z**2 / 2) ** (steps - 1) * (1 - z))


@pytest.mark.parametrize("path", sorted(PATHS))
@pytest.mark.parametrize(("heun", "order"), [(False, 1), (True, 2)])
def test_order_of_convergence(path, heun, order):
    # The flow of a Gaussian is affine: x_0 = mean + std·x_1.
    mean, std = 0.5, 0.4
    noise = noise_of()
    errors = []
    for steps in (40, 80, 160):
        guided = guided_by(gaussian_velocity(PATHS[path], mean, std))
        out = solve_ode(guided, noise, steps, heun=heun)
        errors.append((out - (mean + std * noise.double())).abs().max().item())
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize(("heun", "calls"), [(False, 6), (True, 11)])
def test_evaluations_and_their_times(heun, calls):
    guided = guided_by(lambda x, t, y: torch.zeros_like(x))
    solve_ode(guided, noise_of(), 6, heun=heun)
    times = [call["t"][0].item() for call in guided.model.calls]
    assert len(times) == calls
    assert times[0] == 1
    assert min(times) == pytest.approx(1 / 6)  # nothing is asked at t = 0
    assert sorted(set(times), reverse=True) == pytest.approx([1, 5 / 6, 4 / 6, 0.5, 2 / 6, 1 / 6])


@pytest.mark.parametrize("heun", [False, True])
def test_samples_do_not_depend_on_their_batch(heun):
    function = gaussian_velocity(PATHS["linear"], 0.5, 0.4)
    noise = noise_of(batch=5)
    together = solve_ode(guided_by(function, 5), noise, 10, heun=heun)
    alone = [solve_ode(guided_by(function, 1), one[None], 10, heun=heun) for one in noise]
    assert torch.equal(together, torch.cat(alone))


def test_state_is_float64_while_the_model_runs_in_its_own_dtype():
    model = AnalyticModel(lambda x, t, y: x, dtype=torch.float32)
    labels = torch.zeros(3, dtype=torch.long)
    guided = GuidedModel(model, labels, torch.ones_like(labels), Guidance())
    out = solve_ode(guided, noise_of(), 3)
    assert out.dtype == torch.float64
    assert {call["x"].dtype for call in model.calls} == {torch.float32}
    assert {call["t"].dtype for call in model.calls} == {torch.float32}


@pytest.mark.parametrize("solver", [Euler(), Heun(), SDE])
def test_evaluations_are_foretold(solver):
    # The progress and cost of sampling are reckoned from it.
    guided = guided_by(lambda x, t, y: torch.zeros_like(x))
    with torch.no_grad():
        solver.solve(guided, noise_of().double(), 5, PATHS["linear"], lambda step: noise_of())
    foretold = solver.evaluations(5)
    assert len(foretold) == 5
    assert sum(count for _, count in foretold) == len(guided.model.calls)
    asked = [call["t"][0].item() for call in guided.model.calls]
    assert {t for t, _ in foretold} <= set(asked)


class TestSde:
    def solve(self, path, mean, std, steps, batch=20_000, seed=1):
        guided = guided_by(gaussian_velocity(path, mean, std), batch)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(batch, 1, 1, 1, generator=generator)
        return solve_sde(
            guided,
            noise,
            steps,
            path=path,
            step_noise=lambda step: torch.randn(batch, 1, 1, 1, generator=generator),
        )

    @pytest.mark.parametrize("path", sorted(PATHS))
    @pytest.mark.parametrize(("mean", "std"), [(0.5, 0.4), (-1.0, 1.0)])
    def test_reaches_the_gaussian_it_was_given(self, path, mean, std):
        out = self.solve(PATHS[path], mean, std, steps=300)
        # The last step takes the mean of x_0 given x_0.04, so that a known share of the variance
        # is missing; what remains is Monte Carlo error (4 standard errors) and the step's.
        alpha = PATHS[path].alpha(torch.tensor(SDE.last_step)).item()
        sigma = PATHS[path].sigma(torch.tensor(SDE.last_step)).item()
        kept = alpha**2 * std**2 / (alpha**2 * std**2 + sigma**2)
        count = len(out)
        assert abs(out.mean().item() - mean) < 4 * std / count**0.5 + 0.01
        expected = std * kept**0.5
        assert abs(out.std().item() - expected) < 4 * expected / (2 * count) ** 0.5 + 0.015 * std

    def test_a_normal_distribution_is_kept_from_start_to_end(self):
        # Data N(0, 1) on the cosine path: every x_t is N(0, 1), and the noise is needed for it.
        out = self.solve(PATHS["cosine"], 0.0, 1.0, steps=300)
        assert abs(out.std().item() - 1) < 0.03

    def test_every_step_but_the_last_gets_its_own_noise(self):
        guided = guided_by(lambda x, t, y: torch.zeros_like(x))
        asked = []

        def step_noise(step):
            asked.append(step)
            return torch.zeros(3, 1, 2, 2)

        solve_sde(guided, noise_of(), 5, path=PATHS["linear"], step_noise=step_noise)
        assert asked == [0, 1, 2, 3]

    def test_times(self):
        guided = guided_by(lambda x, t, y: torch.zeros_like(x))
        solve_sde(
            guided,
            noise_of(),
            5,
            path=PATHS["linear"],
            step_noise=lambda step: torch.zeros(3, 1, 2, 2),
        )
        times = [call["t"][0].item() for call in guided.model.calls]
        assert times == pytest.approx([1, 0.76, 0.52, 0.28, 0.04])

    def test_the_last_step_starts_where_it_is_told(self):
        guided = guided_by(lambda x, t, y: torch.zeros_like(x))
        solve_sde(
            guided,
            noise_of(),
            3,
            path=PATHS["linear"],
            step_noise=lambda step: torch.zeros(3, 1, 2, 2),
            solver=EulerMaruyama(last_step=0.2),
        )
        times = [call["t"][0].item() for call in guided.model.calls]
        assert times == pytest.approx([1, 0.6, 0.2])

    @pytest.mark.parametrize("last_step", [0.0, 1.0, -0.1, math.nan])
    def test_a_last_step_outside_the_interval_is_refused(self, last_step):
        with pytest.raises(UserError, match=rf"solvers\.sde\.last_step is {last_step}"):
            EulerMaruyama(last_step=last_step)

    def test_one_step_by_hand(self):
        # From t = 1, where the score is -x: x + (0 - 1)·(v + x) = -v.
        guided = guided_by(lambda x, t, y: torch.full_like(x, 0.3))
        out = solve_sde(
            guided, noise_of(), 1, path=PATHS["linear"], step_noise=lambda step: noise_of()
        )
        assert torch.allclose(out, torch.full_like(out, -0.3))

    def test_the_step_noise_has_variance_two_t_dt(self):
        moves = []
        for value in (0.0, 1.0):
            out = []
            guided = guided_by(lambda x, t, y, out=out: out.append(x) or torch.zeros_like(x))
            solve_sde(
                guided,
                noise_of(),
                5,
                path=PATHS["linear"],
                step_noise=lambda step, value=value: torch.full((3, 1, 2, 2), value),
            )
            moves.append(out[1])
        expected = (2 * 1 * 0.24) ** 0.5
        assert torch.allclose(moves[1] - moves[0], torch.full_like(moves[0], expected))
