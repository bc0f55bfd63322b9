"""How the papers evaluate, each under one name: what has to be the same before numbers compare.

Facts from the papers and their released samplers (docs/evaluation.md says which). What a release leaves
open stays at this project's default.
"""

from dataclasses import dataclass
from typing import Literal

IMAGENET_256 = "VIRTUAL_imagenet256_labeled.npz"
IMAGENET_512 = "VIRTUAL_imagenet512.npz"
"""ADM's reference batches."""


@dataclass(frozen=True)
class Protocol:
    """What a protocol sets. Options that are given win over it."""

    reference: str = IMAGENET_256
    features: str = "inception"
    num: int = 50_000
    labels: Literal["random", "balanced"] = "random"
    inception_splits: int = 10
    """ADM's splits of 5,000 samples each."""
    solver: str | None = "sde"
    """None for a protocol that says nothing on sampling."""
    steps: int = 250
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_channels: Literal["all", "first-three"] = "all"

    def options(self) -> list[str]:
        """The same as words of a command line."""
        measured = [
            *("--reference", self.reference, "--features", self.features),
            *("--num", f"{self.num}", "--inception-splits", f"{self.inception_splits}"),
            *("--labels", self.labels),
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
