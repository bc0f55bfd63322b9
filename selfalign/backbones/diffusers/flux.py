"""diffusers' Flux: image and text tokens with rotary places, given explicitly."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from selfalign.backbones.diffusers.model import Adapter, Rows
from selfalign.config import ResolvedConfig
from selfalign.network import Hidden
from selfalign.texts import Read
from selfalign.tokens import TokenGroups

GUIDANCE = 1.0
"""What guidance-distilled models are told while they are trained."""
Rotary = tuple[Float[Tensor, "b S d"], Float[Tensor, "b S d"]]
"""Cosine and sine of every token of every row."""


class _Reached(Exception):  # noqa: N818 – no error: the teacher need not run further
    """The last block that is asked for has run."""


class FluxAdapter(Adapter):
    """A `FluxTransformer2DModel`. Arguments as for `Adapter`.

    Its timesteps and velocities are this package's own: t = 1 is noise, v = noise - x0. Conditions reach it
    as its text does: a label as one token, a caption as its tokens, and both pooled.
    """

    def __init__(self, config: ResolvedConfig, model: Any, pretrained: bool) -> None:
        super().__init__(config, model, pretrained)
        self.hidden_size = model.inner_dim
        width = model.config.joint_attention_dim
        self.y_embedder = config.condition.embedder(self.num_classes, width)
        self.y_pooled = nn.Linear(width, model.config.pooled_projection_dim)
        for module in model.modules():
            if hasattr(module, "set_processor"):
                module.set_processor(RowwiseAttention())

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]  # children of `model`
        """Those of two streams, and then those of one."""
        return nn.ModuleList(
            [*self.model.transformer_blocks, *self.model.single_transformer_blocks]
        )

    def transform(
        self,
        tokens: Float[Tensor, "B N P"],
        timesteps: Float[Tensor, "B K"],
        condition: Any,
        groups: TokenGroups,
        taps: Sequence[int] = (),
        last: int | None = None,
    ) -> Hidden:
        """See `Backbone.transform`."""
        model = self.model
        packed = self._packed(tokens)
        text, pooled = self._read(condition, tokens)
        coordinates = self.grid.coordinates(tokens.device)
        order = groups.order
        places = coordinates.expand(len(tokens), -1, -1) if order is None else coordinates[order]
        kept: Rows = {}
        handles = [
            block.register_forward_hook(_keeper(kept, number, number in taps, number == last))
            for number, block in enumerate(self.blocks, 1)
            if number in taps or number == last
        ]

        def run(samples: slice, seen: slice, group: int) -> Rows:
            kept.clear()
            row, t = packed[samples, seen], timesteps[samples, group]
            rotary = self._rotary(places[samples, seen], text.shape[1])
            guided = torch.full_like(t, GUIDANCE) if model.config.guidance_embeds else None
            unused = row.new_zeros(1, 3)  # places come with the rotary numbers
            try:
                velocity = model(
                    hidden_states=row,
                    encoder_hidden_states=text[samples],
                    pooled_projections=pooled[samples],
                    timestep=t,
                    img_ids=unused,
                    txt_ids=unused,
                    guidance=guided,
                    joint_attention_kwargs={"rows": rotary},
                    return_dict=False,
                )[0]
            except _Reached:
                return dict(kept)
            return {**kept, "velocity": velocity}

        try:
            found = self.rows(groups, len(tokens), run)
        finally:
            for handle in handles:
                handle.remove()
        velocity = found.pop("velocity", None)
        embedded = self._embedded(timesteps, pooled)
        return Hidden(None if velocity is None else self._unpacked(velocity), found, embedded)

    def _packed(self, tokens: Float[Tensor, "B N P"]) -> Float[Tensor, "B N P"]:
        """Patches as Flux has them: the channel comes first, the place within the patch after it."""
        return tokens.unflatten(2, (-1, self.channels)).transpose(2, 3).flatten(2)

    def _unpacked(self, tokens: Float[Tensor, "B N P"]) -> Float[Tensor, "B N P"]:
        """The inverse of `_packed`."""
        return tokens.unflatten(2, (self.channels, -1)).transpose(2, 3).flatten(2)

    def _read(self, condition: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """The condition as tokens (B, L, E), and pooled."""
        width = self.model.config.joint_attention_dim
        if self.y_embedder is None:
            text = like.new_zeros(len(like), 1, width)
            return text, self.y_pooled(text[:, 0])
        read = self.y_embedder(condition)
        if isinstance(read, Read):
            return read.tokens * read.present[..., None], self.y_pooled(read.vector)
        return read[:, None], self.y_pooled(read)

    def _rotary(self, places: Int[Tensor, "b n A"], texts: int) -> Rotary:
        """Of every row's tokens, the text's at place 0 before them."""
        axes = len(self.model.config.axes_dims_rope)
        rows, count, given = places.shape
        ids = places.new_zeros(rows, texts + count, axes)
        ids[:, texts:, axes - given :] = places  # Flux: (0, row, column)
        cos, sin = self.model.pos_embed(ids.flatten(0, 1))
        return cos.unflatten(0, (rows, -1)), sin.unflatten(0, (rows, -1))

    def _embedded(self, timesteps: Tensor, pooled: Tensor) -> Float[Tensor, "B K D"]:
        """Timesteps and conditions as the model embeds them, for heads that ask."""
        groups = timesteps.shape[1]
        t, told = 1000 * timesteps.flatten(), pooled.repeat_interleave(groups, dim=0)
        more = (torch.full_like(t, 1000 * GUIDANCE),) if self.model.config.guidance_embeds else ()
        embedded: Tensor = self.model.time_text_embed(t, *more, told)
        return embedded.unflatten(0, (-1, groups))

    def _starts_at_zero(self, name: str) -> bool:
        ends = (".norm1.linear", ".norm1_context.linear", ".norm.linear", "norm_out.linear")
        return name.endswith((*ends, "model.proj_out"))


def _keeper(kept: Rows, number: int, wanted: bool, is_last: bool) -> Any:
    """A hook that keeps what a block makes of the image's tokens, and stops at the last one."""

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if wanted:
            kept[number] = output[1]
        if is_last:
            raise _Reached

    return keep


class RowwiseAttention:
    """Flux's attention where every row's tokens have places of their own, as rows of groups have.

    diffusers' own takes one list of places for all rows.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "b n D"],
        encoder_hidden_states: Float[Tensor, "b L D"] | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        rows: Rotary | None = None,
    ) -> Any:
        """See diffusers' `FluxAttnProcessor`; `rows` are the places."""

        def of_heads(x: Tensor) -> Float[Tensor, "b n H d"]:
            return x.unflatten(2, (-1, attn.head_dim))

        q = attn.norm_q(of_heads(attn.to_q(hidden_states)))
        k = attn.norm_k(of_heads(attn.to_k(hidden_states)))
        v = of_heads(attn.to_v(hidden_states))
        texts = 0
        if encoder_hidden_states is not None:
            texts = encoder_hidden_states.shape[1]
            own = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text_q, text_k, text_v = (of_heads(layer(encoder_hidden_states)) for layer in own)
            q = torch.cat([attn.norm_added_q(text_q), q], dim=1)
            k = torch.cat([attn.norm_added_k(text_k), k], dim=1)
            v = torch.cat([text_v, v], dim=1)
        if rows is not None:
            q, k = rotated(q, rows), rotated(k, rows)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        out = out.transpose(1, 2).flatten(2).to(q.dtype)
        if encoder_hidden_states is None:
            return out
        image = attn.to_out[1](attn.to_out[0](out[:, texts:]))
        return image, attn.to_add_out(out[:, :texts])


def rotated(x: Float[Tensor, "b S H d"], rotary: Rotary) -> Float[Tensor, "b S H d"]:
    """Neighbouring pairs of features, turned by each token's angles."""
    cos, sin = (values[:, :, None] for values in rotary)
    real, imaginary = x.unflatten(3, (-1, 2)).unbind(4)
    turned = torch.stack([-imaginary, real], dim=4).flatten(3)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)
