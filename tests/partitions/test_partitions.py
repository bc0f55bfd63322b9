"""All partitions: permutations of the tokens, functions of the generator, and p(t) for every token."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from support import resolved, timestep_of_token

from selfalign import TokenGrid, UserError, draw_views, make_generator, parts
from selfalign.partitions import Ungrouped
from selfalign.partitions.blocks import Blocks
from selfalign.partitions.checkerboard import Checkerboard
from selfalign.partitions.random import Random
from selfalign.partitions.stripes import Stripes
from selfalign.partitions.tubes import Tubes
from selfalign.tokens import group_sizes
from selfalign.views import make_views

NAMES = ("blocks", "checkerboard", "random", "stripes", "tubes")
BY_CONTENT = ("clusters", "difficulty", "energy")  # test_content.py
GRIDS = [(24,), (6, 8), (2, 3, 4)]
SETTINGS = [
    Random(),
    Blocks(),
    Blocks(largest_aspect=1.0),
    Blocks(largest_aspect=9.0),
    Stripes(),
    Stripes(axis=1, width=2),
    Stripes(axis=2, width=3),
    Checkerboard(),
    Checkerboard(field=2),
    Tubes(),
]


def order_of(partition, shape, sizes, batch=16, seed=0):
    generator = make_generator(seed, "partition")
    return partition.order(Ungrouped(TokenGrid(shape, 1), sizes, batch, generator))


def test_these_are_all():
    assert set(parts.names("partition")) == {*NAMES, *BY_CONTENT}


@pytest.mark.parametrize("partition", SETTINGS, ids=repr)
@pytest.mark.parametrize("shape", GRIDS, ids=str)
@pytest.mark.parametrize("groups", [2, 3, 4, 5])
class TestOrder:
    def sizes(self, shape, groups):
        ratios = [k + 1 for k in range(groups)]
        return group_sizes(
            [ratio / sum(ratios) for ratio in ratios], TokenGrid(shape, 1).num_tokens
        )

    def test_every_row_is_a_permutation(self, partition, shape, groups):
        order = order_of(partition, shape, self.sizes(shape, groups))
        tokens = TokenGrid(shape, 1).num_tokens
        assert order.dtype == torch.int64
        assert torch.equal(order.sort(dim=1).values, torch.arange(tokens).expand(16, -1))

    def test_is_a_function_of_the_generator(self, partition, shape, groups):
        if isinstance(partition, Tubes) and len(shape) == 1:
            pytest.skip("a signal is one tube, which is split in time")
        sizes = self.sizes(shape, groups)
        first = order_of(partition, shape, sizes)
        torch.manual_seed(99)  # the global generator has no say
        assert torch.equal(order_of(partition, shape, sizes), first)
        assert not torch.equal(order_of(partition, shape, sizes, seed=1), first)
        # and samples differ
        assert not torch.equal(first, first[:1].expand_as(first))


@given(
    partition=st.sampled_from(SETTINGS),
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple),
    ratios=st.lists(st.floats(0.1, 1), min_size=2, max_size=5),
    seed=st.integers(0, 999),
)
@settings(max_examples=150, deadline=None)
def test_any_grid_and_any_sizes_give_permutations(partition, shape, ratios, seed):
    tokens = TokenGrid(shape, 1).num_tokens
    sizes = group_sizes([ratio / sum(ratios) for ratio in ratios], tokens)
    if min(sizes) > 0:
        order = order_of(partition, shape, sizes, batch=3, seed=seed)
        assert torch.equal(order.sort(dim=1).values, torch.arange(tokens).expand(3, -1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ratios", [(0.25, 0.75), (0.5, 0.5), (0.2, 0.3, 0.5)])
def test_every_tokens_timestep_is_distributed_as_p_of_t(name, ratios):
    """A token's place may say which group it is in, but never which timestep that group got."""
    changes = {"views.partition": name, "views.mask_ratios": ratios}
    config = resolved("sra-dts-as", changes, image_size=(3, 4))
    draw = draw_views(config, (10_000, 1, 3, 4), make_generator(0, "views"))
    view = make_views(config, torch.zeros_like(draw.noise), draw).student
    for token in timestep_of_token(view).T:
        # 144 comparisons in all: one in a thousand would not be rare.
        assert stats.kstest(token.numpy(), "uniform").pvalue > 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_is_chosen_by_name(name):
    config = resolved("sra-dts-as", {"views.partition": name})
    assert config.partition == parts.get("partition", name)()
    draw = draw_views(config, (3, 1, 8, 8), make_generator(0, "views"))
    assert draw.order.shape == (3, 64)


@pytest.mark.parametrize("names", list(itertools.combinations(NAMES, 2)), ids=str)
def test_partitions_share_noise_and_the_first_groups_timesteps(names):
    draws = []
    for name in names:
        config = resolved("sra-dts-as", {"views.partition": name})
        draws.append(draw_views(config, (8, 1, 8, 8), make_generator(0, "views")))
    for field in ("noise", "label_dropout"):
        assert torch.equal(getattr(draws[0], field), getattr(draws[1], field))
    assert torch.equal(draws[0].timesteps[:, 0], draws[1].timesteps[:, 0])


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("views.partition", "rings", ["rings", "blocks, checkerboard, clusters"]),
        ("partitions.blocks.largest_aspect", 0.5, ["0.5", "from 1"]),
        ("partitions.stripes.axis", 3, ["3", "0 (rows"]),
        ("partitions.stripes.axis", -1, ["-1"]),
        ("partitions.stripes.width", 0, ["0", "from 1"]),
        ("partitions.checkerboard.field", 0, ["0", "from 1"]),
        ("partitions.checkerboard.field", 1.5, ["1.5", "a whole number"]),
    ],
)
def test_refused(setting, value, words):
    with pytest.raises(UserError) as error:
        resolved("sra-dts-as", {setting: value})
    assert [word for word in [setting, *words] if word not in str(error.value)] == []
