"""What student and teacher see: groups, timesteps, noise, and the randomness behind them."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from support import RECIPE_NAMES, resolved

from selfalign import TokenGroups, draw_views, make_generator
from selfalign.config import group_sizes
from selfalign.flow import PATHS
from selfalign.views import make_views, patchify, unpatchify

GROUPED = ("self-flow", "sra-dts", "sra-as", "sra-dts-as")
ALIGNED = RECIPE_NAMES[1:]


def draw_of(config, batch=8, seed=0):
    height, width = config.model.image_size
    shape = (batch, config.model.channels, height, width)
    return draw_views(config, shape, make_generator(seed, "views"))


def clean_images(config, batch=8, seed=1):
    height, width = config.model.image_size
    shape = (batch, config.model.channels, height, width)
    return torch.randn(shape, generator=make_generator(seed, "images"))


def timestep_of_token(view):
    """(B, N) timesteps in image order."""
    return view.groups.restore(view.groups.broadcast(view.timesteps[..., None]))[..., 0]


class TestPatches:
    @given(
        batch=st.integers(1, 3),
        channels=st.integers(1, 4),
        rows=st.integers(1, 4),
        columns=st.integers(1, 4),
        patch=st.sampled_from([1, 2, 4, 8]),
    )
    @settings(max_examples=40)
    def test_unpatchify_inverts_patchify(self, batch, channels, rows, columns, patch):
        images = torch.randn(batch, channels, rows * patch, columns * patch)
        tokens = patchify(images, patch)
        assert tokens.shape == (batch, rows * columns, patch * patch * channels)
        assert torch.equal(unpatchify(tokens, patch, images.shape[2:]), images)

    def test_tokens_are_row_major_and_patches_row_column_channel(self):
        channels, patch = 3, 2
        images = torch.arange(channels * 4 * 6).reshape(1, channels, 4, 6)
        tokens = patchify(images, patch)
        for row, column, y, x, c in itertools.product(*map(range, (2, 3, patch, patch, channels))):
            token, position = row * 3 + column, (y * patch + x) * channels + c
            expected = images[0, c, row * patch + y, column * patch + x]
            assert tokens[0, token, position] == expected


class TestTokenGroups:
    @given(seed=st.integers(0, 999), num_tokens=st.integers(1, 40))
    @settings(max_examples=30)
    def test_restore_inverts_sort(self, seed, num_tokens):
        generator = make_generator(seed, "order")
        order = torch.rand(3, num_tokens, generator=generator).argsort(dim=1)
        groups = TokenGroups(order, (num_tokens,))
        tokens = torch.randn(3, num_tokens, 2)
        assert torch.equal(groups.restore(groups.sort(tokens)), tokens)
        assert torch.equal(groups.sort(groups.restore(tokens)), tokens)
        assert torch.equal(groups.sort(tokens)[1, 0], tokens[1, order[1, 0]])
        shared = tokens[:1]
        assert torch.equal(groups.sort(shared), groups.sort(shared.expand(3, -1, -1)))

    def test_no_order_is_the_images_own(self):
        tokens = torch.randn(2, 6, 3)
        groups = TokenGroups(None, (6,))
        assert torch.equal(groups.sort(tokens), tokens)
        assert torch.equal(groups.restore(tokens), tokens)

    def test_broadcast_gives_each_slice_its_groups_value(self):
        values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
        expected = torch.tensor([[1.0, 1, 1, 2, 3, 3], [4, 4, 4, 5, 6, 6]])
        assert torch.equal(
            TokenGroups(None, (3, 1, 2)).broadcast(values[..., None])[..., 0], expected
        )


class TestDraw:
    @pytest.mark.parametrize("name", RECIPE_NAMES)
    def test_is_a_function_of_the_generator_only(self, name):
        config = resolved(name)
        first = draw_of(config)
        torch.manual_seed(99)  # the global generator has no say
        state = torch.get_rng_state()
        again, other = draw_of(config), draw_of(config, seed=1)
        assert torch.equal(torch.get_rng_state(), state)
        for field in ("noise", "timesteps", "teacher_interval", "label_dropout"):
            assert torch.equal(getattr(first, field), getattr(again, field))
        assert not torch.equal(first.noise, other.noise)
        assert not torch.equal(first.timesteps, other.timesteps)
        if name in GROUPED:
            assert torch.equal(first.order, again.order)
            assert not torch.equal(first.order, other.order)

    @pytest.mark.parametrize("distribution", ["uniform", "logit-normal"])
    def test_recipes_share_all_that_they_have_in_common(self, distribution):
        draws = {
            name: draw_of(resolved(name, {"flow.timestep_distribution": distribution}))
            for name in RECIPE_NAMES
        }
        reference = draws["sit"]
        for draw in draws.values():
            assert torch.equal(draw.noise, reference.noise)
            assert torch.equal(draw.label_dropout, reference.label_dropout)
            assert torch.equal(draw.timesteps[:, 0], reference.timesteps[:, 0])
            assert torch.equal(draw.teacher_interval[:, 0], reference.teacher_interval[:, 0])
        for name in GROUPED[1:]:
            assert torch.equal(draws[name].order, draws[GROUPED[0]].order)

    @pytest.mark.parametrize("name", RECIPE_NAMES)
    def test_shapes(self, name):
        config = resolved(name, {"model.size": "tiny/2"}, channels=3, image_size=(8, 12))
        draw, groups = draw_of(config), config.num_groups
        assert draw.noise.shape == (8, 3, 8, 12)
        assert draw.timesteps.shape == draw.teacher_interval.shape == (8, groups)
        assert draw.label_dropout.shape == (8,)
        assert (draw.order is None) == (groups == 1)

    @given(
        ratios=st.lists(st.floats(0.1, 1), min_size=2, max_size=8).map(tuple),
        seed=st.integers(0, 999),
    )
    @settings(max_examples=30)
    def test_order_is_a_permutation_and_shares_are_exact(self, ratios, seed):
        config = resolved("sra-dts-as", {"views.mask_ratios": ratios}, image_size=(8, 10))
        draw = draw_of(config, seed=seed)
        assert torch.equal(draw.order.sort(dim=1).values, torch.arange(80).expand(8, -1))
        view = make_views(config, clean_images(config), draw).student
        sizes = group_sizes(config.views.mask_ratios, 80)
        assert view.groups.sizes == sizes
        tokens = timestep_of_token(view)
        for sample in range(8):
            values, counts = tokens[sample].unique(return_counts=True)
            found = dict(zip(values.tolist(), counts.tolist(), strict=True))
            assert found == dict(zip(view.timesteps[sample].tolist(), sizes, strict=True))

    @pytest.mark.parametrize("name", ["sit", "sra-as"])
    def test_single_timesteps_are_equal_in_all_groups(self, name):
        timesteps = draw_of(resolved(name)).timesteps
        assert torch.equal(timesteps, timesteps[:, :1].expand_as(timesteps))

    @pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
    def test_labels_are_dropped_at_the_configured_rate(self, rate):
        config = resolved("sit", {"views.class_dropout": rate}, image_size=(1, 1))
        dropped = draw_of(config, batch=20_000).label_dropout.float().mean().item()
        assert abs(dropped - rate) <= 4 * (rate * (1 - rate) / 20_000) ** 0.5

    def test_noise_is_standard_normal(self):
        noise = draw_of(resolved("sit"), batch=500).noise.flatten()
        assert stats.kstest(noise.numpy(), "norm").pvalue > 1e-3

    @pytest.mark.parametrize("interval", [0.0, 0.2, 0.7])
    def test_teacher_intervals_are_uniform_up_to_the_configured_one(self, interval):
        config = resolved("sra-dts", {"alignment.teacher_interval": interval}, image_size=(2, 2))
        drawn = draw_of(config, batch=5_000).teacher_interval
        assert (drawn >= 0).all() and (drawn <= interval).all()
        if interval:
            for group in drawn.T:
                assert stats.kstest(group.numpy() / interval, "uniform").pvalue > 1e-3
            assert abs(torch.corrcoef(drawn.T)[0, 1]) < 0.06


class TestMarginals:
    """Eq. 5 and 6: under dual timesteps every token's own timestep keeps the distribution p(t)."""

    @pytest.mark.parametrize("ratios", [(0.25, 0.75), (0.5, 0.5), (0.2, 0.3, 0.5)])
    @pytest.mark.parametrize("distribution", ["uniform", "logit-normal"])
    def test_of_every_token_is_the_distribution_of_timesteps(self, ratios, distribution):
        config = resolved(
            "sra-dts-as",
            {
                "views.mask_ratios": ratios,
                "flow.timestep_distribution": distribution,
                "flow.logit_mean": -0.4,
                "flow.logit_std": 1.3,
            },
            image_size=(3, 4),
        )
        draw = draw_of(config, batch=20_000)
        view = make_views(config, torch.zeros_like(draw.noise), draw).student
        tokens = timestep_of_token(view).double()
        if distribution == "uniform":
            expected = stats.uniform()
            sample = tokens
        else:
            expected = stats.norm(-0.4, 1.3)
            sample = tokens.logit()
        for token in range(tokens.shape[1]):
            # 72 comparisons in all: one in a thousand would not be rare.
            assert stats.kstest(sample[:, token].numpy(), expected.cdf).pvalue > 1e-5

    def test_tokens_share_a_timestep_as_often_as_a_random_partition_says(self):
        config = resolved("sra-dts-as", image_size=(4, 4))  # groups of 4 and 12 tokens
        draw = draw_of(config, batch=8_000)
        tokens = timestep_of_token(make_views(config, torch.zeros_like(draw.noise), draw).student)
        expected = (4 * 3 + 12 * 11) / (16 * 15)
        for a, b in [(0, 1), (0, 15), (5, 10), (3, 4)]:
            share = (tokens[:, a] == tokens[:, b]).float().mean().item()
            assert abs(share - expected) < 4 * (expected * (1 - expected) / 8_000) ** 0.5

    def test_groups_are_independent(self):
        draw = draw_of(resolved("sra-dts-as", image_size=(2, 2)), batch=5_000)
        assert abs(torch.corrcoef(draw.timesteps.T)[0, 1]) < 0.06


class TestStudentView:
    @pytest.mark.parametrize("path", ["linear", "cosine"])
    @pytest.mark.parametrize("name", RECIPE_NAMES)
    def test_every_pixel_is_noised_at_its_tokens_timestep(self, name, path):
        config = resolved(
            name, {"model.size": "tiny/2", "flow.path": path}, channels=3, image_size=(8, 12)
        )
        draw, x0 = draw_of(config), clean_images(config)
        views = make_views(config, x0, draw)
        token_times = timestep_of_token(views.student).reshape(8, 1, 4, 6)
        pixel_times = token_times.repeat_interleave(2, 2).repeat_interleave(2, 3)
        for tokens, expected in (
            (views.student.tokens, PATHS[path].interpolate(x0, draw.noise, pixel_times)),
            (views.target, PATHS[path].velocity(x0, draw.noise, pixel_times)),
        ):
            restored = unpatchify(views.student.groups.restore(tokens), 2, (8, 12))
            assert torch.allclose(restored, expected, atol=1e-6)

    @pytest.mark.parametrize("name", RECIPE_NAMES)
    def test_attention_is_separated_only_where_the_recipe_says(self, name):
        config = resolved(name)
        views = make_views(config, clean_images(config), draw_of(config))
        assert views.student.groups.separate == name.endswith("-as")
        assert (views.teacher is None) == (name == "sit")
        if views.teacher:
            assert views.teacher.groups.separate == name.endswith("-as")


class TestTeacherView:
    @pytest.mark.parametrize("name", ["sra", "sra-dts", "sra-as", "sra-dts-as"])
    def test_sra_timesteps_lie_below_the_students_by_the_drawn_interval(self, name):
        config = resolved(name, {"alignment.teacher_interval": 0.3})
        draw = draw_of(config, batch=300)
        views = make_views(config, torch.zeros_like(draw.noise), draw)
        student, teacher = views.student.timesteps, views.teacher.timesteps
        assert (teacher <= student).all()
        assert (teacher >= (student - 0.3)).all()
        assert teacher.min() == 0  # some are clamped, none is negative
        assert torch.equal(teacher, (student - draw.teacher_interval).clamp(0, 1))

    def test_self_flow_sees_the_whole_image_at_the_smaller_timestep(self):
        config = resolved("self-flow")
        draw = draw_of(config)
        view = make_views(config, clean_images(config), draw).teacher
        assert view.groups.sizes == (64,)
        assert torch.equal(view.timesteps, draw.timesteps.min(dim=1, keepdim=True).values)

    def test_self_flow_timesteps_with_groups_are_the_minimum_in_all_of_them(self):
        changes = {"alignment.teacher_groups": True, "views.mask_ratios": (0.2, 0.3, 0.5)}
        config = resolved("self-flow", changes)
        draw = draw_of(config)
        view = make_views(config, clean_images(config), draw).teacher
        expected = draw.timesteps.min(dim=1, keepdim=True).values.expand(-1, 3)
        assert torch.equal(view.timesteps, expected)

    @pytest.mark.parametrize("name", ["sra", "sra-dts", "sra-as", "sra-dts-as"])
    def test_same_is_the_students_own_view(self, name):
        config = resolved(name, {"alignment.teacher_timestep": "same"})
        views = make_views(config, clean_images(config), draw_of(config))
        assert torch.equal(views.teacher.tokens, views.student.tokens)
        assert torch.equal(views.teacher.timesteps, views.student.timesteps)
        assert views.teacher.groups == views.student.groups

    @pytest.mark.parametrize("name", ALIGNED)
    def test_shares_the_students_noise_and_token_order(self, name):
        config = resolved(name, {"views.whole_image_fraction": 0.25 if name in GROUPED else 0.0})
        draw, x0 = draw_of(config), clean_images(config)
        view = make_views(config, x0, draw).teacher
        times = timestep_of_token(view).reshape(8, 1, 8, 8)
        expected = PATHS["linear"].interpolate(x0, draw.noise, times)
        restored = unpatchify(view.groups.restore(view.tokens), 1, (8, 8))
        assert torch.allclose(restored, expected, atol=1e-6)
        if draw.order is not None:
            assert torch.equal(view.groups.order, draw.order)

    def test_without_groups_under_separation_it_attends_to_the_whole_image(self):
        config = resolved("sra-as", {"alignment.teacher_groups": False})
        view = make_views(config, clean_images(config), draw_of(config)).teacher
        assert view.groups.sizes == (64,) and not view.groups.separate


class TestWholeImages:
    @pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.25, 2), (0.5, 4), (1.0, 8)])
    @pytest.mark.parametrize("name", GROUPED)
    def test_carry_one_timestep_and_the_others_keep_theirs(self, name, fraction, count):
        config = resolved(name, {"views.whole_image_fraction": fraction})
        draw = draw_of(config)
        views = make_views(config, clean_images(config), draw)
        view = views.student
        assert view.groups.whole == count
        tokens = timestep_of_token(view)
        # The released code gives them the second group's.
        assert torch.equal(tokens[:count], draw.timesteps[:count, 1:].expand(-1, 64))
        assert torch.equal(view.timesteps[count:], draw.timesteps[count:])
        if config.alignment.teacher_groups:
            assert views.teacher.groups.whole == count
            teacher = timestep_of_token(views.teacher)
            lower = (draw.timesteps - draw.teacher_interval).clamp(0, 1)[:count, 1:]
            assert torch.equal(teacher[:count], lower.expand(-1, 64))

    def test_leave_the_draw_as_it_was(self):
        config = resolved("sra-dts-as", {"views.whole_image_fraction": 0.5})
        plain = draw_of(resolved("sra-dts-as"))
        draw = draw_of(config)
        before = replace(draw, timesteps=draw.timesteps.clone())
        make_views(config, clean_images(config), draw)
        assert torch.equal(draw.timesteps, before.timesteps)
        assert torch.equal(draw.timesteps, plain.timesteps)
