"""Measure sampling, and the limit that this machine sets for it."""

import statistics
from dataclasses import dataclass

import torch

from selfalign.benchmark.limit import measure_pass_limit, seconds_of, synchronize
from selfalign.benchmark.measure import make_model
from selfalign.config import RunConfig
from selfalign.sampling.generate import SamplingConfig, generate
from selfalign.sampling.guidance import Guidance
from selfalign.sampling.solvers import ode_times, sde_times


@dataclass(frozen=True)
class SamplingTiming:
    """Seconds of one batch over repetitions, and the least it could take."""

    seconds: list[float]
    limit_seconds: float
    passes: int
    """Passes of the model over the batch, two where guidance applies."""
    flops: float
    """Operations of these passes."""

    @property
    def median(self) -> float:
        """Median seconds per batch."""
        return statistics.median(self.seconds)

    @property
    def gemm_flops_per_second(self) -> float:
        """Rate of the passes' products, each timed alone."""
        return self.flops / self.limit_seconds


def count_passes(sampling: SamplingConfig) -> tuple[int, int]:
    """How many evaluations of the model are unguided and guided."""
    guidance = Guidance(sampling.guidance_scale, sampling.guidance_interval)
    times = sde_times(sampling.steps) if sampling.solver == "sde" else ode_times(sampling.steps)
    unguided = guided = 0
    for step, t in enumerate(times[:-1]):
        evaluations = 2 if sampling.solver == "heun" and step < sampling.steps - 1 else 1
        if guidance.applies(t):
            guided += evaluations
        else:
            unguided += evaluations
    return unguided, guided


def time_sampling(
    config: RunConfig,
    sampling: SamplingConfig,
    batch_size: int,
    device: torch.device | str = "cpu",
    repetitions: int = 7,
) -> SamplingTiming:
    """Time a batch of samples.

    Args:
        config: a resolved tree; model and path are used.
        sampling: how the samples are made.
        batch_size: images.
        device: where.
        repetitions: how often, after one warm-up.
    """
    device = torch.device(device)
    model = make_model(config).eval().requires_grad_(False).to(device)

    def sample() -> None:
        for _ in generate(model, config.flow.path, sampling, batch_size, batch_size=batch_size):
            synchronize(device)

    seconds = [seconds_of(sample, device) for _ in range(repetitions + 1)]
    limit, flops = measure_sampling_limit(config, sampling, batch_size, device)
    unguided, guided = count_passes(sampling)
    return SamplingTiming(seconds[1:], limit, unguided + 2 * guided, flops)


def measure_sampling_limit(
    config: RunConfig,
    sampling: SamplingConfig,
    batch_size: int,
    device: torch.device | str = "cpu",
    repetitions: int = 9,
) -> tuple[float, float]:
    """The least seconds of a batch of samples, and its operations. Arguments as for `time_sampling`."""
    seconds = flops = 0.0
    for passes, images in zip(count_passes(sampling), (batch_size, 2 * batch_size), strict=True):
        if passes:
            limit = measure_pass_limit(config, images, device, repetitions)
            seconds += passes * limit.seconds
            flops += passes * limit.flops
    return seconds, flops
