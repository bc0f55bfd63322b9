"""The same images, token groups and noise for every model, and a model's errors on them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfalign.config import ResolvedConfig
from selfalign.data.source import Split
from selfalign.errors import UserError
from selfalign.evaluation.estimate import Estimate
from selfalign.flow import PATHS, Path
from selfalign.network import Backbone
from selfalign.partitions import Ungrouped
from selfalign.randomness import make_generator
from selfalign.tokens import TokenGroups, group_sizes
from selfalign.views import View, noised

SEED = 0  # not the run's: two models compare on the same images, groups and noise
PROBING = (0.25, 0.75)
"""Shares of the two groups that a model is shown which was trained on one: the paper's."""
BATCH_TOKENS = 4096
"""Tokens at once: enough to keep a processor busy, few enough for its memory."""


@dataclass(frozen=True)
class Scene:
    """Images cut into two token groups, in group order, and the noise that goes with them."""

    clean: Float[Tensor, "M N P"]
    noise: Float[Tensor, "M N P"]
    labels: Int[Tensor, "M"]
    groups: TokenGroups
    path: Path

    def __len__(self) -> int:
        return len(self.clean)

    def separated(self, separate: bool) -> "Scene":
        """The same with attention within groups only, or among all tokens."""
        return replace(self, groups=replace(self.groups, separate=separate))

    def view(
        self, part: slice, timesteps: Sequence[float], like: Backbone
    ) -> tuple[View, Float[Tensor, "b N P"]]:
        """Some of the images at these timesteps of the groups, and the velocity of the path (Eq. 1, 2).

        Args:
            part: which images.
            timesteps: one per group.
            like: whose device and dtype they are to have.
        """
        device, dtype = like.device, like.dtype
        order = self.groups.order
        groups = replace(self.groups, order=None if order is None else order[part].to(device))
        clean, noise = (x[part].to(device, dtype) for x in (self.clean, self.noise))
        t = torch.tensor(timesteps, dtype=torch.float32).to(device, dtype).expand(len(clean), -1)
        at = groups.broadcast(t[..., None])
        return noised(clean, noise, self.path, t, groups), self.path.velocity(clean, noise, at)


def make_scene(
    config: ResolvedConfig,
    split: Split,
    count: int,
    purpose: str,
    shares: Sequence[float] = (),
    classes: Int[Tensor, "K"] | None = None,
) -> Scene:
    """Images of a split in two groups, as the config's partition has them.

    Partitions that ask a teacher are random here. A recipe of one group is shown two random ones of the
    paper's shares; of more than two, all but the first count as one.

    Args:
        config: a resolved tree.
        split: whose images.
        count: how many images at most.
        purpose: names the draw: the same purpose gives the same images, groups and noise.
        shares: of the two groups' tokens; left out: the config's.
        classes: those whose images are shown; left out: all.

    Raises:
        UserError: there are not two tokens to tell apart.
    """
    x0, labels = read_images(split, count, purpose, classes)
    grid, several = config.grid, config.num_groups > 1
    given = shares or (config.views.mask_ratios if several else PROBING)
    sizes = group_sizes((given[0], 1 - given[0]), grid.num_tokens)
    if min(sizes) < 1:
        raise UserError(
            f"model.size is {config.model.size!r}: cuts an image into {grid.num_tokens} tokens, and two "
            "groups need at least one each"
        )
    partition = config.partition if several else config.partitions["random"]
    path = PATHS[config.flow.path]
    noise = torch.randn(x0.shape, generator=make_generator(SEED, f"{purpose} noise"))
    generator = make_generator(SEED, f"{purpose} order")
    order = partition.order(Ungrouped(grid, sizes, len(x0), generator, x0, noise, path))
    groups = TokenGroups(order, sizes, separate=several and config.views.attention == "separated")
    clean, noise = (groups.sort(grid.patchify(part)) for part in (x0, noise))
    return Scene(clean, noise, labels, groups, path)


def read_images(
    split: Split, count: int, purpose: str, classes: Int[Tensor, "K"] | None = None
) -> tuple[Float[Tensor, "M C *sides"], Int[Tensor, "M"]]:
    """The first `count` images of an order that is the purpose's own, and their labels.

    Args:
        split: whose images.
        count: how many at most.
        purpose: names the order.
        classes: those whose images are read; left out: all.

    Raises:
        UserError: the split has no image of these classes.
    """
    order = torch.randperm(len(split), generator=make_generator(SEED, f"{purpose} images"))
    if classes is not None:
        order = order[torch.isin(split.labels[order], classes)]
        if not len(order):
            raise UserError(f"{purpose}: there is no image of the {len(classes)} classes")
    return split.read(order[:count].tolist())


def batches(count: int, num_tokens: int) -> Sequence[slice]:
    """Parts of `count` samples whose tokens are computed at once."""
    size = max(1, BATCH_TOKENS // num_tokens)
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


@torch.no_grad()
def token_errors(
    model: Backbone,
    scene: Scene,
    timesteps: Sequence[float],
    told: Sequence[float] | None = None,
) -> Float[Tensor, "M N"]:
    """Squared error of every token's velocity (Eq. 2), in group order, mean over its values, in float64.

    Args:
        model: in eval mode, on any device.
        scene: what it is shown, with the images' labels.
        timesteps: of the two groups.
        told: what the model is told that they are; left out: the truth.
    """
    errors = []
    for part in batches(len(scene), model.num_tokens):
        view, target = scene.view(part, timesteps, model)
        said = view.timesteps
        if told is not None:
            said = torch.tensor(told, dtype=torch.float32).to(said).expand_as(said)
        output = model(view.tokens, said, scene.labels[part].to(model.device), view.groups)
        errors.append((output.velocity - target).square().mean(dim=2).double().cpu())
    return torch.cat(errors)


def mean_of(values: Float[Tensor, "M"]) -> Estimate:
    """A mean over images, with its standard error for the choice of images."""
    count = len(values)
    error = float(values.std() / count**0.5) if count > 1 else 0.0
    return Estimate(float(values.mean()), error)
