"""What the groups look like: rectangles, stripes, the fields of a checkerboard, or nothing at all."""

import math

import pytest
import torch
from support import resolved

from selfalign import TokenGrid, UserError, make_generator
from selfalign.partitions import Ungrouped
from selfalign.partitions.blocks import Blocks
from selfalign.partitions.checkerboard import Checkerboard
from selfalign.partitions.random import Random
from selfalign.partitions.stripes import Stripes
from selfalign.partitions.tubes import Tubes


def group_of_token(partition, shape, sizes, batch=200, seed=0):
    """(B, *shape): which group every token is in."""
    grid = TokenGrid(shape, 1)
    order = partition.order(Ungrouped(grid, sizes, batch, make_generator(seed, "partition")))
    numbers = torch.cat([torch.full((size,), k) for k, size in enumerate(sizes)])
    groups = torch.empty_like(order).scatter(1, order, numbers.expand(batch, -1))
    return groups.reshape(batch, *shape)


def bounding_box(mask):
    places = mask.nonzero()
    return tuple((places.max(dim=0).values - places.min(dim=0).values + 1).tolist())


def is_connected(mask):
    """Whether all tokens of a mask can be reached from each other along the axes."""
    left = {tuple(place) for place in mask.nonzero().tolist()}
    front = [left.pop()]
    while front:
        place = front.pop()
        for axis in range(len(place)):
            for step in (-1, 1):
                near = (*place[:axis], place[axis] + step, *place[axis + 1 :])
                if near in left:
                    left.remove(near)
                    front.append(near)
    return not left


class TestBlocks:
    @pytest.mark.parametrize("shape", [(8, 8), (6, 10)])
    @pytest.mark.parametrize("size", [4, 9, 16])
    def test_a_square_is_a_square(self, shape, size):
        sizes = (size, math.prod(shape) - size)
        groups = group_of_token(Blocks(largest_aspect=1.0), shape, sizes)
        boxes = [math.prod(bounding_box(sample == 0)) for sample in groups]
        assert sum(box == size for box in boxes) > 0.95 * len(boxes)

    @pytest.mark.parametrize("size", [9, 16, 20, 25])
    @pytest.mark.parametrize("aspect", [1.0, 2.0, 4.0])
    def test_a_group_fills_most_of_its_box_and_its_box_is_no_longer_than_told(self, size, aspect):
        groups = group_of_token(Blocks(largest_aspect=aspect), (10, 10), (size, 100 - size))
        for sample in groups:
            box = bounding_box(sample == 0)
            # The next whole rectangle around one of the group's own area.
            longest = math.ceil((size * aspect) ** 0.5) + 1
            assert max(box) <= longest
            assert math.prod(box) <= size + sum(box) + 1

    @pytest.mark.parametrize("shape", [(20,), (8, 8), (5, 9), (4, 4, 4)])
    @pytest.mark.parametrize("share", [0.1, 0.25, 0.4, 0.7])
    def test_the_first_group_is_connected(self, shape, share):
        tokens = math.prod(shape)
        size = round(share * tokens)
        groups = group_of_token(Blocks(), shape, (size, tokens - size))
        assert all(is_connected(sample == 0) for sample in groups)

    def test_a_signals_first_group_is_an_interval(self):
        groups = group_of_token(Blocks(), (24,), (7, 17))
        assert all(bounding_box(sample == 0) == (7,) for sample in groups)

    def test_larger_aspects_are_drawn_and_both_ways(self):
        groups = group_of_token(Blocks(largest_aspect=4.0), (12, 12), (16, 128))
        boxes = torch.tensor([bounding_box(sample == 0) for sample in groups])
        lying = (boxes[:, 1] >= 1.5 * boxes[:, 0]).float().mean()
        standing = (boxes[:, 0] >= 1.5 * boxes[:, 1]).float().mean()
        assert lying > 0.15 and standing > 0.15

    def test_rectangles_come_to_lie_everywhere(self):
        groups = group_of_token(Blocks(), (6, 6), (9, 27), batch=2000)
        share = (groups == 0).float().mean(dim=0)
        assert share.min() > 0.01
        # and evenly from left to right and from top to bottom
        for mirrored in (share.flip(0), share.flip(1)):
            assert (share - mirrored).abs().max() < 0.08


class TestStripes:
    @pytest.mark.parametrize("axis", [0, 1])
    @pytest.mark.parametrize("width", [1, 2])
    def test_groups_are_whole_stripes(self, axis, width):
        # Stripes along the other axis: each has 8·width tokens.
        sizes = (2 * 8 * width, 64 - 2 * 8 * width)
        groups = group_of_token(Stripes(axis=axis, width=width), (8, 8), sizes)
        stripes = groups.movedim(axis + 1, 1).reshape(len(groups), 8 // width, -1)
        assert torch.equal(stripes, stripes[..., :1].expand_as(stripes))
        assert ((stripes[..., 0] == 0).sum(dim=1) == 2).all()

    def test_frames_of_a_video(self):
        groups = group_of_token(Stripes(), (4, 3, 3), (9, 27))
        frames = groups.flatten(2)
        assert torch.equal(frames, frames[..., :1].expand_as(frames))

    def test_an_axis_that_is_not_there_is_the_last(self):
        a, b = (group_of_token(Stripes(axis=axis), (4, 6), (8, 16)) for axis in (1, 2))
        assert torch.equal(a, b)

    def test_every_stripe_is_as_likely_as_any_other(self):
        groups = group_of_token(Stripes(), (8, 2), (4, 12), batch=4000)
        share = (groups[:, :, 0] == 0).float().mean(dim=0)
        assert (share - 0.25).abs().max() < 4 * (0.25 * 0.75 / 4000) ** 0.5

    def test_no_token_of_a_shared_stripe_is_always_in_the_same_group(self):
        groups = group_of_token(Stripes(), (4, 4), (3, 5, 8), batch=4000)
        share = (groups == 0).float().mean(dim=0)
        assert (share - 3 / 16).abs().max() < 5 * (3 / 16 * 13 / 16 / 4000) ** 0.5

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"partitions.stripes.axis": 2}, r"stripes\.axis is 2: the data has 2"),
            (
                {"partitions.stripes.width": 8},
                r"stripes\.width is 8: of 8 tokens that is one stripe",
            ),
            (
                {"views.partition": "checkerboard", "partitions.checkerboard.field": 9},
                r"checkerboard\.field is 9: of 8 tokens that is one field",
            ),
        ],
    )
    def test_what_the_grid_does_not_have_is_refused(self, settings, said):
        with pytest.raises(UserError, match=said):
            resolved("sra-dts-as", {"views.partition": "stripes", **settings})

    @pytest.mark.parametrize("sizes", [(10, 54), (20, 20, 24)])
    def test_at_most_one_stripe_is_shared_between_two_groups(self, sizes):
        groups = group_of_token(Stripes(), (8, 8), sizes)
        mixed = (groups != groups[:, :, :1]).any(dim=2).sum(dim=1)
        assert (mixed <= len(sizes) - 1).all()


class TestTubes:
    def test_are_the_same_places_at_all_times(self):
        groups = group_of_token(Tubes(), (4, 3, 3), (12, 24))
        assert torch.equal(groups, groups[:, :1].expand_as(groups))

    def test_every_place_is_as_likely_as_any_other(self):
        groups = group_of_token(Tubes(), (2, 2, 4), (4, 12), batch=4000)
        share = (groups[:, 0] == 0).float().mean(dim=0)
        assert (share - 0.25).abs().max() < 4 * (0.25 * 0.75 / 4000) ** 0.5


class TestCheckerboard:
    @pytest.mark.parametrize(
        ("shape", "field"), [((8, 8), 1), ((8, 8), 2), ((8,), 2), ((4,) * 3, 1)]
    )
    def test_equal_halves_are_the_two_colours(self, shape, field):
        tokens = math.prod(shape)
        groups = group_of_token(Checkerboard(field=field), shape, (tokens // 2,) * 2)
        diagonal = (TokenGrid(shape, 1).coordinates() // field).sum(dim=1) % 2
        colours = diagonal.reshape(shape)
        first = [torch.equal(sample, colours) for sample in groups]
        second = [torch.equal(sample, 1 - colours) for sample in groups]
        assert all(a or b for a, b in zip(first, second, strict=True))
        assert 60 < sum(first) < 140  # of 200: either colour may come first

    def test_thirds_are_three_colours(self):
        groups = group_of_token(Checkerboard(), (6, 6), (12, 12, 12))
        diagonal = TokenGrid((6, 6), 1).coordinates().sum(dim=1).reshape(6, 6)
        for sample in groups:
            shift = (sample - diagonal) % 3
            assert (shift == shift[0, 0]).all()

    def test_a_smaller_group_lies_within_one_colour(self):
        groups = group_of_token(Checkerboard(), (8, 8), (16, 48))
        diagonal = (TokenGrid((8, 8), 1).coordinates().sum(dim=1) % 2).reshape(8, 8)
        for sample in groups:
            assert len(set(diagonal[sample == 0].tolist())) == 1
        # and is drawn at random there
        assert len({tuple(sample.flatten().tolist()) for sample in groups}) > 190


class TestRandom:
    def test_every_token_is_as_likely_in_a_group(self):
        groups = group_of_token(Random(), (4, 4), (4, 12), batch=8000)
        share = (groups == 0).float().mean(dim=0)
        assert (share - 0.25).abs().max() < 4 * (0.25 * 0.75 / 8000) ** 0.5
