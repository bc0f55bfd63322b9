"""The student's own moving average as teacher: SRA, Self-Flow and the paper (Eq. 3 and 7)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from selfalign.backbones import find_tap
from selfalign.parts import register
from selfalign.targets import Target
from selfalign.tokens import TokenGroups

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from selfalign.config import ResolvedConfig, RunConfig
    from selfalign.network import Tap
    from selfalign.objective import Pass
    from selfalign.views import Draw, View, Views


@register("ema")
@dataclass(frozen=True)
class EMATarget(Target):
    """A later block of the EMA teacher, which sees the image with less noise."""

    block: int | float | str = 0.7
    """Teacher block n: its number from 1, a share of the depth, or a module's name."""
    timestep: Literal["below", "minimum", "same", "sra", "self-flow"] = "below"
    """below (sra): t - U(0, interval) of each group; minimum (self-flow): the smallest over groups;
    same: the student's."""
    interval: float = 0.2
    """Largest amount by which a timestep below the student's lies below it."""
    lag: Literal["timestep", "group"] = "timestep"
    """Whether each of a sample's timesteps lies below by an amount of its own, or each token group's, also
    where all groups share one timestep."""
    groups: bool = False
    """Whether the teacher sees the student's token groups (and separation), or the whole image."""
    labels: Literal["undropped", "dropped"] = "undropped"
    """Whether the teacher sees every label, or the student's label after class dropout."""

    def __post_init__(self) -> None:
        super().__post_init__()
        meant = {"sra": "below", "self-flow": "minimum"}.get(self.timestep, self.timestep)
        object.__setattr__(self, "timestep", meant)

    def check(self) -> None:
        """Limits of the numbers."""
        self.require_number("interval", 0, 1, "a number from 0 to 1")

    def check_in(self, config: Any) -> None:
        """The teacher's groups must be there, and without groups it needs one timestep."""
        self.tap(config)
        one_group = config.num_groups == 1
        self.require(
            not (one_group and self.groups), "groups", "allowed is False with one token group"
        )
        self.require(
            one_group
            or self.groups
            or self.timestep == "minimum"
            or config.schedule.one_per_sample,
            "timestep",
            f"a teacher without groups sees one timestep, and views.timesteps "
            f"{config.views.timesteps} offers several; allowed is minimum, or targets.ema.groups True",
        )

    def tap(self, config: RunConfig) -> Tap:
        """Where the teacher's features are taken."""
        return find_tap(self.block, config.depth, self.dotted("block"))

    def teacher_taps(self, config: ResolvedConfig) -> tuple[Tap, ...]:
        """The block."""
        return (self.tap(config),)

    def features(self, forward: Pass) -> Float[Tensor, "B N D"]:
        """sg[h_EMA^n] of Eq. 3: the raw output of block n; later blocks are not run."""
        import torch

        teacher = forward.teacher
        assert teacher is not None, "this target needs the EMA teacher"
        view = self.view(forward.views, forward.draw)
        condition = forward.seen if self.labels == "dropped" else forward.condition
        tap = self.tap(forward.config)
        with torch.no_grad():
            return teacher.features(view.tokens, view.timesteps, condition, view.groups, (tap,))[
                tap
            ]

    def lags(self, levels: Float[Tensor, "B K"], one_timestep: bool) -> Float[Tensor, "B K"]:
        """What the teacher's timesteps lie below the student's, where they do.

        Args:
            levels: uniform draws in [0, 1).
            one_timestep: whether all groups of a sample share one timestep.
        """
        shared = one_timestep and self.lag == "timestep"
        return self.interval * (levels[:, :1].expand_as(levels) if shared else levels)

    def view(self, views: Views, draw: Draw) -> View:
        """What the teacher sees.

        Without groups it sees the whole image at one timestep; its tokens keep the student's order, so
        that features compare without sorting.
        """
        groups = replace(views.groups, passing=None)
        count = len(groups.sizes)  # those that the student sees
        timesteps, interval = draw.timesteps[:, :count], draw.teacher_interval[:, :count]
        if not self.groups:
            groups = TokenGroups(
                order=draw.order, sizes=(views.x0.shape[1],), present=views.present
            )
            timesteps, interval = timesteps[:, :1], interval[:, :1]
        if self.timestep == "below":
            timesteps = (timesteps - interval).clamp(0, 1)
        elif self.timestep == "minimum":
            timesteps = draw.timesteps[:, :count].amin(dim=1, keepdim=True).expand_as(timesteps)
        return views.at(timesteps, groups)
