"""What student and teacher see: groups, timesteps, noise, and the randomness behind them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from support import (
    GROUPED,
    RECIPE_NAMES,
    clean_images,
    draw_of,
    randomize,
    resolved,
    teacher_view,
    timestep_of_token,
)

from selfalign import Draw, build_student, draw_views, make_generator
from selfalign.flow import PATHS
from selfalign.randomness import Share
from selfalign.tokens import group_sizes, unpatchify
from selfalign.views import make_views


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
        draw = draw_of(config)
        views = make_views(config, clean_images(config), draw)
        assert views.student.groups.separate == name.endswith("-as")
        assert (config.used_targets() == {}) == (name == "sit")
        if name != "sit":
            teacher = teacher_view(config, views, draw)
            assert teacher.groups.separate == name.endswith("-as")


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
        if config.targets["ema"].groups:
            seen = teacher_view(config, views, draw)
            assert seen.groups.whole == count
            teacher = timestep_of_token(seen)
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


@pytest.mark.parametrize(
    "partition", ["random", "blocks", "checkerboard", "stripes", "clusters", "energy", "difficulty"]
)
def test_shares_of_a_batch_are_drawn_as_the_whole(partition: str) -> None:
    config = resolved("sra-dts-as", {"views.partition": partition})
    teacher, images, labels = build_student(config), clean_images(config, 12), torch.arange(12) % 3
    randomize(teacher)

    def draw(index: int, shares: int) -> Draw:
        share = Share(index, shares)
        own = share.own(images), make_generator(0, "views", 3)
        return draw_views(config, *own, None, teacher, share.own(labels), share)

    whole = draw(0, 1)
    for shares in (2, 3, 6):
        parts = [draw(index, shares) for index in range(shares)]
        for name in ("noise", "timesteps", "order", "teacher_interval", "label_dropout"):
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(joined, getattr(whole, name)), name


def test_what_compares_samples_is_drawn_within_a_share() -> None:
    config = resolved("sra", {"objective.terms": ("contrastive",)})
    negatives = [
        draw_views(config, (4, 1, 8, 8), make_generator(0, "views", 3), share=Share(index, 3)).more
        for index in range(3)
    ]
    for drawn in negatives:
        (others,) = drawn.values()
        assert others.max() < 4 and not bool((others == torch.arange(4)).any())
    assert len({str(drawn) for drawn in negatives}) > 1
