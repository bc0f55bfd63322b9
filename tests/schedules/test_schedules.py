"""Timestep schedules: what each group's timestep depends on."""

import pytest
import torch
from scipy import stats
from support import draw_of, resolved

from selfalign import UserError, parts
from selfalign.schedules.independent import Independent
from selfalign.schedules.single import Single


def counting():
    """A distribution whose draws are 1, 2, 3, …"""
    drawn = []

    def distribution():
        drawn.append(len(drawn) + 1)
        return torch.full((3,), float(drawn[-1]))

    return distribution, drawn


def timesteps_of(schedule, groups):
    distribution, drawn = counting()
    timesteps = []
    for _ in range(groups):
        timesteps.append(schedule.timesteps(timesteps, distribution))
    return torch.stack(timesteps, dim=1), len(drawn)


def test_these_are_all():
    assert parts.names("schedule") == (
        "independent",
        "single",
        "stratified",
        "stratified-independent",
    )
    assert parts.older_names("schedule") == ("dual",)


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_single_draws_once_for_all_groups(groups):
    timesteps, drawn = timesteps_of(Single(), groups)
    assert drawn == 1
    assert torch.equal(timesteps, torch.ones(3, groups))
    assert Single.one_per_sample


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_independent_draws_for_every_group(groups):
    timesteps, drawn = timesteps_of(Independent(), groups)
    assert drawn == groups
    assert torch.equal(timesteps, torch.arange(1.0, groups + 1).expand(3, -1))
    assert not Independent.one_per_sample


@pytest.mark.parametrize("name", ["independent", "dual"])
def test_groups_timesteps_are_independent_and_each_follows_p_of_t(name):
    ratios = {"views.mask_ratios": (0.2, 0.3, 0.5), "views.timesteps": name}
    timesteps = draw_of(resolved("sra-dts-as", ratios, image_size=(4, 4)), batch=5_000).timesteps
    for group in timesteps.T:
        assert stats.kstest(group.numpy(), "uniform").pvalue > 1e-3
    correlation = torch.corrcoef(timesteps.T) - torch.eye(3)
    assert correlation.abs().max() < 0.06


def test_several_timesteps_need_several_groups():
    with pytest.raises(UserError, match=r"views\.timesteps is 'independent': needs two or more"):
        resolved("sit", {"views.timesteps": "independent"})


LOGIT = {
    "flow.timestep_distribution": "logit-normal",
    "flow.logit_mean": 0.4,
    "flow.logit_std": 0.7,
}


@pytest.mark.parametrize("settings", [{}, LOGIT], ids=["uniform", "logit-normal"])
@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("sit", "stratified"),
        ("sra-as", "stratified"),
        ("sra-dts", "stratified-independent"),
        ("sra-dts-as", "stratified-independent"),
    ],
)
def test_every_stratum_has_one_sample(recipe, name, settings):
    config = resolved(recipe, {"views.timesteps": name, **settings}, image_size=(4, 4))
    timesteps = draw_of(config, batch=64).timesteps
    levels = timesteps.double()
    if settings:
        levels = torch.special.ndtr((torch.logit(levels) - 0.4) / 0.7)
    for group in levels.T:
        assert sorted((64 * group).floor().long().tolist()) == list(range(64))
    if name == "stratified":
        assert torch.equal(timesteps, timesteps[:, :1].expand_as(timesteps))
    else:
        assert abs(torch.corrcoef(timesteps.T)[0, 1]) < 0.3, "strata in an order of their own"


def test_a_samples_stratified_timestep_follows_p_of_t():
    config = resolved("sit", {"views.timesteps": "stratified"}, image_size=(4, 4))
    first = [draw_of(config, batch=8, seed=seed).timesteps[0, 0] for seed in range(2_000)]
    assert stats.kstest(torch.stack(first).numpy(), "uniform").pvalue > 1e-3


def test_stratified_timesteps_stay_near_those_of_the_plain_schedule():
    plain, even = (
        draw_of(resolved("sra", {"views.timesteps": name}, image_size=(4, 4)), batch=64).timesteps
        for name in ("single", "stratified")
    )
    assert torch.equal(plain[:, 0].argsort(), even[:, 0].argsort())
