"""Attention distillation: the student attends as a frozen encoder does (HASTE, arXiv:2505.16792)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from selfalign.parts import register
from selfalign.terms import Term

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from selfalign.config import ResolvedConfig, RunConfig
    from selfalign.network import Tap
    from selfalign.objective import Pass

TARGET = "encoder-attention"


@register("attention-distillation")
@dataclass(frozen=True)
class AttentionDistillation(Term):
    """Cross-entropy from the attention of the encoder's blocks to that of the student's."""

    weight: float = 0.5
    """Weight lambda; HASTE's is 0.5."""
    blocks: tuple[int, ...] = ()
    """Student blocks, one for each of targets.encoder-attention.blocks, counted from 1; left out: as many
    up to terms.alignment.block as there are (HASTE: 5 to 8 of 28)."""

    def check_in(self, config: Any) -> None:
        """The blocks must be there, as many as the encoder's."""
        blocks, wanted = self.blocks, config.targets[TARGET].blocks
        self.require(
            len(blocks) in (0, len(wanted)),
            "blocks",
            f"allowed are {len(wanted)}, as targets.{TARGET}.blocks has",
        )
        self.require(
            all(1 <= block <= config.depth for block in blocks),
            "blocks",
            f"allowed are blocks from 1 to {config.depth}",
        )
        if not blocks:
            alignment = config.terms["alignment"]
            self.require(
                isinstance(alignment.tap(config), int),
                "blocks",
                "must be given where terms.alignment.block is a module's name",
            )

    def pairs(self, config: RunConfig) -> tuple[tuple[int, int], ...]:
        """The student's blocks, each with the place of its partner among the encoder's."""
        wanted = len(config.targets[TARGET].blocks)
        blocks = self.blocks
        if not blocks:
            last = config.terms["alignment"].tap(config)
            blocks = tuple(range(max(1, last - wanted + 1), last + 1))
        return tuple(zip(blocks, range(wanted - len(blocks), wanted), strict=True))

    def target_names(self) -> tuple[str, ...]:
        """The encoder's attention."""
        return (TARGET,)

    def taps(self, config: ResolvedConfig) -> tuple[Tap, ...]:
        """Queries, keys and values of the student's blocks."""
        return tuple(config.backbone.attention_tap(block) for block, _ in self.pairs(config))

    def __call__(self, forward: Pass) -> Float[Tensor, ""]:
        """Mean over blocks, heads and queries, of as many heads as both have.

        Softmax runs over the keys that a query attends to: under separated attention those of its group, for
        the encoder too. Logits are scaled by the root of each one's head size.
        """
        config, output = forward.config, forward.output
        target = config.targets[TARGET]
        encoder = forward.targets[TARGET].unflatten(2, (len(target.blocks), 2, target.heads, -1))
        groups, heads = forward.views.groups, config.backbone.attention_heads(config.model)
        shared = min(heads, target.heads)
        total, rows = forward.x0.new_zeros(()), 0
        for block, place in self.pairs(config):
            qkv = output.features[config.backbone.attention_tap(block)]
            student = qkv.unflatten(2, (3, heads, -1))[:, :, :2, :shared]
            teacher = encoder[:, :, place, :, :shared]
            for first, end, begin, stop in groups.attention_parts(len(qkv)):
                part = slice(first, end), slice(begin, stop)
                total = total + _cross_entropy(student[part], teacher[part])
                rows += (end - first) * (stop - begin) * shared
        return total / rows


def _cross_entropy(
    student: Float[Tensor, "b n 2 H d"], teacher: Float[Tensor, "b n 2 H e"]
) -> Float[Tensor, ""]:
    """Sum over samples, heads and queries, in float32."""
    from selfalign.precision import full_precision

    with full_precision(student.device):
        log_student = _logits(student).log_softmax(dim=-1)
        attention = _logits(teacher).softmax(dim=-1)
    return -(attention * log_student).sum()


def _logits(queries_and_keys: Float[Tensor, "b n 2 H d"]) -> Float[Tensor, "b H n n"]:
    queries, keys = queries_and_keys.float().permute(2, 0, 3, 1, 4)
    return queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5
