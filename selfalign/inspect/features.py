"""Features of a model's blocks at chosen timesteps, on the same images and noise for every model."""

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from selfalign.flow import PATHS
from selfalign.inspect.scenes import SEED, batches
from selfalign.network import AnyBackbone, Backbone, Tap
from selfalign.randomness import make_generator
from selfalign.tokens import one_group

MOST_BLOCKS = 6
"""Blocks of a deep model that are looked at, evenly spread."""


def chosen_blocks(depth: int, most: int = MOST_BLOCKS) -> tuple[int, ...]:
    """At most so many blocks, the last one among them, counted from 1."""
    count = min(depth, most)
    return tuple(round((k + 1) * depth / count) for k in range(count))


def noised_images(
    x0: Float[Tensor, "M C *sides"], path: str, t: float, purpose: str, draw: int = 0
) -> Float[Tensor, "M C *sides"]:
    """Images at timestep t (Eq. 1); their noise is a function of purpose and draw, whatever the t."""
    noise = torch.randn(x0.shape, generator=make_generator(SEED, f"{purpose} noise", draw))
    return PATHS[path].interpolate(x0, noise, torch.tensor(t))


@torch.no_grad()
def block_features(
    model: Backbone,
    xt: Float[Tensor, "M C *sides"],
    t: float,
    blocks: Sequence[Tap],
    labels: Int[Tensor, "M"] | None = None,
) -> Iterator[dict[Tap, Float[Tensor, "b N D"]]]:
    """The tokens' features after blocks, a batch at a time, in float32 on the CPU.

    Args:
        model: in eval mode; any backbone.
        xt: noised images.
        t: their timestep.
        blocks: whose output, counted from 1, or modules by name.
        labels: one per image; None tells the model none.
    """
    groups = one_group(model.num_tokens)
    for part in batches(len(xt), model.num_tokens):
        tokens = model.grid.patchify(xt[part].to(model.device, model.dtype))
        times = torch.full((len(tokens), 1), t, device=model.device, dtype=model.dtype)
        chosen = torch.full((len(tokens),), model.null_label) if labels is None else labels[part]
        found = model.features(tokens, times, chosen.to(model.device), groups, tuple(blocks))
        yield {block: found[block].float().cpu() for block in blocks}


def mean_tokens(
    model: Backbone,
    x0: Float[Tensor, "M C *sides"],
    path: str,
    t: float,
    blocks: Sequence[Tap],
    purpose: str,
    draws: int = 1,
    tick: Callable[[], None] = lambda: None,
) -> dict[Tap, Float[Tensor, "M D"]]:
    """Mean token of every image after each block, averaged over noises, without a label.

    Args:
        model: in eval mode; any backbone.
        x0: clean images.
        path: name of the path of Eq. 1.
        t: the timestep.
        blocks: counted from 1.
        purpose: names the noise.
        draws: noises per image.
        tick: called after every noise.
    """
    total: dict[Tap, Tensor] = {}
    for draw in range(draws):
        xt = noised_images(x0, path, t, purpose, draw)
        parts = list(block_features(model, xt, t, blocks))
        for block in blocks:
            means = torch.cat([part[block].mean(dim=1) for part in parts]) / draws
            total[block] = means if block not in total else total[block] + means
        tick()
    return total


def untrained(model: AnyBackbone) -> AnyBackbone:
    """The same network with random weights: Xavier's for matrices, one for norms, zero for biases.

    Also where training starts from zeros: with closed gates every block would be the identity.
    """
    fresh = copy.deepcopy(model)
    generator = make_generator(SEED, "untrained")
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            if parameter.ndim > 1:
                on_cpu = torch.empty(parameter.shape)
                nn.init.xavier_uniform_(on_cpu.flatten(1), generator=generator)
                parameter.copy_(on_cpu)
            else:
                parameter.fill_(name.endswith(".weight"))
    return fresh
