"""How the papers evaluate, each under one name: what has to be the same before numbers compare.

Facts from the papers and their released samplers (docs/evaluation.md says which). What a release leaves
open stays at this project's default.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from selfalign.evaluation.config import EvaluationConfig
    from selfalign.sampling.settings import SamplingConfig

IMAGENET_256 = "VIRTUAL_imagenet256_labeled.npz"
IMAGENET_512 = "VIRTUAL_imagenet512.npz"
"""ADM's reference batches."""


@dataclass(frozen=True)
class Protocol:
    """What a protocol sets. Options that are given win over it."""

    reference: str = IMAGENET_256
    features: str = "inception"
    num: int = 50_000
    labels: Literal["random", "balanced"] | tuple[int, ...] = "random"
    inception_splits: int = 10
    """ADM's splits of 5,000 samples each."""
    solver: str | None = "sde"
    """None for a protocol that says nothing on sampling."""
    steps: int = 250
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_channels: Literal["all", "first-three"] = "all"

    def overridden(self, config: EvaluationConfig, sampling: SamplingConfig) -> Protocol:
        """What is in force once options that were given have won."""
        own = {field.name for field in fields(self)}
        held = {**vars(config), **(vars(sampling) if self.solver is not None else {})}
        return replace(self, **{name: value for name, value in held.items() if name in own})

    def options(self) -> list[str]:
        """The same as words of a command line."""
        measured = [
            *("--reference", self.reference, "--features", self.features),
            *("--num", f"{self.num}", "--inception-splits", f"{self.inception_splits}"),
            "--labels",
            *((self.labels,) if isinstance(self.labels, str) else map(str, self.labels)),
        ]
        if self.solver is None:
            return measured
        return [
            *measured,
            *("--solver", self.solver, "--steps", f"{self.steps}"),
            *("--guidance-scale", f"{self.guidance_scale:g}"),
            *("--guidance-interval", *(f"{bound:g}" for bound in self.guidance_interval)),
            *("--guidance-channels", self.guidance_channels),
        ]


PROTOCOLS: dict[str, Protocol] = {
    "adm": Protocol(solver=None),
    "sit": Protocol(guidance_scale=1.5, guidance_channels="first-three"),
    "repa": Protocol(guidance_scale=1.8, guidance_interval=(0.0, 0.7)),
    "sra": Protocol(guidance_scale=1.8, guidance_interval=(0.0, 0.7)),
    "self-flow": Protocol(),
    "paper-256": Protocol(guidance_scale=1.8, guidance_interval=(0.0, 0.7)),
    "paper-512": Protocol(reference=IMAGENET_512, guidance_scale=1.8, guidance_interval=(0.0, 0.7)),
}
