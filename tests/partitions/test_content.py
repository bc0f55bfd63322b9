"""Partitions by content: what they look at, and that no token's timestep tells of it."""

from dataclasses import replace

import pytest
import torch
from scipy import stats
from support import clean_images, resolved, small_model, timestep_of_token

from selfalign import TokenGrid, draw_views, make_generator
from selfalign.flow import PATHS
from selfalign.partitions import Ungrouped
from selfalign.partitions.clusters import Clusters, k_means
from selfalign.partitions.difficulty import Difficulty
from selfalign.partitions.energy import Energy
from selfalign.student import build_student
from selfalign.tokens import one_group
from selfalign.views import make_views

CONTENT = ("energy", "clusters", "difficulty")


def scene_of(batch=16, sizes=(4, 12), seed=0, teacher=None):
    """A batch of 4×4 tokens whose first row is loud and whose rest is quiet."""
    x0 = 0.01 * torch.randn(batch, 2, 4, 4, generator=make_generator(3, "images"))
    x0[:, :, 0] += torch.tensor([1.0, -1.0, 1.0, -1.0])
    noise = torch.randn(x0.shape, generator=make_generator(4, "images"))
    generator = make_generator(seed, "views")
    condition = torch.zeros(batch, dtype=torch.int64)
    path = PATHS["linear"]
    return Ungrouped(
        TokenGrid((4, 4), 1), sizes, batch, generator, x0, noise, path, teacher, condition
    )


def teacher_of(**settings):
    return small_model(image_size=(4, 4), dtype=torch.float32, **settings)


class TestEnergy:
    def test_is_the_square_of_what_differs_from_the_mean(self):
        scene = scene_of()
        centred = scene.x0 - scene.x0.mean(dim=(2, 3), keepdim=True)
        expected = centred.square().mean(dim=1).flatten(1)
        assert torch.allclose(Energy().scores(scene), expected)

    @pytest.mark.parametrize(("first", "row"), [("high", True), ("low", False)])
    def test_loud_tokens_are_first_or_last(self, first, row):
        order = Energy(first=first, temperature=0.0).order(scene_of())
        place = order[:, :4] if row else order[:, -4:]
        assert torch.equal(place.sort(dim=1).values, torch.arange(4).expand(16, -1))

    def test_either_end_may_be_first(self):
        order = Energy(temperature=0.0).order(scene_of(batch=200))
        loud_first = (order[:, :4] < 4).all(dim=1).float().mean()
        assert 0.35 < loud_first < 0.65
        assert ((order[:, :4] < 4).all(dim=1) | (order[:, -4:] < 4).all(dim=1)).all()

    def test_a_high_temperature_is_random(self):
        order = Energy(first="high", temperature=1e5).order(scene_of(batch=4000))
        share = (order[:, :4] < 4).float().mean().item()
        assert abs(share - 0.25) < 0.03

    def test_equal_tokens_are_split_at_random(self):
        scene = replace(scene_of(batch=4000), x0=torch.zeros(4000, 2, 4, 4))
        order = Energy(temperature=0.0).order(scene)
        share = torch.stack([(order[:, :4] == k).any(dim=1).float().mean() for k in range(16)])
        assert (share - 0.25).abs().max() < 4 * (0.25 * 0.75 / 4000) ** 0.5


class TestTeacher:
    def test_errors_are_those_of_the_velocity(self):
        teacher = teacher_of()
        scene = scene_of(teacher=teacher)
        xt = 0.5 * scene.x0 + 0.5 * scene.noise
        velocity = teacher.velocity(xt, torch.full((16,), 0.5), scene.condition)
        expected = (velocity - (scene.noise - scene.x0)).square().mean(dim=1).flatten(1)
        assert torch.allclose(Difficulty().scores(scene), expected, atol=1e-5)

    def test_features_are_those_of_the_block_at_the_timestep(self):
        teacher = teacher_of()
        scene = scene_of(teacher=teacher)
        tokens = scene.grid.patchify(0.9 * scene.x0 + 0.1 * scene.noise)
        t = torch.full((16, 1), 0.1)
        expected = teacher.features(tokens, t, scene.condition, one_group(16), (2,))[2]
        assert torch.allclose(scene.teacher_features(2, 0.1), expected, atol=1e-5)

    def test_hard_tokens_are_first(self):
        scene = scene_of(teacher=teacher_of())
        errors = scene.teacher_errors(0.5)
        order = Difficulty(first="high", temperature=0.0).order(scene)
        ranked = errors.gather(1, order)
        assert (ranked[:, :-1] >= ranked[:, 1:]).all()

    @pytest.mark.parametrize("partition", [Difficulty(), Clusters()], ids=repr)
    def test_without_a_teacher_the_order_is_random(self, partition):
        order = partition.order(scene_of(batch=4000))
        share = torch.stack([(order[:, :4] == k).any(dim=1).float().mean() for k in range(16)])
        assert (share - 0.25).abs().max() < 4 * (0.25 * 0.75 / 4000) ** 0.5

    def test_leaves_no_gradient(self):
        scene = scene_of(teacher=teacher_of())
        assert not scene.teacher_errors(0.5).requires_grad
        assert not scene.teacher_features(1, 0.1).requires_grad


class TestClusters:
    def test_k_means_finds_what_is_apart(self):
        generator = make_generator(0, "points")
        kinds = torch.arange(12) % 3
        middles = torch.eye(3).repeat(1, 2)
        points = middles[kinds] + 0.05 * torch.randn(5, 12, 6, generator=generator)
        found = k_means(points, torch.tensor([[0, 1, 2]]).expand(5, -1), iterations=3)
        for sample in found:
            assert all(len(set(sample[kinds == kind].tolist())) == 1 for kind in range(3))
            assert len(set(sample.tolist())) == 3

    def test_a_group_holds_whole_clusters_but_for_one(self):
        scene = scene_of(batch=64, sizes=(8, 8), teacher=teacher_of())
        seen = {}
        original = Ungrouped.teacher_features

        def kept(self, tap, timestep):
            seen["features"] = original(self, tap, timestep)
            return seen["features"]

        clusters = Clusters(count=4)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Ungrouped, "teacher_features", kept)
            order = clusters.order(scene)
        again = replace(scene, generator=make_generator(0, "views"))
        torch.rand(64, 16, generator=again.generator)
        torch.rand(64, 4, generator=again.generator)
        seeds = torch.rand(64, 16, generator=again.generator).argsort(dim=1)[:, :4]
        cluster = k_means(seen["features"], seeds, clusters.iterations).gather(1, order)
        runs = (cluster[:, 1:] != cluster[:, :-1]).sum(dim=1) + 1
        kinds = torch.tensor([len(set(row.tolist())) for row in cluster])
        assert torch.equal(runs, kinds), "tokens of a cluster stand together"

    def test_more_clusters_than_tokens_are_as_many_as_tokens(self):
        order = Clusters(count=99).order(scene_of(teacher=teacher_of()))
        assert torch.equal(order.sort(dim=1).values, torch.arange(16).expand(16, -1))


@pytest.mark.parametrize("name", CONTENT)
@pytest.mark.parametrize("ratios", [(0.25, 0.75), (0.2, 0.3, 0.5)])
def test_every_tokens_timestep_is_distributed_as_p_of_t(name, ratios):
    """Also where loud or hard tokens are always in the first group: content tells no timestep."""
    settings = {f"partitions.{name}.first": "high", f"partitions.{name}.temperature": 0.0}
    config = resolved(
        "sra-dts-as",
        {
            "views.partition": name,
            "views.mask_ratios": ratios,
            **(settings if name != "clusters" else {}),
        },
        image_size=(3, 4),
    )
    x0 = clean_images(config, batch=4000)
    teacher = build_student(config)
    labels = torch.zeros(len(x0), dtype=torch.int64)
    draw = draw_views(config, x0, make_generator(0, "views"), None, teacher, labels)
    for token in timestep_of_token(make_views(config, x0, draw).student).T:
        assert stats.kstest(token.numpy(), "uniform").pvalue > 1e-5


@pytest.mark.parametrize("name", CONTENT)
def test_shares_what_is_drawn_before_it_with_random(name):
    draws = []
    for partition in ("random", name):
        config = resolved("sra-dts-as", {"views.partition": partition})
        draws.append(draw_views(config, clean_images(config), make_generator(0, "views")))
    assert torch.equal(draws[0].noise, draws[1].noise)
    assert torch.equal(draws[0].timesteps[:, 0], draws[1].timesteps[:, 0])
