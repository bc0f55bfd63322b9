"""DiT: SiT's transformer, which predicts noise at integer diffusion steps instead of a velocity."""

from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from selfalign.backbones.sit.model import SiT
from selfalign.errors import UserError
from selfalign.tokens import TokenGroups, one_group


class DiTBackbone(SiT):
    """A SiT whose output is noise, and sigma behind it."""

    predicts: ClassVar[str] = "noise"

    def velocity(self, *_: Any, **__: Any) -> Tensor:
        """There is none between the diffusion steps, and so no loss of one.

        Raises:
            UserError: always.
        """
        raise UserError(
            "these weights are a DiT, which predicts noise at 1,000 diffusion steps and has no velocity"
        )

    def noise(
        self,
        xs: Float[Tensor, "B C *sides"],
        steps: Float[Tensor, "B"],
        condition: Any,
        groups: TokenGroups | None = None,
    ) -> Float[Tensor, "B C *sides"]:
        """The noise in samples of the variance-preserving diffusion; the learned sigma is left out.

        Args:
            xs: noised samples.
            steps: diffusion steps, 0 to 999; 999 is the noisiest.
            condition: of every sample.
            groups: may separate attention; None for whole samples.
        """
        groups = groups or one_group(self.num_tokens)
        tokens = groups.sort(self.grid.patchify(xs))
        per_group = steps[:, None].expand(-1, len(groups.sizes))
        output = groups.restore(self(tokens, per_group, condition, groups).velocity)
        return self.grid.unpatchify(output)[:, : self.channels]
