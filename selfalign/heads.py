"""Heads: what terms of the objective hang onto a backbone's features. Called as a block is."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from selfalign.ops.modules import Linear
from selfalign.tokens import TokenGroups


class ProjectionHead(nn.Module):
    """The student's head g of Eq. 3, as SRA has it: two linear layers with SiLU between them."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear1 = Linear(hidden_size, 2 * hidden_size)
        self.linear2 = Linear(2 * hidden_size, hidden_size)

    def forward(
        self, x: Float[Tensor, "B N D"], condition: Float[Tensor, "B K D"], groups: TokenGroups
    ) -> Float[Tensor, "B N D"]:
        """Per token."""
        return self.linear2(functional.silu(self.linear1(x)))
