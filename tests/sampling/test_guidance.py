"""Guidance: its formula, where it applies, what it costs, and token groups in sampling."""

import pytest
import torch
from support import AnalyticModel, randomize, resolved, small_model

from selfalign import TokenGroups, UserError, make_generator
from selfalign.flow import PATHS
from selfalign.network import EARLY_VELOCITY
from selfalign.sampling.generate import check_sampling
from selfalign.sampling.guidance import GuidedModel
from selfalign.sampling.settings import Guidance, SamplingConfig
from selfalign.sampling.solvers.euler import Euler
from selfalign.sampling.solvers.heun import Heun
from selfalign.sampling.solvers.sde import EulerMaruyama
from selfalign.tokens import one_group

NULL = 5
LABELS = torch.tensor([0, 3, 4])
NULLS = torch.full_like(LABELS, NULL)


def counting(guidance, groups=None):
    """A guided model whose velocity is its label, and which records every call."""
    model = AnalyticModel(lambda x, t, labels: labels.to(x).expand_as(x))
    return GuidedModel(model, LABELS, NULLS, guidance, groups), model.calls


def noise_of(shape=(3, 2, 4, 6)):
    return torch.randn(shape, generator=make_generator(0, "noise"))


EULER = Euler()


@torch.no_grad()
def solved(guided, noise, steps, solver=EULER):
    return solver.solve(
        guided, noise.double(), steps, PATHS["linear"], lambda step: torch.zeros_like(noise)
    )


def rows(calls):
    return [len(call["x"]) for call in calls]


class TestRefusals:
    @pytest.mark.parametrize("scale", [0.9, 0.0, -1.0, float("nan"), float("inf")])
    def test_scales(self, scale):
        with pytest.raises(UserError, match=rf"guidance scale is {scale}: allowed is 1"):
            Guidance(scale)

    @pytest.mark.parametrize(
        "interval", [(0.6, 0.4), (-0.1, 1), (0, 1.1), (float("nan"), 1), (0, float("nan"))]
    )
    def test_intervals(self, interval):
        with pytest.raises(UserError, match="0 <= low <= high <= 1"):
            Guidance(2.0, interval)


class TestFormula:
    @pytest.mark.parametrize("scale", [1.5, 4.0])
    def test_extrapolates_from_the_unlabelled_velocity(self, scale):
        guided, _ = counting(Guidance(scale))
        x = noise_of().double()
        velocity = guided.at(0, 1.0)(x, 1.0)
        expected = NULL + scale * (LABELS - NULL)
        assert torch.allclose(velocity, expected[:, None, None, None].double().expand_as(x))

    def test_is_the_models_own_two_velocities(self):
        model = small_model()
        assert model.null_label == NULL
        guided = GuidedModel(model, LABELS, NULLS, Guidance(2.5))
        x, t = noise_of().double(), torch.full((3,), 0.5, dtype=torch.float64)
        with torch.no_grad():
            null = model.velocity(x, t, NULLS)
            label = model.velocity(x, t, LABELS)
            assert torch.allclose(guided.at(0, 0.5)(x, 0.5), null + 2.5 * (label - null))


class TestCost:
    def test_a_scale_of_one_doubles_nothing(self):
        guided, calls = counting(Guidance(1.0))
        solved(guided, noise_of(), 4, Heun())
        assert rows(calls) == [3] * 7
        assert all(torch.equal(call["labels"], LABELS) for call in calls)

    def test_only_steps_that_start_inside_the_interval_are_doubled(self):
        guided, calls = counting(Guidance(2.0, (0.25, 0.5)))
        solved(guided, noise_of(), 8)  # t = 1, 7/8, …, 1/8
        assert rows(calls) == [3, 3, 3, 3, 6, 6, 6, 3]  # both ends belong to it
        inside = calls[4]
        assert torch.equal(inside["labels"], torch.cat([LABELS, NULLS]))
        assert torch.equal(inside["x"][:3], inside["x"][3:])
        assert torch.equal(calls[0]["labels"], LABELS)

    def test_heuns_second_evaluation_follows_the_first_ones_decision(self):
        guided, calls = counting(Guidance(2.0, (0.3, 0.6)))
        solved(guided, noise_of(), 4, Heun())
        # step 1 → 0.75: out, out; 0.75 → 0.5: out, though its end lies inside; 0.5 → 0.25: in,
        # though its end lies outside; 0.25 → 0: out, and not corrected.
        assert rows(calls) == [3, 3, 3, 3, 6, 6, 3]
        times = [call["t"][0].item() for call in calls]
        assert times == [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]

    def test_the_sde_follows_the_interval_too(self):
        guided, calls = counting(Guidance(2.0, (0.3, 0.6)))
        solved(guided, noise_of(), 5, EulerMaruyama())
        assert rows(calls) == [3, 3, 6, 3, 3]  # t = 1, .76, .52, .28, .04

    def test_an_interval_without_steps_is_no_guidance(self):
        model = small_model()
        outs = [
            solved(GuidedModel(model, LABELS, NULLS, guidance), noise_of(), 4)
            for guidance in (Guidance(), Guidance(9.0, (0.8, 0.9)), Guidance(9.0))
        ]
        assert torch.equal(outs[0], outs[1])
        assert not torch.allclose(outs[0], outs[2])


class TestTokenGroups:
    def orders(self, count):
        generator = make_generator(0, "orders")
        return [torch.rand(3, 24, generator=generator).argsort(dim=1) for _ in range(count)]

    def solve(self, groups, guidance=None, model=None):
        guided = GuidedModel(model or small_model(), LABELS, NULLS, guidance or Guidance(), groups)
        return solved(guided, noise_of(), 4)

    def test_full_attention_groups_change_nothing(self):
        order = self.orders(1)[0]
        grouped = self.solve(lambda step: TokenGroups(order, (6, 18)))
        assert torch.allclose(grouped, self.solve(None))

    def test_fixed_and_per_step_groups_differ(self):
        orders = self.orders(4)
        fixed = self.solve(lambda step: TokenGroups(orders[0], (6, 18), separate=True))
        changing = self.solve(lambda step: TokenGroups(orders[step], (6, 18), separate=True))
        assert not torch.allclose(fixed, changing)
        assert not torch.allclose(fixed, self.solve(None))

    def test_each_step_asks_for_its_own(self):
        asked = []
        order = self.orders(1)[0]

        def groups(step):
            asked.append(step)
            return TokenGroups(order, (6, 18), separate=True)

        self.solve(groups)
        assert asked == [0, 1, 2, 3]

    @pytest.mark.parametrize("scale", [1.0, 2.0])
    def test_separated_groups_stay_apart_through_the_whole_solver(self, scale):
        order = self.orders(1)[0]
        groups = TokenGroups(order, (6, 18), separate=True)
        guided = GuidedModel(small_model(), LABELS, NULLS, Guidance(scale), lambda step: groups)
        noise = noise_of().double()
        changed = noise.clone().flatten(2)
        changed.scatter_add_(2, order[:, None, :6].expand(-1, 2, -1), torch.ones(3, 2, 6).double())
        before = solved(guided, noise, 3).flatten(2)
        after = solved(guided, changed.reshape(noise.shape), 3).flatten(2)
        moved = groups.sort((after != before).transpose(1, 2))
        assert moved[:, :6].all()
        assert not moved[:, 6:].any()

    def test_the_unlabelled_half_has_the_same_groups(self):
        order = self.orders(1)[0]
        groups = TokenGroups(order, (6, 18), separate=True)
        model = small_model()
        guided = GuidedModel(model, LABELS, NULLS, Guidance(3.0), lambda step: groups)
        x, t = noise_of().double(), torch.full((3,), 0.5, dtype=torch.float64)
        with torch.no_grad():
            null = model.velocity(x, t, NULLS, groups)
            label = model.velocity(x, t, LABELS, groups)
            assert torch.allclose(guided.at(0, 0.5)(x, 0.5), null + 3 * (label - null))


class TestInternalGuidance:
    def model(self):
        model = small_model(head_after=None)
        config = resolved("sit", {"objective.terms": ("early-velocity",)})
        term = config.terms["early-velocity"]
        for name, (_, head) in term.heads(config, model).items():
            model.add_head(name, head.double(), 2)
        randomize(model.get_submodule(EARLY_VELOCITY), 3)
        return model

    @pytest.mark.parametrize("scale", [1.0, 1.4, 3.0])
    def test_extrapolates_from_the_early_velocity(self, scale):
        model, x = self.model(), noise_of().double()
        t = torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64)
        with torch.no_grad():
            groups = one_group(24)
            output = model(
                model.grid.patchify(x), t[:, None], LABELS, groups, heads=(EARLY_VELOCITY,)
            )
            early = output.projected[EARLY_VELOCITY]
            expected = model.grid.unpatchify(early + scale * (output.velocity - early))
            found = model.velocity(x, t, LABELS, internal_guidance=scale)
        torch.testing.assert_close(found, expected)

    def test_applies_within_its_interval_with_a_label_and_without(self):
        model = AnalyticModel(lambda x, t, labels: labels.to(x).expand_as(x))
        asked = []
        plain = model.velocity

        def velocity(xt, timesteps, labels, groups=None, internal_guidance=1.0):
            asked.append((round(timesteps[0].item(), 2), len(xt), internal_guidance))
            return plain(xt, timesteps, labels, groups)

        model.velocity = velocity
        guided = GuidedModel(
            model, LABELS, NULLS, Guidance(2.0, (0.5, 1.0)), internal=Guidance(1.4, (0.25, 0.75))
        )
        solved(guided, noise_of(), 4)
        assert asked == [(1.0, 6, 1.0), (0.75, 6, 1.4), (0.5, 6, 1.4), (0.25, 3, 1.4)]

    def test_needs_a_second_velocity(self):
        sampling = SamplingConfig(internal_guidance_scale=1.4)
        with pytest.raises(UserError, match="trained without the term early-velocity"):
            check_sampling(small_model(), sampling, 0.1, None)
        check_sampling(self.model(), sampling, 0.1, None)
        with pytest.raises(UserError, match=r"internal guidance scale is 0\.5"):
            SamplingConfig(internal_guidance_scale=0.5)
