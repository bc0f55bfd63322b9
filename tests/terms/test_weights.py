"""What becomes of a term's weight over the run, and what a stopped term costs."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import resolved

from selfalign import Objective, UserError, build_student, draw_views, make_generator
from selfalign.terms.alignment import Alignment
from selfalign.terms.denoising import Denoising
from selfalign.terms.dispersive import Dispersive

TERMS = (Denoising, Alignment, Dispersive)


class TestWeights:
    @pytest.mark.parametrize("term", TERMS)
    @pytest.mark.parametrize("step", [0, 99, 10**6])
    def test_constant(self, term, step):
        assert term(weight=0.3).weight_at(step) == 0.3

    @pytest.mark.parametrize("term", TERMS)
    @pytest.mark.parametrize(
        ("decay", "step", "share"),
        [
            ("linear", 0, 1),
            ("linear", 50, 1),
            ("linear", 75, 0.75),
            ("linear", 150, 0),
            ("linear", 999, 0),
            ("cosine", 50, 1),
            ("cosine", 75, 0.5 * (1 + math.cos(math.pi / 4))),
            ("cosine", 100, 0.5),
            ("cosine", 150, 0),
            ("cosine", 999, 0),
            ("exponential", 50, 1),
            ("exponential", 100, 10**-0.5),
            ("exponential", 150, 0.1),
            ("exponential", 250, 0.01),
        ],
    )
    def test_known_answers(self, term, decay, step, share):
        settings = term(weight=0.6, decay=decay, decay_start=50, decay_steps=100)
        assert settings.weight_at(step) == pytest.approx(0.6 * share, abs=1e-15)

    @given(
        decay=st.sampled_from(["linear", "cosine", "exponential"]),
        start=st.integers(0, 1000),
        steps=st.integers(1, 1000),
        step=st.integers(0, 3000),
    )
    def test_never_rise_nor_fall_below_zero(self, decay, start, steps, step):
        term = Alignment(weight=0.5, decay=decay, decay_start=start, decay_steps=steps)
        assert 0 <= term.weight_at(step + 1) <= term.weight_at(step) <= 0.5
        assert term.weight_at(start) == 0.5

    def test_stop(self):
        assert not any(Alignment().stopped(step) for step in (0, 1, 10**7))
        term = Alignment(stop_step=7)
        assert [term.stopped(step) for step in (0, 6, 7, 8)] == [False, False, True, True]

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"weight": -0.1}, ["weight", "-0.1", "from 0"]),
            ({"weight": math.nan}, ["weight", "nan"]),
            ({"decay": "step"}, ["decay", "constant, linear, cosine, exponential"]),
            ({"decay_start": -1}, ["decay_start", "-1"]),
            ({"decay_steps": 0}, ["decay_steps", "0", "from 1"]),
            ({"stop_step": -1}, ["stop_step", "-1", "never"]),
            (
                {"decay": "linear", "decay_start": 9, "stop_step": 9},
                ["stop_step", "9", "after decay_start"],
            ),
        ],
    )
    def test_refused(self, settings, words):
        with pytest.raises(UserError) as error:
            Alignment(**settings)
        assert [word for word in ["terms.alignment.", *words] if word not in str(error.value)] == []


def setup(changes):
    config = resolved("sra-dts-as", changes)
    student = build_student(config)
    x0 = torch.randn(4, 1, 8, 8, generator=make_generator(0, "x0"))
    draw = draw_views(config, x0.shape, make_generator(0, "draw"))
    return Objective(config), student, copy.deepcopy(student), x0, torch.arange(4), draw


@pytest.mark.parametrize(
    ("step", "share"), [(0, 1.0), (10, 1.0), (30, 0.5), (40, 0.25), (50, 0.0), (70, 0.0)]
)
def test_the_total_follows_the_weight(step, share):
    decay = {"decay": "linear", "decay_start": 10, "decay_steps": 40, "weight": 0.8}
    changes = {f"terms.alignment.{name}": value for name, value in decay.items()}
    objective, student, teacher, x0, labels, draw = setup(changes)
    losses = objective(student, teacher, x0, labels, draw, step)
    expected = losses.terms["denoising"].mean() + 0.8 * share * losses.terms["alignment"]
    assert losses.terms["alignment"] > 0
    assert torch.allclose(losses.total, expected)


STOPPED = {"terms.alignment.stop_step": 5}


class TestStopped:
    def test_is_computed_up_to_its_step(self):
        objective, student, teacher, x0, labels, draw = setup(STOPPED)
        assert objective(student, teacher, x0, labels, draw, 4).terms["alignment"] > 0

    def test_is_not_computed_and_its_teacher_and_head_are_not_run(self):
        objective, student, teacher, x0, labels, draw = setup(STOPPED)
        ran = []
        for module in (*teacher.blocks, teacher.x_embedder, student.ap_head):
            module.register_forward_hook(lambda module, *_: ran.append(module))
        losses = objective(student, teacher, x0, labels, draw, 5)
        assert ran == []
        assert losses.terms.keys() == {"denoising"}
        assert torch.equal(losses.total, losses.terms["denoising"].mean())
        without_teacher = objective(student, None, x0, labels, draw, 5)
        assert torch.equal(without_teacher.total, losses.total)

    def test_its_head_has_a_gradient_of_zero(self):
        # Processes must agree on which weights have a gradient, or DDP waits forever.
        objective, student, teacher, x0, labels, draw = setup(STOPPED)
        objective(student, teacher, x0, labels, draw, 5).total.backward()
        for name, parameter in student.named_parameters():
            assert parameter.grad is not None, name
        assert not any(parameter.grad.any() for parameter in student.ap_head.parameters())

    def test_the_rest_is_as_without_it(self):
        objective, student, teacher, x0, labels, draw = setup(STOPPED)
        losses = objective(student, teacher, x0, labels, draw, 5)
        plain = resolved("sra-dts-as", {"terms.alignment.target": "none"})
        assert torch.equal(losses.total, Objective(plain)(student, None, x0, labels, draw).total)

    def test_others_go_on(self):
        changes = {**STOPPED, "objective.terms": ("dispersive",)}
        objective, student, teacher, x0, labels, draw = setup(changes)
        assert list(objective(student, teacher, x0, labels, draw, 4).terms) == [
            "denoising",
            "alignment",
            "dispersive",
        ]
        losses = objective(student, teacher, x0, labels, draw, 5)
        assert list(losses.terms) == ["denoising", "dispersive"]
        expected = losses.terms["denoising"].mean() + 0.5 * losses.terms["dispersive"]
        assert torch.allclose(losses.total, expected)
