"""Samples that end early: nothing attends to what is not there, and no loss counts it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL
from PIL import Image
from support import draw_of, randomize, resolved, small_model

from selfalign import UserError, recipe
from selfalign.cli import main
from selfalign.data.datasets import open_data
from selfalign.flow import PATHS, velocity_error
from selfalign.objective import Objective
from selfalign.partitions import Ungrouped
from selfalign.randomness import make_generator
from selfalign.runs.start import start_run
from selfalign.student import build_student
from selfalign.terms import over_groups
from selfalign.terms.alignment import distance, normalised
from selfalign.terms.contrastive import NEGATIVES
from selfalign.tokens import TokenGroups, without_padding
from selfalign.training.ema import EMA
from selfalign.views import make_views

LENGTHS = (12, 7, 3, 1)


def padded_config(**changes):
    named = {"data.name": "arrays", "data.sources.arrays.lengths": "lengths", **changes}
    return resolved("sra-dts-as", named, image_size=(12,), channels=2)


def samples(seed=0):
    x0 = torch.randn(4, 2, 12, generator=torch.Generator().manual_seed(seed))
    ends = torch.tensor(LENGTHS)[:, None, None]
    return x0.masked_fill(torch.arange(12) >= ends, torch.nan)


def prepared(seed=0, **changes):
    config = padded_config(**changes)
    student = build_student(config)
    randomize(student, 1, std=0.1)
    teacher = EMA(student, 0.9).model
    labels = torch.arange(4)
    draw = draw_of(config, batch=4, seed=seed)
    return config, student, teacher, labels, draw


def test_tokens_are_those_of_the_shorter_sample():
    model = small_model(image_size=(12,), head_after=None)
    tokens = torch.randn(2, 12, 2, dtype=torch.float64)
    t, labels = torch.rand(2, 1, dtype=torch.float64), torch.tensor([0, 3])
    for length in (1, 5, 12):
        present = (torch.arange(12) < length).expand(2, -1)
        with torch.no_grad():
            found = model(tokens, t, labels, TokenGroups(None, (12,), present=present)).velocity
            order = torch.arange(length).expand(2, -1)
            alone = model(tokens[:, :length], t, labels, TokenGroups(order, (length,))).velocity
        assert torch.allclose(found[:, :length], alone, atol=1e-10)


ALIGNED = [
    {"terms.alignment.target": target, "terms.alignment.projector": projector,
     "terms.alignment.spatial_norm": norm}
    for target in ("ema", "same-pass", "latent")
    for projector in ("sra", "mlp3", "conv")
    for norm in ("none", "zscore")
]  # fmt: skip


@pytest.mark.parametrize("changes", [
    {},
    {"views.attention": "full"},
    {"objective.terms": ("contrastive",)},
    {"objective.terms": ("early-velocity",)},
    {"objective.terms": ("dispersive",)},
    *({"terms.alignment.distance": name} for name in
      ("smooth-l1", "l1", "l2")),
    *({"views.partition": name} for name in ("blocks", "energy", "clusters", "difficulty")),
    *ALIGNED,
], ids=str)  # fmt: skip
def test_what_is_not_there_has_no_say(changes):
    config, student, teacher, labels, draw = prepared(**changes)
    x0, objective = samples(), Objective(config)
    noise = draw.noise.masked_fill(x0.isnan(), 5.0)
    totals, gradients = [], []
    for each in (draw, replace(draw, noise=noise)):
        student.zero_grad()
        totals.append(objective(student, teacher, x0, labels, each).total)
        totals[-1].backward()
        gradients.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
    assert totals[0].isfinite() and torch.allclose(*totals, atol=1e-6)
    for one, other in zip(*gradients, strict=True):
        assert one.isfinite().all() and torch.allclose(one, other, atol=1e-5)


def test_other_samples_are_compared_over_the_places_that_both_have():
    changes = {"objective.terms": ("contrastive", "dispersive")}
    config, student, teacher, labels, draw = prepared(**changes)
    forward = Objective(config).predict(student, teacher, samples(), labels, draw)
    found = Objective(config).losses(forward).terms
    groups = forward.views.groups
    velocity, target = groups.restore(forward.output.velocity), groups.restore(forward.views.target)
    features = groups.restore(forward.output.features[config.terms["dispersive"].tap(config)])
    pairs = []
    for i, length in enumerate(LENGTHS):
        negative = int(draw.more[NEGATIVES][i])
        n = min(length, LENGTHS[negative])
        expected = (velocity[i, :n] - target[negative, :n]).square().mean()
        assert torch.allclose(found["contrastive"][i], -expected, rtol=1e-4)
        for j, other in enumerate(LENGTHS):
            n = min(length, other)
            pairs.append((features[i, :n] - features[j, :n]).square().mean() / 0.5)
    expected = torch.stack(pairs).neg().exp().mean().log()
    assert torch.allclose(found["dispersive"], expected, atol=1e-4)


def test_zscore_is_over_the_tokens_that_are_there():
    features = torch.randn(3, 6, 4)
    present = torch.arange(6) < torch.tensor([6, 3, 1])[:, None]
    found = normalised("zscore", features, present)
    assert torch.allclose(found[0], normalised("zscore", features[:1])[0], atol=1e-5)
    assert torch.allclose(found[1, :3], normalised("zscore", features[1:2, :3])[0], atol=1e-5)
    assert (found[2] == 0).all() and (found[1, 3:] == 0).all()


def test_losses_are_means_over_tokens_that_are_there():
    config, student, teacher, labels, draw = prepared()
    forward = Objective(config).predict(student, teacher, samples(), labels, draw)
    losses = Objective(config).losses(forward)
    present = forward.views.groups.present
    assert present.sum(dim=1).tolist() == list(LENGTHS)
    errors = (forward.output.velocity - forward.views.target).square().mean(dim=2)
    expected = (errors * present).sum(dim=1) / present.sum(dim=1)
    assert torch.allclose(losses.terms["denoising"], expected, atol=1e-5)


@pytest.mark.parametrize("weights", [(), (2.0, 0.5)], ids=str)
@pytest.mark.parametrize("name", ["velocity", "cosine", "l1"])
def test_over_groups_counts_each_token_that_is_there(weights, name):
    generator = torch.Generator().manual_seed(0)
    pair = [torch.randn(3, 8, 5, generator=generator) for _ in range(2)]
    present = torch.rand(3, 8, generator=generator) < 0.6
    present[0, :3] = False  # a group of which nothing is there
    groups = TokenGroups(None, (3, 5), present=present)
    weight = torch.tensor([(weights or (1.0, 1.0))[0]] * 3 + [(weights or (1.0, 1.0))[1]] * 5)
    if name == "velocity":
        each = (pair[0] - pair[1]).square().mean(dim=2)
        expected = (each * weight * present).sum(dim=1) / (weight * present).sum(dim=1)
        found = over_groups(velocity_error, groups, weights, *pair)
    else:
        each = torch.stack(
            [distance(name, *(x[b : b + 1, n : n + 1] for x in pair)) for b in range(3) for n in range(8)]
        ).view(3, 8)  # fmt: skip
        expected = (each * weight * present).sum() / (weight * present).sum()
        found = over_groups(lambda *x: distance(name, *x), groups, weights, *pair)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("changes", [
    {"views.hidden_groups": 1},
    {"targets.ema.groups": False, "targets.ema.timestep": "minimum"},
    {"views.partition": "energy"},
    {"views.partition": "clusters"},
], ids=str)  # fmt: skip
def test_goes_together_with_other_views(changes):
    config, student, teacher, labels, draw = prepared(**changes)
    total = Objective(config)(student, teacher, samples(), labels, draw).total
    total.backward()
    assert total.isfinite()


@pytest.mark.parametrize("name", ["random", "blocks", "energy", "clusters", "difficulty"])
def test_groups_do_not_depend_on_noise_where_nothing_is(name):
    config, _, teacher, labels, _ = prepared(**{"views.partition": name, "model.size": "tiny/2"})
    x0, orders = samples(), []
    randomize(teacher, 1, std=0.1)
    for filling in (0.0, 5.0):
        noise = torch.randn(4, 2, 12, generator=torch.Generator().manual_seed(1))
        noise = noise.masked_fill(x0.isnan(), filling)
        batch = Ungrouped(
            config.grid, (2, 4), 4, make_generator(0, "test"), x0, noise, PATHS["linear"], teacher,
            labels, padded=True,
        )  # fmt: skip
        orders.append(config.partition.order(batch))
    assert torch.equal(*orders)


@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("terms", [(), ("early-velocity",), ("contrastive",)], ids=str)
def test_of_a_token_that_ends_early_what_it_has_is_scored(patch, terms):
    changes = {"model.size": f"tiny/{patch}", "objective.terms": terms}
    config, student, teacher, labels, draw = prepared(**changes)
    x0 = samples()
    noise = draw.noise.masked_fill(x0.isnan(), 5.0)
    losses, velocities = [], []
    for each in (draw, replace(draw, noise=noise)):
        forward = Objective(config).predict(student, teacher, x0, labels, each)
        losses.append(Objective(config).losses(forward))
        velocities.append(forward)
    assert torch.allclose(losses[0].total, losses[1].total, atol=1e-6)
    forward = velocities[0]
    groups = forward.views.groups
    error = groups.restore((forward.output.velocity - forward.views.target).square())
    by_place = error.unflatten(2, (-1, 2)).flatten(1, 2) if patch > 1 else error
    for row, length, found in zip(by_place, LENGTHS, losses[0].terms["denoising"], strict=True):
        assert torch.allclose(found, row[:length].mean(), rtol=1e-4)


def test_a_distance_over_all_tokens_is_refused():
    with pytest.raises(UserError, match="it runs over all tokens"):
        padded_config(**{"terms.alignment.distance": "cosine-over-tokens"})


def test_padding_is_told_from_what_is_there():
    clean = torch.tensor([[[1.0, torch.nan], [torch.nan, torch.nan]]])
    tokens, noise, there = without_padding(clean, torch.full((1, 2, 2), 5.0))
    assert tokens.tolist() == [[[1, 0], [0, 0]]] and noise.tolist() == [[[5, 0], [0, 0]]]
    assert there.tolist() == [[[True, False], [False, False]]]
    config = padded_config()
    views = make_views(config, samples(), draw_of(config, batch=4))
    assert views.student.tokens.isfinite().all()


def write(path: Path, **change):
    generator = np.random.default_rng(0)
    arrays = {
        "samples": generator.normal(size=(40, 2, 12)).astype(np.float32),
        "labels": np.arange(40) % 4,
        "lengths": 3 + np.arange(40) % 10,
    }
    np.savez(path, **{**arrays, **change})


def data_of(path, **changes):
    named = {"data.name": "arrays", "data.root": str(path)}
    named |= {"data.sources.arrays.lengths": "lengths", **changes}
    return named


def test_a_run_of_unequal_lengths(tmp_path: Path, capsys):
    write(tmp_path / "a.npz")
    settings = {**SMALL, **data_of(tmp_path / "a.npz"), "model.size": "tiny/2"}
    config = recipe("sra-dts-as", {**settings, "training.steps": 2})
    source = open_data(config.data)
    read, _ = source.train.read(range(36))
    assert read.isnan().any() and not read[:, :, :3].isnan().any()
    start_run(config, tmp_path / "run", lambda state, values: None)
    assert "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()
    arguments = ["sample", str(tmp_path / "run"), "--num", "4", "--steps", "2"]
    lengths = ["--lengths", "5", "12", "--guidance-scale", "2"]
    assert main([*arguments, "--out", str(tmp_path / "out"), *lengths]) == 0
    with np.load(tmp_path / "out/samples.npz") as found:
        missing = np.isnan(found["arr_0"]).all(axis=2)
    assert missing.sum(axis=1).tolist() == [7, 0, 7, 0]
    assert main([*arguments, "--out", str(tmp_path / "none"), "--lengths", "13"]) == 2
    assert "from 1 to 12" in capsys.readouterr().err
    evaluated = ["evaluate", str(tmp_path / "run"), "--num", "20", "--metrics", "denoising"]
    assert main([*evaluated, "--steps", "1"]) == 0
    (file,) = (tmp_path / "run/evaluation").glob("*/samples.npz")
    with np.load(file) as found:
        there = (found["arr_0"] != 128).any(axis=(1, 3)).sum(axis=1)  # 128 is a byte's zero
        classes = found["arr_1"]
    trained = {
        label: set((~read[source.train.labels == label, 0].isnan()).sum(dim=1).tolist())
        for label in range(4)
    }
    assert all(n in trained[label] for n, label in zip(there, classes, strict=True))
    assert len(set(there)) > 4
    assert "of the class" in (file.parent / "sampling.json").read_text()
    assert main([*evaluated, "--mask-ratio", "0.25"]) == 2
    assert "allowed is 0" in capsys.readouterr().err


def test_videos_that_end_early_are_grey_beyond(tmp_path: Path):
    generator = np.random.default_rng(0)
    videos = generator.uniform(-1, 1, size=(12, 1, 4, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "a.npz", videos=videos, lengths=np.full(12, 2), labels=np.arange(12) % 2)
    settings = {**SMALL, **data_of(tmp_path / "a.npz"), "model.size": "tiny/2"}
    config = recipe("sra-dts-as", {**settings, "training.steps": 1, "training.sample_every": 1})
    start_run(config, tmp_path / "run", lambda state, values: None)
    with Image.open(tmp_path / "run/samples/step_00000001.gif") as moving:
        seen = []
        for number in range(moving.n_frames):
            moving.seek(number)
            seen.append(len(set(np.asarray(moving.convert("L")).flat)))
    assert seen[0] > 9 > seen[-1]  # of the last frames all is grey, but for lines between
    arguments = ["sample", str(tmp_path / "run"), "--num", "2", "--steps", "1", "--lengths", "2"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    with np.load(tmp_path / "out/samples.npz") as found:
        assert (found["arr_0"][:, 2:] == 128).all() and (found["arr_0"][:, :2] != 128).any()


@pytest.mark.parametrize("filling", [np.nan, np.inf, -1e4, 3.0], ids=str)
def test_what_samples_are_filled_up_with_has_no_say(tmp_path: Path, filling):
    generator = np.random.default_rng(0)
    lengths = 3 + np.arange(40) % 10
    whole = generator.normal(2, 1, size=(40, 2, 12)).astype(np.float32)
    beyond = np.arange(12) >= lengths[:, None, None]
    found = []
    for number, value in enumerate((whole, np.where(beyond, np.float32(filling), whole))):
        write(tmp_path / f"{number}.npz", samples=value, lengths=lengths)
        config = recipe("sit", data_of(tmp_path / f"{number}.npz"))
        found.append(open_data(config.data).train.read(range(36))[0])
    assert torch.equal(found[0].nan_to_num(9), found[1].nan_to_num(9))
    there = found[1][found[1].isfinite()]
    assert there.min() == -1 and there.max() == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lengths": np.arange(40)}, ["from 1 to 12"]),
        ({"lengths": np.full(40, 13)}, ["from 1 to 12"]),
        ({"lengths": np.full(39, 3)}, ["a whole number for each"]),
        ({"samples": np.zeros((40, 1, 8, 8))}, ["signals and videos"]),
        ({"samples": np.full((40, 2, 12), np.nan)}, ["sample 0", "not finite"]),
    ],
)
def test_refused(tmp_path: Path, change, words):
    write(tmp_path / "a.npz", **change)
    config = recipe("sit", data_of(tmp_path / "a.npz"))
    with pytest.raises(UserError) as error:
        open_data(config.data)
    assert [word for word in words if word not in str(error.value)] == []
