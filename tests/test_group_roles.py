"""What becomes of a group: weighed, noised but not scored, dropped, or led past some blocks."""

import pytest
import torch
from support import clean_images, draw_of, resolved, small_model

from selfalign import UserError
from selfalign.flow import velocity_error
from selfalign.objective import Objective
from selfalign.student import build_student
from selfalign.terms import over_groups
from selfalign.terms.alignment import distance
from selfalign.tokens import Passing, TokenGroups
from selfalign.training.ema import EMA
from selfalign.views import make_views

RATIOS = (0.25, 0.5, 0.25)
HIDDEN = {"views.hidden_groups": 1}


def losses_of(changes, seed=0, name="sra-dts-as"):
    config = resolved(name, {"views.mask_ratios": RATIOS, **changes})
    student = build_student(config)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05)
    teacher = EMA(student, 0.9).model
    x0, draw = clean_images(config), draw_of(config, seed=seed)
    labels = torch.zeros(len(x0), dtype=torch.int64)
    objective = Objective(config)
    forward = objective.predict(student, teacher, x0, labels, draw)
    return config, forward, objective.losses(forward)


class TestWeights:
    groups = TokenGroups(None, (2, 3, 5))

    def features(self):
        generator = torch.Generator().manual_seed(0)
        return tuple(torch.randn(4, 10, 6, generator=generator) for _ in range(2))

    @pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (3.0, 3.0, 3.0)])
    def test_equal_weights_are_none(self, weights):
        pair = self.features()
        weighed = over_groups(velocity_error, self.groups, weights, *pair)
        assert torch.allclose(weighed, velocity_error(*pair), atol=1e-6)

    def test_each_token_counts_by_its_group(self):
        pair, weights = self.features(), (2.0, 0.5, 1.0)
        per_token = (pair[0] - pair[1]).square().mean(dim=2)
        weight = torch.tensor([2.0] * 2 + [0.5] * 3 + [1.0] * 5)
        expected = (per_token * weight).sum(dim=1) / weight.sum()
        weighed = over_groups(velocity_error, self.groups, weights, *pair)
        assert torch.allclose(weighed, expected, atol=1e-6)

    @pytest.mark.parametrize("name", ["cosine", "smooth-l1", "l1", "l2"])
    def test_of_alignment_too(self, name):
        pair = self.features()
        weighed = over_groups(lambda *x: distance(name, *x), self.groups, (0.0, 1.0, 0.0), *pair)
        expected = distance(name, *(held[:, 2:5] for held in pair))
        assert torch.allclose(weighed, expected, atol=1e-6)

    def test_a_group_of_weight_0_gets_no_gradient(self):
        changes = {
            "terms.denoising.group_weights": (0.0, 1.0, 1.0),
            "terms.alignment.weight": 0.0,
        }
        config, forward, losses = losses_of(changes)
        velocity = forward.output.velocity
        (gradient,) = torch.autograd.grad(losses.total, velocity)
        first = config.group_sizes[0]
        assert (gradient[:, :first] == 0).all() and (gradient[:, first:] != 0).any()


class TestDropped:
    def test_the_student_sees_the_other_tokens_and_their_places(self):
        config = resolved("sra-dts-as", {"views.mask_ratios": RATIOS, **HIDDEN})
        whole = resolved("sra-dts-as", {"views.mask_ratios": RATIOS})
        x0, draw = clean_images(config), draw_of(config)
        view, full = make_views(config, x0, draw).student, make_views(whole, x0, draw).student
        assert view.groups.sizes == (16, 32) and view.timesteps.shape == (8, 2)
        assert torch.equal(view.tokens, full.tokens[:, :48])
        assert torch.equal(view.groups.order, full.groups.order[:, :48])

    def test_what_is_hidden_has_no_say(self):
        """Separated attention: the seen tokens' velocities are those without hiding."""
        _, forward, _ = losses_of(HIDDEN)
        _, full, _ = losses_of({})
        seen = forward.output.velocity
        assert seen.shape[1] == 48
        assert torch.allclose(seen, full.output.velocity[:, :48], atol=1e-5)

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"targets.ema.groups": False, "targets.ema.timestep": "minimum"},
            {"terms.alignment.target": "latent", "terms.alignment.projector": "mlp3"},
            {"terms.alignment.target": "same-pass", "terms.alignment.projector": "none"},
        ],
        ids=str,
    )
    def test_trains_with_every_kind_of_target(self, changes):
        _, _, losses = losses_of({**HIDDEN, **changes})
        losses.total.backward()
        assert losses.total.isfinite()

    def test_a_teacher_without_groups_sees_all_tokens(self):
        changes = {"targets.ema.groups": False, "targets.ema.timestep": "minimum"}
        config, forward, _ = losses_of({**HIDDEN, **changes})
        assert forward.targets["ema"].shape[1] == 64
        view = config.targets["ema"].view(forward.views, forward.draw)
        assert view.tokens.shape[1] == 64 and view.groups.sizes == (64,)
        assert torch.equal(view.timesteps[:, 0], forward.draw.timesteps[:, :2].amin(dim=1))


class TestPassingBy:
    def test_passing_tokens_are_left_alone_between_the_blocks(self):
        model = small_model()
        order = torch.arange(24).expand(2, -1)
        tokens = torch.randn(2, 24, 2, dtype=torch.float64)
        t = torch.tensor([[0.2, 0.7]] * 2, dtype=torch.float64)
        labels = torch.zeros(2, dtype=torch.int64)
        plain = TokenGroups(order, (18, 6))
        groups = TokenGroups(order, (18, 6), passing=Passing(1, 2, 2))
        with torch.no_grad():
            found = model(tokens, t, labels, groups, (1, 2, 3)).features
            expected = model(tokens, t, labels, plain, (1,)).features[1]
            kept = model.blocks[1](
                expected[:, :18],
                model.transform(tokens, t, labels, plain, (), 1).condition[:, :1],
                TokenGroups(None, (18,)),
            )
        assert torch.equal(found[1], expected)
        assert torch.equal(found[2][:, 18:], expected[:, 18:]), "they pass by"
        assert torch.allclose(found[2][:, :18], kept), "the others do not see them"
        assert not torch.allclose(found[3][:, 18:], found[2][:, 18:]), "and are back"

    def test_trains(self):
        changes = {
            "views.hidden_groups": 1,
            "views.skipped_blocks": (2, 5),
            "views.attention": "full",
            "terms.alignment.group_weights": (1.0, 1.0, 0.0),
        }
        _, forward, losses = losses_of(changes)
        losses.total.backward()
        assert forward.output.velocity.shape[1] == 64 and losses.total.isfinite()

    def test_a_mask_token_stands_for_what_is_hidden(self):
        model = small_model(mask_token=True)
        order = torch.arange(24).expand(2, -1)
        tokens = torch.randn(2, 24, 2, dtype=torch.float64)
        other = torch.cat([tokens[:, :18], torch.randn(2, 6, 2, dtype=torch.float64)], dim=1)
        t = torch.tensor([[0.2, 0.7]] * 2, dtype=torch.float64)
        labels = torch.zeros(2, dtype=torch.int64)
        found = {}
        for masked in (True, False):
            groups = TokenGroups(order, (18, 6), passing=Passing(1, 1, 2, masked))
            with torch.no_grad():
                found[masked] = [model(x, t, labels, groups).velocity for x in (tokens, other)]
        assert torch.equal(*found[True]), "nothing is seen of them"
        assert not torch.allclose(*found[False])
        with torch.no_grad():  # each token has its place
            velocity = found[True][0][:, 18:]
            assert not torch.allclose(velocity[:, 0], velocity[:, 1])

    def test_trains_with_a_mask_token(self):
        changes = {
            "views.hidden_groups": 1,
            "views.skipped_blocks": (1, 4),
            "views.hidden_as": "mask",
            "views.attention": "full",
            "terms.denoising.group_weights": (1.0, 1.0, 0.1),
            "terms.alignment.group_weights": (1.0, 1.0, 0.0),
        }
        config = resolved("sra-dts-as", {"views.mask_ratios": RATIOS, **changes})
        student = build_student(config)
        assert student.mask_token.any()
        x0, draw = clean_images(config), draw_of(config)
        labels = torch.zeros(len(x0), dtype=torch.int64)
        teacher = EMA(student, 0.9).model
        with torch.no_grad():
            for block in student.blocks:
                block.adaLN_modulation[1].weight.normal_(std=0.1)
            student.final_layer.linear.weight.normal_(std=0.1)
        Objective(config)(student, teacher, x0, labels, draw).total.backward()
        assert student.mask_token.grad.any()

    def test_gradient_checkpointing_changes_nothing(self):
        changes = {"views.hidden_groups": 1, "views.skipped_blocks": (2, 5)}
        totals = []
        for recompute in (False, True):
            more = {**changes, "model.gradient_checkpointing": recompute}
            totals.append(losses_of(more)[2].total)
        assert torch.equal(*totals)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"views.hidden_groups": 3}, ["views.hidden_groups is 3", "fewer than the 3"]),
        ({"views.hidden_groups": -1}, ["views.hidden_groups is -1"]),
        ({"views.hidden_groups": 1, "views.whole_image_fraction": 0.5}, ["with whole images"]),
        ({"views.skipped_blocks": (2, 4)}, ["no group is hidden"]),
        ({"views.hidden_groups": 1, "views.skipped_blocks": (3, 2)}, ["views.skipped_blocks"]),
        ({"views.hidden_groups": 1, "views.skipped_blocks": (3, 9)}, ["from 1 to 6"]),
        ({"views.hidden_groups": 1, "views.hidden_as": "mask"}, ["hidden_as", "skipped_blocks"]),
        ({"terms.denoising.group_weights": (1.0,)}, ["terms.denoising.group_weights", "3"]),
        ({"terms.denoising.group_weights": (0.0, 0.0, 0.0)}, ["not 0 for all"]),
        ({"terms.denoising.group_weights": (1.0, -1.0, 0.0)}, ["from 0"]),
        ({"terms.alignment.group_weights": (1.0, 1.0)}, ["terms.alignment.group_weights"]),
        (
            {"views.hidden_groups": 1, "terms.denoising.group_weights": (0.0, 0.0, 1.0)},
            ["that are seen"],
        ),
        (
            {"views.hidden_groups": 1, "terms.alignment.target": "latent",
             "terms.alignment.projector": "conv"},
            ["hidden_groups"],
        ),
    ],
)  # fmt: skip
def test_refused(changes, words):
    with pytest.raises(UserError) as error:
        resolved("sra-dts-as", {"views.mask_ratios": RATIOS, **changes})
    assert [word for word in words if word not in str(error.value)] == []
