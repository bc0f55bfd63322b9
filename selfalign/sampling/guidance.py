"""Classifier-free guidance within an interval of t, at the cost of one pass outside it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from selfalign.network import Backbone
from selfalign.sampling.settings import Guidance
from selfalign.sampling.solvers import Velocity
from selfalign.tokens import TokenGroups

OFF = Guidance()


@dataclass(frozen=True)
class GuidedModel:
    """A model with labels and guidance: a velocity for each solver step.

    Args:
        model: the network; it runs in its own parameters' dtype.
        condition: of every sample: its class, for one.
        null: the condition of the unguided direction, for as many samples.
        guidance: where and how strongly to guide.
        groups: token groups by step, which separate attention in sampling; None for whole images.
        internal: where and how strongly the model's early velocity guides it, with a label and without.
        predicts: what the model is asked for, velocity or noise, which is guided alike.
    """

    model: Backbone
    condition: Tensor
    null: Tensor
    guidance: Guidance
    groups: Callable[[int], TokenGroups] | None = None
    internal: Guidance = OFF
    predicts: str = "velocity"

    def at(self, step: int, t_start: float) -> Velocity:
        """The velocity during one step. All its evaluations follow the decision at `t_start`."""
        groups = self.groups(step) if self.groups else None
        internal = self.internal.scale if self.internal.applies(t_start) else 1.0
        if not self.guidance.applies(t_start):
            return lambda x, t: self._evaluate(x, t, self.condition, groups, internal)
        condition = torch.cat([self.condition, self.null])
        groups = None if groups is None else groups.repeat(2)

        def velocity(x: Tensor, t: float) -> Tensor:
            both = self._evaluate(torch.cat([x, x]), t, condition, groups, internal)
            conditional, unconditional = both.chunk(2)
            guided = unconditional + self.guidance.scale * (conditional - unconditional)
            if self.guidance.channels == "first-three":
                guided = torch.cat([guided[:, :3], conditional[:, 3:]], dim=1)
            return guided

        return velocity

    def _evaluate(
        self,
        x: Float[Tensor, "B C H W"],
        t: float,
        condition: Tensor,
        groups: TokenGroups | None,
        internal: float,
    ) -> Float[Tensor, "B C H W"]:
        dtype = self.model.dtype
        timesteps = torch.full((len(x),), t, dtype=dtype, device=x.device)
        more = {} if internal == 1 else {"internal_guidance": internal}
        ask = getattr(self.model, self.predicts)
        return ask(x.to(dtype), timesteps, condition, groups, **more).to(x.dtype)
