"""Budgets: how large and how long the runs of a study are, and how they are measured."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from selfalign.recipes import RECIPES
from selfalign.sampling.settings import SamplingConfig
from selfalign.study.settings import Measurement


@dataclass(frozen=True)
class Profile:
    """Settings that all runs share, the number of seeds, and how runs are measured."""

    summary: str
    settings: Mapping[str, Any]
    seeds: int
    measurement: Measurement
    max_tokens: int | None = None
    """Where no model size is given: `tiny`, with the smallest patch that leaves so many tokens."""
    parts: Mapping[str, Any] = field(default_factory=dict)
    """Settings of parts, for those variants of a named grid that use them."""


_QUICK = {
    "training.schedule": "cosine",
    "training.trackers": (),
    "training.keep_checkpoints": 1,
}

_SMALL_PARTS = {
    # REPA's projector of 2,048 would cost several times the model, and its encoder is not for such images.
    "projectors.mlp3.width": 192,
    "targets.frozen-encoder.encoders": ("efficientnet-lite0@112",),
}

PROFILES: dict[str, Profile] = {
    "smoke": Profile(
        "shows in minutes that everything runs; its numbers mean nothing",
        {
            **_QUICK,
            "training.steps": 20,
            "training.batch_size": 16,
            "training.learning_rate": 1e-3,
            "training.ema_decay": 0.9,
            "training.log_every": 5,
            "training.evaluate_every": 10,
            "training.checkpoint_every": 10,
            "training.heldout_samples": 100,
        },
        seeds=2,
        measurement=Measurement(
            num=40, own_samples=True, sampling=SamplingConfig(solver="heun", steps=3)
        ),
        max_tokens=16,
        parts=_SMALL_PARTS,
    ),
    "laptop": Profile(
        "three seeds of the whole grid on two CPU cores",
        {
            **_QUICK,
            "training.steps": 800,
            "training.batch_size": 64,
            "training.learning_rate": 4e-3,
            "training.warmup_steps": 50,
            "training.ema_decay": 0.99,
            "training.log_every": 10,
            "training.evaluate_every": 200,
            "training.checkpoint_every": 200,
            "training.heldout_samples": 2_000,
        },
        seeds=3,
        measurement=Measurement(
            num=5_000,
            on_the_way=0,
            heldout_pairs=10_000,
            own_samples=True,
            sampling=SamplingConfig(solver="heun", steps=8),
        ),
        max_tokens=49,
        parts=_SMALL_PARTS,
    ),
    "full": Profile(
        "the paper's ablations: SiT-B/2 on latents, 800K steps, FID of 10,000 samples",
        {
            # The recipe's budget and model; what it says of views and targets, the variants say.
            **{
                name: value
                for name, value in RECIPES["imagenet256-b2"].settings.items()
                if name.startswith(("model.", "training.", "data."))
                or name in ("terms.alignment.block", "targets.ema.block")
            },
            "training.evaluate_every": 100_000,
            "training.keep_checkpoints": 1,
        },
        seeds=1,
        measurement=Measurement(
            num=10_000,
            features="inception",
            own_samples=True,
            sampling=SamplingConfig(solver="sde", steps=250),
        ),
    ),
}
