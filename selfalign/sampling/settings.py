"""How samples are made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from selfalign.errors import UserError
from selfalign.parts import Choosing, PartSettings, chosen

if TYPE_CHECKING:
    from selfalign.sampling.solvers import Solver

MAX_STEPS = 10**6
MAX_SCALE = 1000
"""Far beyond what anybody has sampled with; bounded before work is begun that would not end."""


@dataclass(frozen=True)
class Guidance:
    """v = v_null + scale·(v_label - v_null) where low <= t <= high; a scale of 1 is off."""

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    channels: Literal["all", "first-three"] = "all"
    """The others follow v_label; DiT's and SiT's released samplers guide three of a latent's four."""
    name: str = "guidance"
    """In messages."""

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise UserError(
                f"{self.name} interval is {low} {high}: allowed are 0 <= low <= high <= 1"
            )
        if not 1 <= self.scale <= MAX_SCALE:
            raise UserError(f"{self.name} scale is {self.scale}: allowed is 1 (off) to {MAX_SCALE}")

    def applies(self, t: float) -> bool:
        """Whether a step that starts at t is guided."""
        return self.scale > 1 and self.interval[0] <= t <= self.interval[1]


@dataclass(frozen=True)
class SamplingConfig(Choosing):
    """How samples are made."""

    solver: str = chosen("solver", "euler")
    """euler, heun or dopri5 (adaptive) for the ODE, sde (Euler-Maruyama) for the SDE; ddim, ddpm or
    dpm-solver for weights of a DiT."""
    steps: int = 50
    """Solver steps; the papers report 250 with sde."""
    guidance_scale: float = 1.0
    """Strength of classifier-free guidance; 1 is off."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Guidance applies to steps that start at a t within these bounds."""
    mask_ratio: float = 0.0
    """Share of tokens in the first of two groups that separate attention; 0: whole images."""
    mask_type: Literal["fixed", "per-step"] = "fixed"
    """Whether those groups are drawn once per sample or at every step."""
    seed: int = 0
    """Sample i is a function of this seed and i."""
    guidance_channels: Literal["all", "first-three"] = "all"
    """Channels that are guided; DiT and SiT guide the first three of a latent's four."""
    internal_guidance_scale: float = 1.0
    """Strength of internal guidance, from the second velocity head of the term early-velocity to the last
    layer; 1 is off; the released code's is 1.4."""
    internal_guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Internal guidance applies to steps that start at a t within these bounds."""
    solvers: PartSettings = field(default_factory=lambda: PartSettings("solver"))
    """Settings of the solvers, by name."""

    def check(self) -> None:
        """Limits of the numbers."""
        self.require_number("steps", 1, MAX_STEPS, f"a number from 1 to {MAX_STEPS:,}")
        self.require(0 <= self.mask_ratio < 1, "mask_ratio", "allowed is 0 (off) to below 1")
        self.require(0 <= self.seed < 2**63, "seed", "allowed is a whole number from 0 to 2^63-1")
        assert (
            self.guidance and self.internal_guidance
        )  # made once, so that they check their numbers

    @property
    def guidance(self) -> Guidance:
        """Where and how strongly the label guides."""
        return Guidance(self.guidance_scale, self.guidance_interval, self.guidance_channels)

    @property
    def internal_guidance(self) -> Guidance:
        """Where and how strongly the early velocity guides."""
        scale, interval = self.internal_guidance_scale, self.internal_guidance_interval
        return Guidance(scale, interval, name="internal guidance")

    def make_solver(self) -> Solver:
        """The chosen solver with its settings."""
        return self.solvers[self.solver]

    def record(self) -> dict[str, Any]:
        """What samples depend on, as JSON can hold it; the solver's settings where they are given."""
        values = {
            entry.name: getattr(self, entry.name)
            for entry in dataclasses.fields(self)
            if entry.name != "solvers"
        }
        given = self.solvers.given.get(self.solver)
        return values | ({} if given is None else {"solver_settings": dataclasses.asdict(given)})
