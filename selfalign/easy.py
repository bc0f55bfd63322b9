"""A run's samples and metrics from Python, in a line each."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from selfalign.data.shapes import to_uint8
from selfalign.evaluation import config as evaluation_config
from selfalign.evaluation import evaluate as evaluation
from selfalign.evaluation.report import Evaluation
from selfalign.processes import open_accelerator
from selfalign.runs.load import LoadedRun
from selfalign.sampling.generate import Labels, check_sampling, generate
from selfalign.sampling.settings import SamplingConfig


def sample(
    run: LoadedRun,
    num: int = 16,
    labels: Labels = "random",
    *,
    batch_size: int = 100,
    **settings: Any,
) -> tuple[UInt8[Tensor, "M C H W"], Int[Tensor, "M"]]:
    """Samples of a run, decoded, and their classes: those that `selfalign sample` writes.

    Args:
        run: from `load_run`.
        num: how many.
        labels: `random`, `balanced`, or given classes, repeated in order.
        batch_size: how many at once.
        settings: fields of `SamplingConfig`, as steps, solver, guidance_scale, seed.

    Raises:
        UserError: settings that are not allowed, or that the model cannot be sampled with.
    """
    config = SamplingConfig(**settings)
    check_sampling(run.model, config, run.config.views.class_dropout, labels)
    separate = run.config.views.attention == "separated"
    parts = list(
        generate(
            run.model,
            run.config.flow.path,
            config,
            num,
            batch_size=batch_size,
            labels=labels,
            separate=separate,
        )
    )
    images = torch.cat([to_uint8(run.decode(part.images)).cpu() for part in parts])
    return images, torch.cat([part.labels for part in parts])


def evaluate(subject: LoadedRun | Path | str, num: int = 1000, **settings: Any) -> Evaluation:
    """What `selfalign evaluate` measures and writes, of a run or of a set of samples.

    Args:
        subject: from `load_run`; a run's folder, a .npz, or a folder of images.
        num: samples of a run.
        settings: fields of `EvaluationConfig` and of `SamplingConfig`.

    Returns:
        `.metrics` holds an `Estimate` by name.

    Raises:
        UserError: inputs that are missing, damaged, or do not fit together or the metrics.
    """
    own = {k: v for k, v in settings.items() if k in _OF_SAMPLING}
    config = evaluation_config.EvaluationConfig(
        num=num, **{k: v for k, v in settings.items() if k not in own}
    )
    run = subject if isinstance(subject, LoadedRun) else None
    place = subject.folder if isinstance(subject, LoadedRun) else Path(subject)
    found = evaluation.evaluate(place, config, SamplingConfig(**own), open_accelerator(), run=run)
    assert found is not None
    return found


_OF_SAMPLING = frozenset(SamplingConfig.__dataclass_fields__)
