"""A finished run or a released checkpoint as teacher: Self-Transcendence's second stage (2026)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from selfalign.backbones import find_tap
from selfalign.parts import register
from selfalign.settings import require
from selfalign.targets import BuiltTarget, Target

if TYPE_CHECKING:
    from pathlib import Path

    from jaxtyping import Float
    from torch import Tensor

    from selfalign.config import ResolvedConfig
    from selfalign.data.source import DataSource
    from selfalign.network import Backbone, Tap
    from selfalign.objective import Pass


@register("frozen-run")
@dataclass(frozen=True)
class FrozenRunTarget(Target):
    """A block of a model that no longer changes, and that sees what the student sees."""

    run: str = ""
    """Folder of a run, or a released checkpoint of SiT, REPA, Self-Flow or SRA."""
    weights: str = "ema"
    """Which weights of a run: raw, ema, or ema:DECAY."""
    released: Literal["auto", "sit", "repa", "self-flow", "sra"] = "auto"
    """The project that a released checkpoint is of; auto: as its layout says."""
    block: int | float | str = 0.7
    """Block n: its number from 1, a share of the depth, or a module's name."""
    guidance: float = 1.0
    """Scale of guided features, f(no label) + scale·(f(label) - f(no label)); 1 is off; the paper's is 30."""
    whole: bool = False
    """Whether it attends to the whole image where the student's attention is separated."""
    width: int = 0
    """Features of its tokens; left out: found when the run begins."""
    hash: str = ""
    """Of its weights; left out: found when the run begins."""

    def check(self) -> None:
        """Limits of the numbers."""
        self.require_number("guidance", 0, 1000, "a number from 0 to 1000")
        self.require_number("width", 0, 2**16, "a number of features, or 0 (found)")

    def check_in(self, config: Any) -> None:
        """There must be a run."""
        self.require(bool(self.run), "run", "must be given: the folder of a run, or a checkpoint")
        guided = self.guidance != 1
        self.require(
            not guided or config.model.num_classes != 0,
            "guidance",
            "allowed without classes is 1 (off)",
        )

    def part_widths(self, config: ResolvedConfig) -> tuple[int | None, ...]:
        """The teacher's width."""
        self.require(self.width > 0, "width", "must be given, or be found by starting a run")
        return (self.width,)

    def completed(self, config: ResolvedConfig, source: DataSource) -> FrozenRunTarget:
        """With the teacher's width and hash, which must be that recorded."""
        from selfalign.weights import weights_sha256

        teacher, learnt = self._load()
        model = config.model
        self.require(
            teacher.predicts == "velocity",
            "run",
            f"it predicts {teacher.predicts} at diffusion steps; allowed are models of velocities",
        )
        for what, own, wanted in (
            ("channels", teacher.channels, model.channels),
            ("sides", teacher.image_size, model.image_size),
            ("patches of side", teacher.patch_size, model.patch_size),
            ("classes", teacher.num_classes, model.num_classes),
        ):
            self.require(own == wanted, "run", f"it has {what} {own}, and this model {wanted}")
        if learnt is not None:
            self.require(
                learnt.flow.path == config.flow.path,
                "run",
                f"it was trained on the {learnt.flow.path} path, and flow.path is {config.flow.path}",
            )
            self.require(
                self.guidance == 1 or learnt.views.class_dropout > 0,
                "guidance",
                "the run was trained without dropped labels and has no unguided direction; allowed is 1",
            )
        tap = find_tap(self.block, len(teacher.blocks), self.dotted("block"))
        teacher.require_taps([tap], self.dotted("block"))
        found = weights_sha256(teacher.state_dict().items())
        same = (
            f"its weights have the hash {found[:16]}…, and the run was begun with {self.hash[:16]}…"
        )
        require(self.hash in ("", found), self.dotted("run"), self.run, same)
        self.require(
            self.width in (0, teacher.hidden_size), "width", f"the run has {teacher.hidden_size}"
        )
        place = str(self._place().resolve())
        return dataclasses.replace(self, run=place, width=teacher.hidden_size, hash=found)

    def build(self, config: ResolvedConfig) -> BuiltTarget:
        """The teacher."""
        return FrozenRun(self, self._load()[0])

    def features(self, forward: Pass) -> Float[Tensor, "B N D"]:
        """What is built gives them."""
        raise NotImplementedError

    def _place(self) -> Path:
        from pathlib import Path

        try:
            place = Path(self.run).expanduser()
        except RuntimeError:  # nobody's home
            place = Path(self.run)
        self.require(place.exists(), "run", "there is no such run or checkpoint")
        return place

    def _load(self) -> tuple[Backbone, ResolvedConfig | None]:
        """The teacher, and what it was trained with; of a released checkpoint that is known: the linear path,
        with dropped labels."""
        from selfalign.interop.released import load_released
        from selfalign.runs.load import load_run

        place = self._place()
        if place.is_dir():
            run = load_run(place, self.weights)
            return run.model, run.config
        teacher = load_released(place, None if self.released == "auto" else self.released)
        return teacher.eval().requires_grad_(False), None


class FrozenRun:
    """The target with its teacher.

    Args:
        target: the settings.
        teacher: the model, in eval mode.
    """

    def __init__(self, target: FrozenRunTarget, teacher: Backbone) -> None:
        self.target, self.teacher = target, teacher
        self.tap = find_tap(target.block, len(teacher.blocks), target.dotted("block"))

    def taps(self, config: ResolvedConfig) -> tuple[Tap, ...]:
        """None."""
        return ()

    def features(self, forward: Pass) -> Float[Tensor, "B N D"]:
        """The raw output of block n at the student's view; guided where that is asked for."""
        import torch

        teacher = self.teacher.to(forward.x0.device)
        view, scale = forward.views.student, self.target.guidance
        # No token passes by any of its blocks, whatever the student's do.
        separate = view.groups.separate and not self.target.whole
        groups = dataclasses.replace(view.groups, passing=None, separate=separate)

        def at(condition: Any) -> Tensor:
            tokens, timesteps = view.tokens, view.timesteps
            return teacher.features(tokens, timesteps, condition, groups, (self.tap,))[self.tap]

        with torch.no_grad():
            features = at(forward.condition)
            if scale == 1:
                return features
            null = teacher.condition.null(forward.condition, teacher.num_classes)
            return torch.lerp(at(null), features, scale)
