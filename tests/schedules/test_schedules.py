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
    assert parts.names("schedule") == ("independent", "single")
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
