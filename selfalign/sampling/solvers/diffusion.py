"""Samplers of models that predict noise (DiT), by diffusers' schedulers.

Their time is the diffusion step, 999 to 0. diffusers is imported when they are used.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from selfalign.errors import UserError
from selfalign.parts import register
from selfalign.sampling.solvers import Solver, StepVelocity

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from selfalign.flow import Path

DIFFUSION_STEPS = 1000
BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
"""DiT's diffusion."""


@dataclass(frozen=True)
class DiffusionSolver(Solver):
    """Steps of one of diffusers' schedulers."""

    predicts: ClassVar[str] = "noise"

    @abstractmethod
    def scheduler(self) -> Any:
        """The scheduler, of `DIFFUSION_STEPS` steps with `BETAS`."""

    def more(self, number: int, draw: Callable[[int], Tensor], x: Tensor) -> dict[str, Any]:
        """Further arguments of a scheduler's step. None by default."""
        return {}

    def prepared(self, steps: int) -> Any:
        """The scheduler with its timesteps.

        Raises:
            UserError: diffusers is not installed, or there are not so many steps.
        """
        if steps > DIFFUSION_STEPS:
            raise UserError(
                f"steps is {steps}: a model that predicts noise knows {DIFFUSION_STEPS} diffusion steps; "
                "allowed is at most that"
            )
        try:
            scheduler = self.scheduler()
        except ImportError as error:
            raise UserError(
                f"solver {self.name} needs the package diffusers: pip install 'selfalign[latents]'"
            ) from error
        scheduler.set_timesteps(steps)
        return scheduler

    def times(self, steps: int) -> list[float]:
        """The t of the linear path with the signal-to-noise ratio of each diffusion step, and 0."""
        scheduler = self.prepared(steps)
        kept = scheduler.alphas_cumprod[scheduler.timesteps.long()].double()
        signal, noise = kept.sqrt(), (1 - kept).sqrt()
        return [*(noise / (signal + noise)).tolist(), 0.0]

    def solve(
        self,
        velocity: StepVelocity,
        noise: Float[Tensor, "B C *sides"],
        steps: int,
        path: Path,
        step_noise: Callable[[int], Float[Tensor, "B C *sides"]],
    ) -> Float[Tensor, "B C *sides"]:
        """See `Solver.solve`; `velocity` gives noise here, at diffusion steps."""
        scheduler, starts = self.prepared(steps), self.times(steps)
        x = noise
        for number, step in enumerate(scheduler.timesteps.tolist()):
            predicted = velocity.at(number, starts[number])(x, float(step))
            more = self.more(number, step_noise, x)
            x = scheduler.step(predicted, int(step), x, **more).prev_sample
        return x


@register("ddim")
@dataclass(frozen=True)
class Ddim(DiffusionSolver):
    """Deterministic DDIM (arXiv:2010.02502), DiTPipeline's default."""

    def scheduler(self) -> Any:
        """DDIMScheduler."""
        from diffusers import DDIMScheduler

        return DDIMScheduler(**BETAS, num_train_timesteps=DIFFUSION_STEPS, clip_sample=False)


@register("ddpm")
@dataclass(frozen=True)
class Ddpm(Ddim):
    """Ancestral sampling with the posterior's variance (arXiv:2006.11239): DDIM with eta 1.

    diffusers' DDPMScheduler does the same arithmetic and would draw its noise itself; here it is a function
    of the seed and the sample's number.
    """

    def more(self, number: int, draw: Callable[[int], Tensor], x: Tensor) -> dict[str, Any]:
        """The noise of the step."""
        return {"eta": 1.0, "variance_noise": draw(number).to(x)}


@register("dpm-solver")
@dataclass(frozen=True)
class DpmSolver(DiffusionSolver):
    """DPM-Solver++ of second order (arXiv:2211.01095)."""

    def scheduler(self) -> Any:
        """DPMSolverMultistepScheduler."""
        from diffusers import DPMSolverMultistepScheduler

        return DPMSolverMultistepScheduler(**BETAS, num_train_timesteps=DIFFUSION_STEPS)
