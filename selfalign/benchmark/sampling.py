"""Measure sampling, and the limit that this machine sets for it."""

import statistics
from dataclasses import dataclass

import torch

from selfalign.benchmark.limit import measure_pass_limit, seconds_of, synchronize
from selfalign.benchmark.measure import make_model
from selfalign.config import ResolvedConfig
from selfalign.errors import UserError
from selfalign.sampling.generate import check_sampling, generate
from selfalign.sampling.settings import SamplingConfig


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
        """Rate of the passes' matmuls, each timed alone."""
        return self.flops / self.limit_seconds


def count_passes(sampling: SamplingConfig) -> tuple[int, int]:
    """How many evaluations of the model are unguided and guided.

    Raises:
        UserError: the solver takes as many as the model's velocity needs.
    """
    evaluations = sampling.make_solver().evaluations(sampling.steps)
    if evaluations is None:
        raise UserError(
            f"solver is {sampling.solver!r}: its steps depend on the model; allowed are others"
        )
    guided = sum(count for t, count in evaluations if sampling.guidance.applies(t))
    return sum(count for _, count in evaluations) - guided, guided


def time_sampling(
    config: ResolvedConfig,
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

    Raises:
        UserError: the model cannot be sampled so.
    """
    device = torch.device(device)
    model = make_model(config, device).eval().requires_grad_(False)
    check_sampling(model, sampling, config.views.class_dropout, None)

    def sample() -> None:
        for _ in generate(model, config.flow.path, sampling, batch_size, batch_size=batch_size):
            synchronize(device)

    seconds = [seconds_of(sample, device) for _ in range(repetitions + 1)]
    limit, flops = measure_sampling_limit(config, sampling, batch_size, device)
    unguided, guided = count_passes(sampling)
    return SamplingTiming(seconds[1:], limit, unguided + 2 * guided, flops)


def measure_sampling_limit(
    config: ResolvedConfig,
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
