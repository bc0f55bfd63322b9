"""Optimizers: which weights they move, how far, and that their state goes on where it was."""

import copy

import pytest
import torch
from support import randomize, resolved

from selfalign import UserError, build_student, parts
from selfalign.training.optimizers.muon import OUTER
from selfalign.training.step import learning_rate, make_optimizer

NAMES = ("adamw", "muon")


def setup(name, changes=None):
    """A tree, a student with random weights, and its optimizer."""
    settings = {"training.optimizer": name, "training.learning_rate": 1e-3, **(changes or {})}
    config = resolved("sra-dts-as", settings)
    student = build_student(config)
    randomize(student)
    return config, student, make_optimizer(config, student)


def give_gradients(student, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in student.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def take_steps(student, optimizer, steps):
    for step in steps:
        give_gradients(student, step)
        optimizer.step()


def weights_of(student):
    return {name: parameter.detach().clone() for name, parameter in student.named_parameters()}


def test_these_are_all():
    assert parts.names("optimizer") == NAMES


@pytest.mark.parametrize("name", NAMES)
class TestEvery:
    def test_holds_every_weight_once(self, name):
        _, student, optimizer = setup(name)
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(held) == sorted(map(id, student.parameters()))

    def test_moves_every_weight(self, name):
        _, student, optimizer = setup(name)
        before = weights_of(student)
        take_steps(student, optimizer, [0])
        for weight, parameter in student.named_parameters():
            assert not torch.equal(parameter, before[weight]), weight
            assert parameter.isfinite().all(), weight

    def test_a_learning_rate_set_on_its_groups_reaches_all_weights(self, name):
        _, student, optimizer = setup(name)
        before = weights_of(student)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        take_steps(student, optimizer, [0])
        for weight, parameter in student.named_parameters():
            assert torch.equal(parameter, before[weight]), weight

    def test_the_schedules_learning_rate_scales_every_update(self, name):
        moved = []
        for rate in (1e-3, 5e-4):
            config, student, optimizer = setup(name, {"training.warmup_steps": 2})
            assert learning_rate(config.training, 0) == 5e-4
            before = weights_of(student)
            for group in optimizer.param_groups:
                group["lr"] = rate
            take_steps(student, optimizer, [0])
            moved.append({n: p - before[n] for n, p in student.named_parameters()})
        for weight, change in moved[0].items():
            assert torch.allclose(change, 2 * moved[1][weight], rtol=1e-2, atol=1e-6), weight

    def test_a_state_that_is_read_back_goes_on_bitwise(self, name):
        _, student, optimizer = setup(name)
        take_steps(student, optimizer, range(3))
        state = copy.deepcopy(optimizer.state_dict())
        _, other, again = setup(name)
        other.load_state_dict(student.state_dict())
        again.load_state_dict(state)
        take_steps(student, optimizer, range(3, 6))
        take_steps(other, again, range(3, 6))
        for (weight, a), b in zip(student.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b), weight

    def test_without_its_state_it_would_not(self, name):
        _, student, optimizer = setup(name)
        take_steps(student, optimizer, range(3))
        _, other, fresh = setup(name)
        other.load_state_dict(student.state_dict())
        take_steps(student, optimizer, [3])
        take_steps(other, fresh, [3])
        assert not all(map(torch.equal, student.parameters(), other.parameters()))

    def test_its_state_is_a_tensor_per_weight(self, name):
        # So that checkpoints can hold it.
        _, student, optimizer = setup(name)
        take_steps(student, optimizer, [0])
        for parameter in student.parameters():
            state = optimizer.state[parameter]
            assert state
            assert all(torch.is_tensor(value) for value in state.values())

    def test_weight_decay_shrinks_what_has_no_gradient(self, name):
        decay = {"training.weight_decay": 0.5}
        _, student, optimizer = setup(name, decay)
        before = weights_of(student)
        for parameter in student.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for weight, parameter in student.named_parameters():
            assert torch.allclose(parameter, before[weight] * (1 - 1e-3 * 0.5), rtol=1e-5), weight


class TestMuon:
    def kinds(self, optimizer):
        """The weights of each optimizer by the id of the weight."""
        muon, adamw = optimizer.optimizers
        assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
        return [
            {id(p) for group in each.param_groups for p in group["params"]}
            for each in (muon, adamw)
        ]

    def test_takes_the_matrices_of_blocks_and_heads_and_leaves_the_rest(self):
        _, student, optimizer = setup("muon", {"model.qk_norm": True})
        muon, adamw = self.kinds(optimizer)
        for name, parameter in student.named_parameters():
            inner = name.startswith(("blocks.", "ap_head."))
            matrix = name.endswith(".weight") and "_norm" not in name
            assert (id(parameter) in muon) == (inner and matrix), name
            assert (id(parameter) in adamw) != (id(parameter) in muon), name
        assert all(
            any(n.startswith(outer) for n, _ in student.named_parameters()) for outer in OUTER
        )

    def test_a_matrix_moves_along_an_orthogonal_one_of_adamws_size(self):
        _, student, optimizer = setup("muon")
        before = weights_of(student)
        take_steps(student, optimizer, [0])
        weight = "blocks.1.attn.qkv.weight"
        change = (weights_of(student)[weight] - before[weight]).double()
        # AdamW's updates have a root mean square of about 0.2 learning rates (arXiv:2502.16982).
        assert change.square().mean().sqrt() == pytest.approx(0.2e-3, rel=0.25)
        singular = torch.linalg.svdvals(change)
        assert singular.max() < 2 * singular.min()  # Newton-Schulz leaves them near 1

    def test_the_rest_moves_as_under_adamw(self):
        changes = []
        for name in NAMES:
            _, student, optimizer = setup(name)
            take_steps(student, optimizer, range(3))
            changes.append(weights_of(student))
        for weight, moved in changes[0].items():
            same = torch.equal(moved, changes[1][weight])
            matrix = weight.endswith(".weight") and weight.startswith(("blocks.", "ap_head."))
            assert same != matrix, weight

    def test_settings_reach_it(self):
        changes = {"optimizers.muon.momentum": 0.5, "optimizers.muon.nesterov": False}
        muon = setup("muon", changes)[2].optimizers[0]
        assert muon.param_groups[0]["momentum"] == 0.5
        assert not muon.param_groups[0]["nesterov"]

    @pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
    def test_momenta_outside_the_interval_are_refused(self, momentum):
        with pytest.raises(UserError, match=rf"optimizers\.muon\.momentum is {momentum}"):
            resolved("sit", {"optimizers.muon.momentum": momentum})
