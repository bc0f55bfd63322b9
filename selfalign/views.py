"""One batch becomes what the networks see: token groups, timesteps and noise (Eq. 1, 2, 5 and 6).

Tokens are sorted once, here, so that every group is one contiguous slice. All layers but attention
work per token and the losses compare in the same order, so nothing is sorted back in training.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selfalign.config import ResolvedConfig, RunConfig, whole_images
from selfalign.flow import PATHS, Path, TimestepDistribution
from selfalign.network import Backbone
from selfalign.partitions import Ungrouped
from selfalign.randomness import WHOLE, Share
from selfalign.sections import ViewsConfig
from selfalign.tokens import Passing, TokenGrid, TokenGroups, group_sizes, without_padding


@dataclass(frozen=True)
class Draw:
    """Every random number of one training step, so that a step can be repeated or prescribed."""

    noise: Float[Tensor, "B C *sides"]
    """epsilon, shared by all groups and by student and teacher."""
    timesteps: Float[Tensor, "B K"]
    """tau: one timestep per group (all equal under single timesteps), before whole-image mixing."""
    order: Int[Tensor, "B N"] | None
    """A permutation of each image's tokens; group k is its k-th slice. None with one group."""
    teacher_interval: Float[Tensor, "B K"]
    """What the EMA teacher's timesteps lie below the student's, where they do."""
    label_dropout: Bool[Tensor, "B"]
    """Samples whose condition the student does not see."""
    more: Mapping[str, Tensor] = field(default_factory=dict)
    """What terms of the objective draw besides, by name."""
    views: ViewsConfig | None = None
    """How this step's batch is grouped; None: as the tree's section says."""


def draw_views(
    config: RunConfig,
    batch: Float[Tensor, "B C *sides"] | torch.Size | tuple[int, ...],
    generator: torch.Generator,
    views: ViewsConfig | None = None,
    teacher: Backbone | None = None,
    condition: Any = None,
    share: Share = WHOLE,
) -> Draw:
    """Draw all randomness of one training step, on the generator's device. Nothing else draws.

    What all recipes share (noise, dropped labels, the first group's timesteps) is drawn before what
    only some of them need, so that two recipes at the same seed see the same noise.

    Processes and micro-batches share a batch: each draws the numbers of all samples and keeps those of its
    own, so that what a sample sees does not depend on how many there are. What compares samples with each
    other (`Term.draw`, whole images) is drawn within a share.

    Args:
        config: the run's tree.
        batch: the clean samples, or their shape, which suffices unless the partition goes by content.
        generator: the step's generator.
        views: how the batch is grouped, from the curriculum; None: as the tree's section says.
        teacher: the EMA model, for partitions that ask it; without one they are random.
        condition: of every sample, for the teacher.
        share: which of the samples of the step's batch these are.
    """
    x0 = batch if isinstance(batch, Tensor) else None
    shape = tuple(batch.shape if isinstance(batch, Tensor) else batch)
    grouping = config.views if views is None else views
    count, device, groups = share.count * shape[0], generator.device, len(grouping.mask_ratios)
    grid = TokenGrid(shape[2:], config.model.patch_size)

    def uniform() -> Float[Tensor, "B"]:
        return torch.rand(count, generator=generator, device=device)

    next_timesteps = TimestepDistribution(config.flow, count, generator)
    noise = share.own(torch.randn(count, *shape[1:], generator=generator, device=device))
    dropout = uniform()
    timesteps = [config.schedule.timesteps([], next_timesteps)]
    interval = [uniform()]
    order = None
    if groups > 1:
        sizes, path = group_sizes(grouping.mask_ratios, grid.num_tokens), PATHS[config.flow.path]
        samples = x0, noise, path, teacher, condition
        whole = Ungrouped(grid, sizes, shape[0], generator, *samples, share, config.padded)
        order = config.partition_of(grouping).order(whole)
    for _ in range(1, groups):
        timesteps.append(config.schedule.timesteps(timesteps, next_timesteps))
        interval.append(uniform())
    more: dict[str, Tensor] = {}
    for term in config.used_terms().values():
        for _ in range(share.index + 1):  # other numbers for every share
            drawn = term.draw(config, shape, generator)
        more |= drawn
    return Draw(
        noise=noise,
        timesteps=share.own(torch.stack(timesteps, dim=1)),
        order=order,
        teacher_interval=config.targets["ema"].lags(
            share.own(torch.stack(interval, dim=1)), config.schedule.one_per_sample
        ),
        label_dropout=share.own(dropout) < config.views.class_dropout,
        more=more,
        views=views,
    )


@dataclass(frozen=True)
class View:
    """What one network sees: noised tokens in group order, their timesteps, and their groups."""

    tokens: Float[Tensor, "B N P"]
    timesteps: Float[Tensor, "B K"]
    groups: TokenGroups


@dataclass(frozen=True)
class Views:
    """A batch in group order: what the student sees of it, and what any network's view is made of."""

    x0: Float[Tensor, "B N P"]
    """Of all tokens; those that the student does not see come last."""
    noise: Float[Tensor, "B N P"]
    path: Path
    student: View
    """What the student sees."""
    target: Float[Tensor, "B n P"]
    """The velocity of the path at the student's view (Eq. 2)."""
    present: Bool[Tensor, "B N"] | None = None
    """Which of all tokens are there; None: all."""
    there: Bool[Tensor, "B n P"] | None = None
    """Which values of the tokens that the student sees are there; None: all."""

    @property
    def groups(self) -> TokenGroups:
        """The student's."""
        return self.student.groups

    def at(self, timesteps: Float[Tensor, "B K"], groups: TokenGroups) -> View:
        """The groups' tokens noised to these timesteps (Eq. 1), one per group; whole images as `noised` has
        it."""
        seen = groups.ends[-1]
        return noised(self.x0[:, :seen], self.noise[:, :seen], self.path, timesteps, groups)


def noised(
    x0: Float[Tensor, "B N P"],
    noise: Float[Tensor, "B N P"],
    path: Path,
    timesteps: Float[Tensor, "B K"],
    groups: TokenGroups,
) -> View:
    """Tokens in group order, noised to a timestep per group (Eq. 1).

    Whole images carry one timestep: the second group's, as in the released code.
    """
    if groups.whole > 0 and timesteps.shape[1] > 1:
        whole = timesteps[: groups.whole, 1:2].expand(-1, timesteps.shape[1])
        timesteps = torch.cat([whole, timesteps[groups.whole :]])
    t = groups.broadcast(timesteps[..., None])
    return View(path.interpolate(x0, noise, t), timesteps, groups)


def make_views(config: ResolvedConfig, x0: Float[Tensor, "B C *sides"], draw: Draw) -> Views:
    """Cut a batch into tokens and sort them into the groups that were drawn.

    Args:
        config: the run's tree.
        x0: clean samples.
        draw: the step's randomness.
    """
    grid, path = config.grid, PATHS[config.flow.path]
    views = config.views if draw.views is None else draw.views
    groups = TokenGroups(
        order=draw.order,
        sizes=group_sizes(views.mask_ratios, grid.num_tokens),
        whole=whole_images(views.whole_image_fraction, len(x0)),
        separate=views.attention == "separated",
    )
    clean, noise = (groups.sort(grid.patchify(samples)) for samples in (x0, draw.noise))
    there = None
    if config.padded:
        clean, noise, there = without_padding(clean, noise)
        groups = replace(groups, present=there.any(dim=2))
    whole, seen, timesteps = groups.present, (clean, noise), draw.timesteps
    if hidden := views.hidden_groups:
        if views.skipped_blocks is None:
            groups, timesteps = groups.kept(hidden), timesteps[:, :-hidden]
            seen = (clean[:, : groups.ends[-1]], noise[:, : groups.ends[-1]])
        else:
            masked = views.hidden_as == "mask"
            groups = replace(groups, passing=Passing(hidden, *views.skipped_blocks, masked))
    student = noised(*seen, path, timesteps, groups)
    t = groups.broadcast(student.timesteps[..., None])
    if there is not None:
        there = there[:, : groups.ends[-1]]
    return Views(clean, noise, path, student, path.velocity(*seen, t), whole, there)
