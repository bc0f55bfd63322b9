"""Heads: what terms of the objective hang onto a backbone's features. Called as a block is."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from selfalign.ops.modules import Linear
from selfalign.tokens import TokenGrid, TokenGroups


class ProjectionHead(nn.Module):
    """The student's head g of Eq. 3, as SRA has it: two linear layers with SiLU between them.

    Args:
        hidden_size: features D of the student.
        target_width: features Z of the target; left out: D.
    """

    def __init__(self, hidden_size: int, target_width: int | None = None) -> None:
        super().__init__()
        self.linear1 = Linear(hidden_size, 2 * hidden_size)
        self.linear2 = Linear(2 * hidden_size, target_width or hidden_size)

    def forward(
        self, x: Float[Tensor, "B N D"], condition: Float[Tensor, "B K D"], groups: TokenGroups
    ) -> Float[Tensor, "B N Z"]:
        """Per token."""
        return self.linear2(functional.silu(self.linear1(x)))


class Mlp3Head(nn.Sequential):
    """Three linear layers with SiLU between them: REPA's projector, under its released names."""

    def __init__(self, hidden_size: int, inner: int, target_width: int) -> None:
        super().__init__(
            Linear(hidden_size, inner),
            nn.SiLU(),
            Linear(inner, inner),
            nn.SiLU(),
            Linear(inner, target_width),
        )

    def forward(  # type: ignore[override]  # called as a block is
        self, x: Float[Tensor, "B N D"], condition: Float[Tensor, "B K D"], groups: TokenGroups
    ) -> Float[Tensor, "B N Z"]:
        """Per token."""
        for layer in self:
            x = layer(x)
        return x


class _OverGrid:
    """A convolution whose tokens come and go in group order."""

    grid: TokenGrid

    def forward(
        self, x: Float[Tensor, "B N D"], condition: Float[Tensor, "B K D"], groups: TokenGroups
    ) -> Float[Tensor, "B N Z"]:
        """Over the token grid in image order, whatever the order of the groups; what is not there is zero,
        as what lies beyond the border."""
        if groups.present is not None:
            x = x.masked_fill(~groups.present[..., None], 0)
        over_grid = groups.restore(x).transpose(1, 2).unflatten(2, self.grid.shape)
        convolve: Any = super()
        return groups.sort(convolve.forward(over_grid).flatten(2).transpose(1, 2))


class _Conv1dHead(_OverGrid, nn.Conv1d):  # type: ignore[misc]  # called as a block is
    pass


class _Conv2dHead(_OverGrid, nn.Conv2d):  # type: ignore[misc]  # called as a block is
    pass


class _Conv3dHead(_OverGrid, nn.Conv3d):  # type: ignore[misc]  # called as a block is
    pass


def conv_head(hidden_size: int, target_width: int, kernel: int, grid: TokenGrid) -> nn.Module:
    """A zero-padded convolution over the token grid: iREPA's projector.

    Args:
        hidden_size: features D of the student.
        target_width: features Z of the target.
        kernel: its side in tokens; odd.
        grid: of the tokens.
    """
    kind: Any = (_Conv1dHead, _Conv2dHead, _Conv3dHead)[len(grid.sides) - 1]
    head: nn.Module = kind(hidden_size, target_width, kernel, padding=kernel // 2)
    head.grid = grid  # type: ignore[assignment]  # not a module
    return head
