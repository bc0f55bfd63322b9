"""Released checkpoints of SiT, REPA, Self-Flow, SRA and DiT.

Other conventions are translated here, once, in the weights: what comes out is an ordinary `SiT` at
t = 1 is noise, which every solver and tool takes. All of it is exact:

- Self-Flow embeds patches flattened as (channel, row, column) by a linear layer: reshaped, that is
  a convolution's weight.
- SiT and Self-Flow evaluate their network at 1 - t, and it points towards data: the flip is folded
  into the timestep embedder, the sign into the last layer (`turn_around`).
- A learned sigma, which SiT and Self-Flow never use, is cut off the last layer.

DiT predicts noise at 1,000 diffusion steps, not a velocity, and keeps a type of its own.
"""

import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from selfalign.backbones.sit.model import SiT
from selfalign.backbones.sit.sizes import SIZES
from selfalign.embedders import embedder_frequencies
from selfalign.errors import UserError
from selfalign.heads import ProjectionHead
from selfalign.interop.files import read_weights
from selfalign.tokens import one_group
from selfalign.weights import Weights, differences, listed

Source = Literal["sit", "repa", "self-flow", "sra", "dit"]
"""The project a checkpoint comes from. `sra` stands for SRA's SiTs, with or without DTS and AS."""

SOURCES: tuple[Source, ...] = get_args(Source)
SOURCES_WITHOUT_SIGMA: tuple[Source, ...] = ("sit", "repa", "sra", "dit")
"""Whose checkpoints look alike without learned sigma, projectors and heads."""

DIFFUSION_STEPS = 1000
LABELS = "y_embedder.embedding_table.weight"
LAST_LAYER = ("final_layer.linear.weight", "final_layer.linear.bias")
RANKS = {
    "x_embedder.proj.weight": (2, 4),
    "pos_embed": (3,),
    "t_embedder.mlp.0.weight": (2,),
    LABELS: (2,),
    "blocks.0.attn.qkv.weight": (2,),
    LAST_LAYER[0]: (2,),
}
"""The tensors that dimensions are read from, and how many axes they may have."""
COMMON_CLASSES = (10, 100, 1000)
"""Of well-known data sets: a table of labels with so many rows has perhaps no null class."""


class DiT(nn.Module):
    """A released DiT: noise and variance at integer diffusion steps 0 to 999 (arXiv:2212.09748).

    It has no `velocity`, because its time is not this package's: see `linear_velocity`.

    Args:
        network: the transformer; its outputs are noise and sigma, its timesteps diffusion steps.
    """

    timesteps: Tensor

    def __init__(self, network: SiT) -> None:
        super().__init__()
        self.network = network
        betas = torch.linspace(1e-4, 0.02, DIFFUSION_STEPS, dtype=torch.float64)
        alpha_bar = (1 - betas).cumprod(0)  # x_s = sqrt(alpha_bar)·x0 + sqrt(1 - alpha_bar)·noise
        signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        self.register_buffer("timesteps", (noise / (signal + noise)).float(), persistent=False)

    def forward(
        self, xs: Float[Tensor, "B C H W"], steps: Int[Tensor, "B"], labels: Int[Tensor, "B"]
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B S H W"]]:
        """Noise, and the learned sigma as the network emits it.

        Args:
            xs: samples of the variance-preserving diffusion.
            steps: diffusion steps, 0 to 999; 999 is the noisiest.
            labels: one per image; `network.null_label` for none.

        Returns:
            The noise, and v of log sigma² = (v+1)/2·log beta + (1-v)/2·log beta_tilde (iDDPM,
            Eq. 15), with no channels (S = 0) where the checkpoint has no learned sigma.
        """
        network = self.network
        groups = one_group(network.num_tokens)
        tokens = network(network.grid.patchify(xs), steps[:, None], labels, groups).velocity
        output = network.grid.unpatchify(tokens)
        return output[:, : network.channels], output[:, network.channels :]

    def linear_timesteps(self, steps: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
        """The t of the linear path with the signal-to-noise ratio of each diffusion step."""
        return self.timesteps[steps.long()]

    def linear_velocity(
        self, xt: Float[Tensor, "B C H W"], steps: Int[Tensor, "B"], labels: Int[Tensor, "B"]
    ) -> Float[Tensor, "B C H W"]:
        """The velocity of the linear path at t = `linear_timesteps(steps)`, and at no other t.

        At equal signal-to-noise ratio the two processes differ by a factor only, and x_t and the
        noise give the rest: noise - x0 = (noise - x_t) / (1 - t). So this is exact; between the
        steps DiT was not trained, and the last one lies at t = 0.9937, not at 1.

        Args:
            xt: samples of the linear path at that t.
            steps: diffusion steps, 0 to 999.
            labels: one per image.
        """
        t = self.linear_timesteps(steps)[:, None, None, None]
        noise, _ = self(xt / ((1 - t) ** 2 + t**2).sqrt(), steps, labels)
        return (noise - xt) / (1 - t)


@dataclass(frozen=True)
class Dimensions:
    """What a checkpoint's shapes say: arguments of `SiT`, and whether it has a head."""

    channels: int
    image_size: tuple[int, int]
    patch_size: int
    hidden_size: int
    depth: int
    heads: int
    num_classes: int
    qk_norm: bool
    projection_head: bool
    """Whether there is an `ap_head`."""
    out_channels: int

    def build(self, **changes: int) -> SiT:
        """A model of these dimensions, some of them changed; its head hangs on no particular block."""
        arguments = asdict(self) | changes
        with_head = arguments.pop("projection_head")
        model = SiT(**arguments)
        if with_head:
            model.add_head("ap_head", ProjectionHead(model.hidden_size), tap=self.depth)
        return model


def load_released(
    path: Path | str,
    source: Source | None = None,
    *,
    heads: int | None = None,
    channels: int = 4,
    null_row: bool = True,
) -> SiT:
    """A released SiT, REPA, Self-Flow or SRA checkpoint as a model of this package.

    SRA's and Self-Flow's head becomes `ap_head`; REPA's projectors are left out (`load_projectors`).

    Args:
        path: a .safetensors or .pt file.
        source: the project, where the layout fits more than one (a plain SiT looks like a plain
            DiT); None recognises it.
        heads: attention heads; None takes those of the named size with the same width.
        channels: channels of a Self-Flow checkpoint, whose shapes do not tell; 4 is a VAE latent.
        null_row: whether the last row of the table of labels is the null class. A model that was
            trained without dropping labels has none; it gets one here, the mean of its classes, which
            it has never seen: guidance means nothing for it.

    Raises:
        UserError: the file cannot be read, is of no known layout or of another one than `source`'s,
            or is a DiT, which `load_dit` reads.
    """
    weights = read_weights(path)
    with _naming(path):
        return build_sit(weights, source, heads=heads, channels=channels, null_row=null_row)


def load_dit(path: Path | str, *, heads: int | None = None) -> DiT:
    """A released DiT checkpoint. Arguments and errors as for `load_released`."""
    weights = read_weights(path)
    with _naming(path):
        return build_dit(weights, heads=heads)


def load_projectors(path: Path | str) -> nn.ModuleList:
    """REPA's projectors, each from the raw features of block `encoder_depth` to one encoder's.

    A projector maps (..., D) to (..., Z). The encoder depth is not in the file; REPA's default is 8.

    Raises:
        UserError: the file cannot be read or has no projectors.
    """
    weights = read_weights(path)
    with _naming(path):
        return build_projectors(weights)


def build_sit(
    weights: Weights,
    source: Source | None = None,
    *,
    heads: int | None = None,
    channels: int = 4,
    null_row: bool = True,
) -> SiT:
    """`load_released` for weights in memory."""
    source = _decide(source, recognise(weights))
    if source == "dit":
        raise UserError("this is a DiT, which predicts noise and not a velocity: use load_dit")
    translated, dimensions = translate(weights, source, heads, channels, null_row)
    model = dimensions.build()
    model.load_state_dict(translated)
    return model


def translate(
    weights: Weights,
    source: Source | None = None,
    heads: int | None = None,
    channels: int = 4,
    null_row: bool = True,
) -> tuple[dict[str, Tensor], Dimensions]:
    """Released weights in this package's layout, time and sign, and the dimensions of their model.

    A DiT keeps its time, its sign and its learned sigma. Arguments and errors as for `load_released`.
    """
    source = _decide(source, recognise(weights))
    weights = _in_our_layout(weights, channels)
    if not null_row:
        table = weights[LABELS]
        weights[LABELS] = torch.cat([table, table.mean(dim=0, keepdim=True)])
    elif len(weights[LABELS]) in COMMON_CLASSES:
        warnings.warn(
            f"{LABELS} has {len(weights[LABELS])} rows, which are taken for one class less and the null "
            "class; if all are classes, pass null_row=False, and do not use guidance",
            stacklevel=2,
        )
    dimensions = infer_dimensions(weights, heads)
    _check_shapes(weights, dimensions)
    if source == "dit":
        return weights, dimensions
    weights = _cut_sigma(weights, dimensions)
    if source in ("sit", "self-flow"):
        weights = turn_around(weights, embedder_frequencies())
    return weights, replace(dimensions, out_channels=dimensions.channels)


def build_dit(weights: Weights, *, heads: int | None = None) -> DiT:
    """`load_dit` for weights in memory."""
    translated, dimensions = translate(weights, "dit", heads)
    network = dimensions.build()
    network.load_state_dict(translated)
    return DiT(network)


def build_projectors(weights: Weights) -> nn.ModuleList:
    """`load_projectors` for weights in memory."""
    state = {
        name.removeprefix("projectors."): value
        for name, value in weights.items()
        if name.startswith("projectors.")
    }
    projectors = nn.ModuleList()
    while f"{len(projectors)}.0.weight" in state:
        widths = [
            (state[name].shape[1], state[name].shape[0])
            for layer in (0, 2, 4)
            if (name := f"{len(projectors)}.{layer}.weight") in state and state[name].ndim == 2
        ]
        layers = [layer for width in widths for layer in (nn.Linear(*width), nn.SiLU())]
        projectors.append(nn.Sequential(*layers[:-1]))
    _compare(projectors.state_dict(), state)
    if not projectors:
        raise UserError("no projectors: projectors.0.0.weight is missing")
    projectors.load_state_dict(state)
    return projectors


def recognise(weights: Weights) -> tuple[Source, ...]:
    """The projects whose layout these weights fit, from names and shapes.

    Raises:
        UserError: a tensor that every project has is missing or has too many or too few axes.
    """
    missing = [name for name in RANKS if name not in weights]
    if missing:
        raise UserError(f"not a layout of {', '.join(SOURCES)}: {', '.join(missing)} missing")
    for name, ranks in RANKS.items():
        if weights[name].ndim not in ranks:
            raise UserError(
                f"not a layout of {', '.join(SOURCES)}: {name} has shape "
                f"{tuple(weights[name].shape)}, allowed are {' or '.join(map(str, ranks))} axes"
            )
    if empty := [name for name, value in weights.items() if 0 in value.shape]:
        raise UserError(f"not a layout of {', '.join(SOURCES)}: {listed(empty)} is empty")
    embedder = weights["x_embedder.proj.weight"]
    learned_sigma = len(weights[LAST_LAYER[0]]) == 2 * embedder[0].numel()
    if embedder.ndim == 2:
        return ("self-flow",)
    if any(name.startswith("projectors.") for name in weights):
        return ("repa",)
    if any(name.startswith("ap_head.") for name in weights):
        return ("dit",) if learned_sigma else ("sra",)  # SRA trains DiTs too
    return ("sit", "dit") if learned_sigma else SOURCES_WITHOUT_SIGMA


def infer_dimensions(weights: Weights, heads: int | None = None) -> Dimensions:
    """The dimensions of a model from the shapes of its weights, in this package's layout.

    Args:
        weights: they may be on the meta device.
        heads: attention heads, where they cannot be inferred: from the normalisation of queries, or
            as those of the named size with the same width.

    Raises:
        UserError: the shapes contradict each other, or the number of heads is needed.
    """
    hidden_size, channels, patch_size, _ = weights["x_embedder.proj.weight"].shape
    num_tokens = weights["pos_embed"].shape[1]
    rows = math.isqrt(num_tokens)
    if rows**2 != num_tokens:
        raise UserError(f"pos_embed has {num_tokens} tokens: allowed are square images")
    outputs, position = len(weights[LAST_LAYER[0]]), patch_size**2
    if outputs not in (position * channels, 2 * position * channels):
        raise UserError(
            f"final_layer.linear.weight has {outputs} rows: allowed are {position * channels}, or "
            f"{2 * position * channels} with a learned sigma"
        )
    q_norm = weights.get("blocks.0.attn.q_norm.weight")
    if heads is None and q_norm is not None:
        heads = hidden_size // len(q_norm)
    if heads is None:
        heads = {size.hidden_size: size.heads for size in SIZES.values()}.get(hidden_size)
    if heads is None:
        raise UserError(
            f"the number of heads is not in a checkpoint, and width {hidden_size} is of no named "
            "size: pass heads"
        )
    if heads < 1 or hidden_size % heads:
        raise UserError(f"heads is {heads}: allowed are divisors of the width, {hidden_size}")
    blocks = {match[1] for name in weights if (match := re.match(r"blocks\.(\d+)\.", name))}
    return Dimensions(
        channels=channels,
        image_size=(rows * patch_size, rows * patch_size),
        patch_size=patch_size,
        hidden_size=hidden_size,
        depth=len(blocks),
        heads=heads,
        num_classes=len(weights[LABELS]) - 1,
        qk_norm=q_norm is not None,
        projection_head="ap_head.linear1.weight" in weights,
        out_channels=outputs // position,
    )


def _decide(source: Source | None, fitting: tuple[Source, ...]) -> Source:
    if source is None and len(fitting) == 1:
        return fitting[0]
    if source is None:
        raise UserError(
            f"the layout is that of {' and '.join(fitting)}, which mean different things by it: "
            "say which it is"
        )
    if source not in fitting:
        raise UserError(f"the layout is that of {' or '.join(fitting)}, not of {source}")
    return source


def _in_our_layout(weights: Weights, channels: int) -> dict[str, Tensor]:
    """Our names; a linear patch embedding becomes a convolution's weight; no projectors."""
    ours = {
        re.sub(r"^projector\.", "ap_head.", name): value
        for name, value in weights.items()
        if not name.startswith("projectors.")
    }
    embedder = ours["x_embedder.proj.weight"]
    if embedder.ndim == 2:
        patch_size = math.isqrt(embedder.shape[1] // max(1, channels))
        if channels * patch_size**2 != embedder.shape[1]:
            raise UserError(
                f"x_embedder.proj.weight takes {embedder.shape[1]} values per patch, which is no "
                f"square of {channels} channels: pass channels"
            )
        patch = (channels, patch_size, patch_size)
        ours["x_embedder.proj.weight"] = embedder.unflatten(1, patch)
    return ours


def _check_shapes(weights: Weights, dimensions: Dimensions) -> None:
    with torch.device("meta"):
        expected = dimensions.build().state_dict()
    _compare(expected, weights)


def _compare(expected: Weights, weights: Weights) -> None:
    if wrong := differences(expected, weights, dtypes=False):
        raise UserError(f"the weights do not fit: {listed(wrong)}")


def _cut_sigma(weights: Weights, dimensions: Dimensions) -> dict[str, Tensor]:
    """Keep the first C of each patch position's output channels."""
    cut = {
        name: weights[name]
        .unflatten(0, (-1, dimensions.out_channels))[:, : dimensions.channels]
        .flatten(0, 1)
        for name in LAST_LAYER
    }
    return {**weights, **cut}


def turn_around(weights: Weights, frequencies: Float[Tensor, "F"]) -> dict[str, Tensor]:
    """The weights of v(x, t) from those of u(x, t) where v(x, t) = -u(x, 1 - t), and the reverse.

    Linear in the weights, symmetric and its own inverse: so it also turns gradients around.

    The embedder's first layer sees cos(wt) and sin(wt) for each frequency w. With

        cos(w(1-t)) = cos(w)·cos(wt) + sin(w)·sin(wt)
        sin(w(1-t)) = sin(w)·cos(wt) - cos(w)·sin(wt)

    its columns at 1 - t are a reflection of its columns at t, computed here in float64.
    """
    w, first = frequencies.double(), "t_embedder.mlp.0.weight"
    cosine, sine = weights[first].double().chunk(2, dim=1)
    reflected = torch.cat(
        [w.cos() * cosine + w.sin() * sine, w.sin() * cosine - w.cos() * sine], dim=1
    )
    return {**weights, first: reflected.to(weights[first].dtype)} | {
        name: -weights[name] for name in LAST_LAYER
    }


@contextmanager
def _naming(path: Path | str) -> Iterator[None]:
    """Say in errors which file they are about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"checkpoint {str(path)!r}: {error}") from error
