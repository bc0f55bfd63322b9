"""diffusers' DiT: blocks that each embed timestep and class, over patches with fixed places."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from selfalign.backbones.diffusers.model import Adapter, Rows
from selfalign.config import ResolvedConfig
from selfalign.network import Hidden
from selfalign.tokens import TokenGroups

TIMESTEPS = 1000
"""What t = 1 is called in it."""


class DiTAdapter(Adapter):
    """A `DiTTransformer2DModel`. Arguments as for `Adapter`.

    Its own dropout of classes is off: the draw decides which are dropped.
    """

    def __init__(self, config: ResolvedConfig, model: Any, pretrained: bool) -> None:
        super().__init__(config, model, pretrained)
        self.hidden_size = model.inner_dim
        for block in model.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]  # children of `model`
        """The transformer's."""
        blocks: nn.ModuleList = self.model.transformer_blocks
        return blocks

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
        projection = model.pos_embed.proj
        weight = projection.weight.movedim(1, -1).flatten(1)  # patches are (row, column, channel)
        x = functional.linear(tokens, weight, projection.bias)
        x = x + groups.sort(model.pos_embed.pos_embed.to(x.dtype))
        null = model.config.num_embeds_ada_norm
        labels = torch.where(condition >= self.num_classes, null, condition)
        embed = model.transformer_blocks[0].norm1.emb

        def run(samples: slice, seen: slice, group: int) -> Rows:
            row, t = x[samples, seen], TIMESTEPS * timesteps[samples, group]
            label = labels[samples]
            found: Rows = {}
            for number, block in enumerate(self.blocks[:last], 1):
                row = block(row, timestep=t, class_labels=label)
                if number in taps:
                    found[number] = row
            if last is None:
                embedded = functional.silu(embed(t, label, hidden_dtype=row.dtype))
                shift, scale = model.proj_out_1(embedded)[:, None].chunk(2, dim=2)
                found["velocity"] = model.proj_out_2(model.norm_out(row) * (1 + scale) + shift)
            return found

        found = self.rows(groups, len(x), run)
        velocity = found.pop("velocity", None)
        return Hidden(velocity, found, self._embedded(embed, timesteps, labels, x.dtype))

    def _embedded(
        self, embed: nn.Module, timesteps: Tensor, labels: Tensor, dtype: torch.dtype
    ) -> Float[Tensor, "B K D"]:
        """Timesteps and classes as the first block embeds them, for heads that ask."""
        groups = timesteps.shape[1]
        flat = embed(
            TIMESTEPS * timesteps.flatten(), labels.repeat_interleave(groups), hidden_dtype=dtype
        )
        return flat.unflatten(0, (-1, groups))

    def _starts_at_zero(self, name: str) -> bool:
        return name.endswith((".norm1.linear", "proj_out_1", "proj_out_2"))
