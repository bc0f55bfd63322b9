"""One batch becomes what student and teacher see: token groups, timesteps and noise (Eq. 5 to 7).

Tokens are sorted once, here, so that every group is one contiguous slice. All layers but attention
work per token and the losses compare in the same order, so nothing is sorted back in training.
"""

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from selfalign.config import FlowConfig, RunConfig, group_sizes, whole_images
from selfalign.flow import PATHS


def patchify(images: Float[Tensor, "B C H W"], patch_size: int) -> Float[Tensor, "B N P"]:
    """Cut images into row-major patches, each flattened as (row, column, channel)."""
    batch, channels, height, width = images.shape
    p = patch_size
    patches = images.reshape(batch, channels, height // p, p, width // p, p)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, p * p * channels)


def unpatchify(
    tokens: Float[Tensor, "B N P"], patch_size: int, image_size: tuple[int, int]
) -> Float[Tensor, "B C H W"]:
    """The inverse of `patchify`."""
    rows, columns = (side // patch_size for side in image_size)
    p = patch_size
    patches = tokens.reshape(len(tokens), rows, columns, p, p, -1)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, *image_size)


@dataclass(frozen=True)
class TokenGroups:
    """How tokens are sorted into groups, each a contiguous slice of the same size in every sample."""

    order: Int[Tensor, "B N"] | None
    """`order[b, i]` is the image position of the i-th token; None is the image's own order."""
    sizes: tuple[int, ...]
    """Tokens in each of the K groups."""
    whole: int = 0
    """The first `whole` samples of the batch are whole images: their groups attend to each other."""
    separate: bool = False
    """Whether the tokens of the other samples attend within their group only (Eq. 8 and 9)."""

    @property
    def ends(self) -> tuple[int, ...]:
        """Where each group's tokens end."""
        return tuple(itertools.accumulate(self.sizes))

    @property
    def slices(self) -> tuple[slice, ...]:
        """Where each group's tokens are."""
        ends = zip(self.ends, self.sizes, strict=True)
        return tuple(slice(end - size, end) for end, size in ends)

    def sort(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Bring tokens from image order into group order; those of one image (1 N D) for every image."""
        return tokens if self.order is None else _reorder(tokens, self.order)

    def restore(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Bring tokens from group order back into image order."""
        return tokens if self.order is None else _reorder(tokens, self.order.argsort(dim=1))

    def broadcast(self, values: Float[Tensor, "B K D"]) -> Float[Tensor, "B N D"]:
        """Give every token the values of its group."""
        slices = [values[:, k, None].expand(-1, n, -1) for k, n in enumerate(self.sizes)]
        return torch.cat(slices, dim=1)


def _reorder(tokens: Float[Tensor, "B N D"], order: Int[Tensor, "B N"]) -> Float[Tensor, "B N D"]:
    """`tokens[b, order[b, i]]` at i, in whole rows: a gather takes them number by number."""
    images, count, _ = tokens.shape
    first = count * torch.arange(images, device=order.device)
    return functional.embedding(first[:, None] + order, tokens.flatten(0, 1))


@dataclass(frozen=True)
class Draw:
    """Every random number of one training step, so that a step can be repeated or prescribed."""

    noise: Float[Tensor, "B C H W"]
    """epsilon, shared by all groups and by student and teacher."""
    timesteps: Float[Tensor, "B K"]
    """tau: one timestep per group (all equal under single timesteps), before whole-image mixing."""
    order: Int[Tensor, "B N"] | None
    """A permutation of each image's tokens; group k is its k-th slice. None with one group."""
    teacher_interval: Float[Tensor, "B K"]
    """What the `sra` teacher's timesteps lie below the student's."""
    label_dropout: Bool[Tensor, "B"]
    """Samples whose label the student does not see."""


def sample_timesteps(
    flow: FlowConfig, count: int, generator: torch.Generator
) -> Float[Tensor, "count"]:
    """Draw timesteps from p(t)."""
    device = generator.device
    if flow.timestep_distribution == "uniform":
        return torch.rand(count, generator=generator, device=device)
    normal = torch.randn(count, generator=generator, device=device)
    return torch.sigmoid(flow.logit_mean + flow.logit_std * normal)


def draw_views(
    config: RunConfig, shape: tuple[int, int, int, int] | torch.Size, generator: torch.Generator
) -> Draw:
    """Draw all randomness of one training step, on the generator's device. Nothing else draws.

    What all recipes share (noise, dropped labels, the first group's timesteps) is drawn before what
    only some of them need, so that two recipes at the same seed see the same noise.

    Args:
        config: the run's tree; flow, views, alignment and the patch size are used.
        shape: (B, C, H, W) of the batch.
        generator: the step's generator.
    """
    batch, _, height, width = shape
    device = generator.device
    groups, patch = config.num_groups, config.model.patch_size
    num_tokens = (height // patch) * (width // patch)

    noise = torch.randn(*shape, generator=generator, device=device)
    dropout = torch.rand(batch, generator=generator, device=device)
    timesteps = [sample_timesteps(config.flow, batch, generator)]
    teacher_interval = [torch.rand(batch, generator=generator, device=device)]
    order = None
    if groups > 1:
        order = torch.rand(batch, num_tokens, generator=generator, device=device).argsort(dim=1)
    for _ in range(1, groups):
        dual = config.views.timesteps == "dual"
        timesteps.append(sample_timesteps(config.flow, batch, generator) if dual else timesteps[0])
        teacher_interval.append(torch.rand(batch, generator=generator, device=device))
    return Draw(
        noise=noise,
        timesteps=torch.stack(timesteps, dim=1),
        order=order,
        teacher_interval=config.alignment.teacher_interval * torch.stack(teacher_interval, dim=1),
        label_dropout=dropout < config.views.class_dropout,
    )


@dataclass(frozen=True)
class View:
    """What one network sees: noised tokens in group order, their timesteps, and their groups."""

    tokens: Float[Tensor, "B N P"]
    timesteps: Float[Tensor, "B K"]
    groups: TokenGroups


@dataclass(frozen=True)
class Views:
    """The student's view, its regression target (Eq. 2), and the teacher's view, if there is one."""

    student: View
    target: Float[Tensor, "B N P"]
    teacher: View | None


def make_views(config: RunConfig, x0: Float[Tensor, "B C H W"], draw: Draw) -> Views:
    """Noise a batch as student and teacher see it (Eq. 1, 2, 5 to 7).

    Args:
        config: the run's tree; flow, views, alignment and the patch size are used.
        x0: clean samples.
        draw: the step's randomness.
    """
    path, patch = PATHS[config.flow.path], config.model.patch_size
    tokens = patchify(x0, patch)
    batch, num_tokens, _ = tokens.shape
    groups = TokenGroups(
        order=draw.order,
        sizes=group_sizes(config.views.mask_ratios, num_tokens),
        whole=whole_images(config.views.whole_image_fraction, batch),
        separate=config.views.attention == "separated",
    )
    x0_tokens = groups.sort(tokens)
    noise_tokens = groups.sort(patchify(draw.noise, patch))

    def noised(timesteps: Tensor, groups: TokenGroups) -> View:
        t = groups.broadcast(timesteps[..., None])
        return View(path.interpolate(x0_tokens, noise_tokens, t), timesteps, groups)

    def with_whole_images(timesteps: Tensor) -> Tensor:
        """Whole images carry one timestep: the second group's, as in the released code."""
        if groups.whole == 0 or timesteps.shape[1] == 1:
            return timesteps
        whole = timesteps[: groups.whole, 1:2].expand(-1, timesteps.shape[1])
        return torch.cat([whole, timesteps[groups.whole :]])

    student = noised(with_whole_images(draw.timesteps), groups)
    target = path.velocity(x0_tokens, noise_tokens, groups.broadcast(student.timesteps[..., None]))

    alignment = config.alignment
    if alignment.target == "none":
        return Views(student, target, teacher=None)
    # A teacher without groups sees the whole image at one timestep; its tokens keep the student's
    # order, so that features compare without sorting.
    if alignment.teacher_groups:
        teacher_groups, timesteps, interval = groups, draw.timesteps, draw.teacher_interval
    else:
        teacher_groups = TokenGroups(order=draw.order, sizes=(num_tokens,))
        timesteps, interval = draw.timesteps[:, :1], draw.teacher_interval[:, :1]
    if alignment.teacher_timestep == "sra":
        timesteps = (timesteps - interval).clamp(0, 1)
    elif alignment.teacher_timestep == "self-flow":
        timesteps = draw.timesteps.amin(dim=1, keepdim=True).expand_as(timesteps)
    return Views(student, target, noised(with_whole_images(timesteps), teacher_groups))
