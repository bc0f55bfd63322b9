"""Frozen networks as encoders: clean images in, features over a token grid out."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from selfalign.encoders import IMAGES, parse_word
from selfalign.errors import UserError
from selfalign.parts import get
from selfalign.weights import weights_sha256

if TYPE_CHECKING:
    from selfalign.objective import Pass


class Vision(nn.Module):
    """A network, what is done to images before it, and which of its features are taken.

    Resizing is REPA's: bicubic, without antialiasing.

    Args:
        network: maps normalised images (B, 3, S, S) to token features: (B, N, Z) with or without leading
            class and register tokens, (B, Z, h, w), or the dictionary of DINOv2's own code. Its
            `forward_features` is called where it has one.
        mean, std: per channel, of images in [0, 1].
        side: S.
        module: whose output is taken, by name; empty for the network's.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        side: int,
        module: str = "",
    ) -> None:
        super().__init__()
        self.network, self.side, self.module = network, side, module
        self.class_token = False
        """Whether the class token's features are joined to every token's."""
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w Z"]:
        """Features of images in [0, 1]; grey ones are repeated to three channels."""
        found = self.outputs(images, [self.module] if self.module else [])
        return self._over_grid(found[self.module])

    @torch.no_grad()
    def outputs(self, images: Float[Tensor, "B C H W"], modules: Sequence[str]) -> dict[str, Any]:
        """What modules return on the way, by name, and the network itself, under the empty name."""
        found: dict[str, Any] = {}
        handles = []
        for name in modules:

            def keep(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
                found[name] = output

            handles.append(self.network.get_submodule(name).register_forward_hook(keep))
        try:
            run: Any = getattr(self.network, "forward_features", self.network)
            found[""] = run(self.prepared(images))
        finally:
            for handle in handles:
                handle.remove()
        for name in modules:
            if name not in found:
                raise UserError(
                    f"its features are made without the module {name}: name another (#NAME)"
                )
        return found

    def prepared(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 3 S S"]:
        """Normalised and resized."""
        x = (images.expand(-1, len(self.mean), -1, -1) - self.mean) / self.std
        size = (self.side, self.side)
        return x if x.shape[2:] == size else functional.interpolate(x, size, mode="bicubic")

    def _over_grid(self, output: Any) -> Float[Tensor, "B h w Z"]:
        """A network's output as a grid of tokens."""
        prefix: Tensor | None = None
        if isinstance(output, Mapping) and "x_norm_patchtokens" in output:  # DINOv2's own code
            tokens = output["x_norm_patchtokens"]
            prefix = output["x_norm_clstoken"][:, None]
        elif isinstance(output, Tensor) and output.ndim == 4:
            last = str(getattr(self.network, "output_fmt", "NCHW")).endswith("NHWC")
            grid = output if last else output.permute(0, 2, 3, 1)
            return self._with_class(grid, None)
        elif isinstance(output, Tensor) and output.ndim == 3:
            leading = self._leading_tokens(output.shape[1])
            prefix, tokens = output[:, :leading], output[:, leading:]
        else:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UserError(f"the encoder returns {shape}: needed are features of every token")
        side = math.isqrt(tokens.shape[1])
        return self._with_class(tokens.unflatten(1, (side, side)), prefix)

    def _leading_tokens(self, tokens: int) -> int:
        """How many tokens are none of the image's: class and registers."""
        known = getattr(self.network, "num_prefix_tokens", None)
        counts = range(6) if known is None else (int(known), 0)
        leading = next((n for n in counts if math.isqrt(tokens - n) ** 2 == tokens - n), None)
        if leading is None:
            raise UserError(f"the encoder returns {tokens} tokens, which fill no square grid")
        return leading

    def _with_class(self, grid: Tensor, prefix: Tensor | None) -> Float[Tensor, "B h w Z"]:
        if not self.class_token:
            return grid
        if prefix is None or not prefix.shape[1]:
            raise UserError("the encoder has no class token: leave +class out")
        return torch.cat([grid, prefix[:, :1, None].expand(-1, *grid.shape[1:3], -1)], dim=3)


@functools.lru_cache(maxsize=4)
def open_encoder(word: str, image_side: int, setting: str = "encoder") -> Vision:
    """The encoder that a word names, on the CPU. The same one for the same word.

    Args:
        word: see `selfalign.encoders`.
        image_side: side of the images that it will be given.
        setting: where the word stands, for messages.

    Raises:
        UserError: there is no such encoder, its weights are not here, or it gives no token grid.
    """
    parsed = parse_word(word, setting)
    try:
        vision = get("encoder", parsed.part)().load(parsed.model, image_side, parsed.side)
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:  # what a user's encoder raises is theirs to read
        raise UserError(
            f"{setting} is {word!r}: cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(vision, Vision):
        raise UserError(
            f"{setting} is {word!r}: its load returned {type(vision).__name__}: needed is a "
            "selfalign.vision.Vision"
        )
    vision.class_token = parsed.class_token
    if parsed.module:
        vision.module = parsed.module
        try:
            vision.network.get_submodule(parsed.module)
        except AttributeError as error:
            raise UserError(f"{setting} is {word!r}: it has no module {parsed.module}") from error
    try:
        probe(vision, image_side)
    except UserError as error:
        raise UserError(f"{setting} is {word!r}: {error}") from error
    except Exception as error:  # any network may stand here, and raise what it likes
        raise UserError(
            f"{setting} is {word!r}: takes no images of side {image_side}: {error}"
        ) from error
    return vision


def probe(vision: Vision, image_side: int) -> tuple[int, int, int]:
    """Rows, columns and features of the tokens that an encoder gives: tried on a black image."""
    device = vision.mean.device
    shape = vision(torch.zeros(1, 3, image_side, image_side, device=device)).shape[1:]
    if shape[0] * shape[1] == 1:
        raise UserError(
            f"one token for a whole image of side {vision.side}: name a larger side (@224) or an earlier "
            "module (#NAME)"
        )
    return cast(tuple[int, int, int], tuple(shape))


def clean_images(forward: Pass) -> Float[Tensor, "B 3 H W"]:
    """The clean images of a batch, in [0, 1]: what the model sees, or what came with its latents."""
    if IMAGES in forward.stored:
        return forward.stored[IMAGES].to(forward.x0.dtype).permute(0, 3, 1, 2)
    return (forward.x0 + 1) / 2


def attention_of(vision: Vision, block: int, setting: str) -> Any:
    """The attention module of a block of a vision transformer of timm, counted from 1.

    Raises:
        UserError: there is no such block, or it has no attention.
    """
    blocks: Any = getattr(vision.network, "blocks", ())
    module = getattr(blocks[block - 1], "attn", None) if block <= len(blocks) else None
    if not hasattr(module, "qkv"):
        raise UserError(
            f"{setting}: the encoder has no attention in block {block}; needed is a vision transformer of "
            "timm with as many blocks"
        )
    return module


@torch.no_grad()
def queries_and_keys(
    vision: Vision, images: Float[Tensor, "B C H W"], blocks: Sequence[int]
) -> Float[Tensor, "B N Z"]:
    """Queries and keys of the image's tokens, of blocks of a vision transformer of timm.

    Args:
        vision: the encoder.
        images: in [0, 1].
        blocks: counted from 1.

    Returns:
        Z is (blocks, 2, heads, head size), flattened.
    """
    modules = {
        f"blocks.{block - 1}.attn.qkv": attention_of(vision, block, "encoder") for block in blocks
    }
    found = vision.outputs(images, list(modules))
    leading = int(getattr(vision.network, "num_prefix_tokens", 0))
    pairs = []
    for name, module in modules.items():
        queries, keys, _ = (
            found[name][:, leading:].unflatten(2, (3, module.num_heads, -1)).unbind(2)
        )
        pairs.append(torch.stack([module.q_norm(queries), module.k_norm(keys)], dim=2))
    return torch.stack(pairs, dim=2).flatten(2)


def encoder_sha256(vision: Vision) -> str:
    """Hash of what an encoder is: its weights, its preprocessing, and what is taken of it."""
    facts = torch.tensor([vision.side, vision.class_token], dtype=torch.float64)
    return weights_sha256([*vision.state_dict().items(), (f"module {vision.module}", facts)])
