"""Tokens: cutting and putting together along every number of axes, group sizes, and sorting."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfalign import TokenGrid, TokenGroups, make_generator
from selfalign.tokens import group_sizes, one_group, patchify, unpatchify

RATIOS = st.lists(st.floats(0.01, 1), min_size=2, max_size=8).map(tuple)


class TestPatches:
    @given(
        batch=st.integers(1, 3),
        channels=st.integers(1, 4),
        counts=st.lists(st.integers(1, 4), min_size=1, max_size=3),
        patch=st.sampled_from([1, 2, 4, 8]),
    )
    @settings(max_examples=60, deadline=None)
    def test_unpatchify_inverts_patchify(self, batch, channels, counts, patch):
        sides = tuple(count * patch for count in counts)
        samples = torch.randn(batch, channels, *sides)
        tokens = patchify(samples, patch)
        assert tokens.shape == (batch, math.prod(counts), patch ** len(counts) * channels)
        assert torch.equal(unpatchify(tokens, patch, sides), samples)
        grid = TokenGrid(sides, patch)
        assert torch.equal(grid.patchify(samples), tokens)
        assert torch.equal(grid.unpatchify(tokens), samples)

    @pytest.mark.parametrize(("sides", "patch"), [((6,), 2), ((4, 6), 2), ((4, 2, 6), 2)])
    def test_tokens_are_row_major_and_patches_row_column_channel(self, sides, patch):
        channels, counts = 3, [side // patch for side in sides]
        samples = torch.arange(channels * math.prod(sides)).reshape(1, channels, *sides)
        tokens = patchify(samples, patch)
        places = itertools.product(*map(range, counts))
        for token, place in enumerate(places):
            within = itertools.product(*[range(patch)] * len(sides))
            for position, (offset, c) in enumerate(itertools.product(within, range(channels))):
                at = [p * patch + o for p, o in zip(place, offset, strict=True)]
                assert tokens[0, token, position] == samples[(0, c, *at)]


class TestGrid:
    @pytest.mark.parametrize(
        ("sides", "patch", "shape", "positions"),
        [((12,), 4, (3,), 4), ((8, 12), 2, (4, 6), 4), ((2, 4, 6), 2, (1, 2, 3), 8)],
    )
    def test_counts(self, sides, patch, shape, positions):
        grid = TokenGrid(sides, patch)
        assert grid.shape == shape
        assert grid.num_tokens == math.prod(shape)
        assert grid.patch_positions == positions

    @pytest.mark.parametrize("sides", [(5,), (2, 3), (2, 3, 4)])
    def test_coordinates_are_the_places_in_image_order(self, sides):
        expected = [list(place) for place in itertools.product(*map(range, sides))]
        assert TokenGrid(sides, 1).coordinates().tolist() == expected

    def test_a_token_holds_the_patch_at_its_coordinates(self):
        grid = TokenGrid((4, 6), 2)
        samples = torch.randn(1, 3, 4, 6)
        for token, (row, column) in zip(
            grid.patchify(samples)[0], grid.coordinates().tolist(), strict=True
        ):
            patch = samples[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(token, patch.movedim(0, -1).flatten())


class TestGroupSizes:
    @pytest.mark.parametrize(
        ("ratios", "num_tokens", "expected"),
        [
            ((1.0,), 64, (64,)),
            ((0.25, 0.75), 64, (16, 48)),
            ((0.25, 0.75), 256, (64, 192)),
            ((0.35, 0.65), 256, (90, 166)),  # 89.6 and 166.4: the larger fraction takes the rest
            ((0.5, 0.5), 9, (5, 4)),  # a tie goes to the earlier group
            ((1 / 3, 1 / 3, 1 / 3), 10, (4, 3, 3)),
            ((0.3, 0.7), 10, (3, 7)),  # although 0.3·10 + 0.7·10 is not exact in binary
            ((0.1, 0.2, 0.7), 10, (1, 2, 7)),
            ((0.1,) * 10, 64, (7, 7, 7, 7, 6, 6, 6, 6, 6, 6)),
        ],
    )
    def test_known_answers(self, ratios, num_tokens, expected):
        assert group_sizes(ratios, num_tokens) == expected

    @given(ratios=RATIOS, num_tokens=st.integers(1, 4096))
    def test_largest_fractions_take_the_rest(self, ratios, num_tokens):
        ratios = tuple(ratio / sum(ratios) for ratio in ratios)
        sizes = group_sizes(ratios, num_tokens)
        assert sum(sizes) == num_tokens
        shares = [ratio * num_tokens for ratio in ratios]
        assert all(abs(size - share) < 1 + 1e-5 for size, share in zip(sizes, shares, strict=True))
        excess = [size - share for size, share in zip(sizes, shares, strict=True)]
        # Moving a token from a group rounded up to one rounded down never brings both closer to
        # their shares: that is what "the largest fractions take the rest" means.
        for up, down in itertools.permutations(range(len(sizes)), 2):
            if excess[up] > 0 > excess[down]:
                assert 1 - excess[up] >= -excess[down] - 1e-5

    @given(ratios=RATIOS, num_tokens=st.integers(1, 512), data=st.data())
    def test_a_larger_share_never_gets_fewer_tokens(self, ratios, num_tokens, data):
        ratios = tuple(ratio / sum(ratios) for ratio in ratios)
        sizes = group_sizes(ratios, num_tokens)
        for (a, n), (b, m) in itertools.permutations(zip(ratios, sizes, strict=True), 2):
            assert a <= b + 1e-5 / num_tokens or n >= m


class TestTokenGroups:
    @given(seed=st.integers(0, 999), num_tokens=st.integers(1, 40))
    @settings(max_examples=30, deadline=None)
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
        assert one_group(6) == groups

    def test_broadcast_gives_each_slice_its_groups_value(self):
        values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
        expected = torch.tensor([[1.0, 1, 1, 2, 3, 3], [4, 4, 4, 5, 6, 6]])
        assert torch.equal(
            TokenGroups(None, (3, 1, 2)).broadcast(values[..., None])[..., 0], expected
        )

    def test_slices_follow_each_other(self):
        groups = TokenGroups(None, (3, 1, 2))
        assert groups.ends == (3, 4, 6)
        assert groups.slices == (slice(0, 3), slice(3, 4), slice(4, 6))

    @pytest.mark.parametrize(
        ("whole", "separate", "parts"),
        [
            (0, False, ((0, 4, 0, 6),)),
            (2, False, ((0, 4, 0, 6),)),
            (0, True, ((0, 4, 0, 2), (0, 4, 2, 6))),
            (1, True, ((0, 1, 0, 6), (1, 4, 0, 2), (1, 4, 2, 6))),
            (4, True, ((0, 4, 0, 6),)),
        ],
    )
    def test_attention_parts_known_answers(self, whole, separate, parts):
        assert TokenGroups(None, (2, 4), whole, separate).attention_parts(4) == parts

    @given(
        sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5).map(tuple),
        batch=st.integers(1, 4),
        whole=st.integers(0, 4),
        separate=st.booleans(),
    )
    @settings(deadline=None)
    def test_attention_parts_cover_every_token_once(self, sizes, batch, whole, separate):
        groups = TokenGroups(None, sizes, min(whole, batch), separate)
        covered = torch.zeros(batch, sum(sizes), dtype=torch.int64)
        for first, end, start, stop in groups.attention_parts(batch):
            covered[first:end, start:stop] += 1
        assert (covered == 1).all()

    def test_repeat_is_the_same_groups_for_every_copy(self):
        order = torch.stack([torch.randperm(6) for _ in range(2)])
        groups = TokenGroups(order, (2, 4), separate=True)
        tokens = torch.randn(2, 6, 3)
        twice = groups.repeat(2)
        assert (twice.sizes, twice.separate) == ((2, 4), True)
        assert torch.equal(twice.sort(tokens.repeat(2, 1, 1)), groups.sort(tokens).repeat(2, 1, 1))
        assert one_group(6).repeat(3) == one_group(6)
