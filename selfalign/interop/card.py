"""What a model card says of a run."""

import os
from pathlib import Path
from typing import Any

import msgspec

from selfalign.config import config_to_dict
from selfalign.recipes import RECIPES, nearest_recipe
from selfalign.records import convert, read_plain
from selfalign.runs.folder import read_origin
from selfalign.runs.load import LoadedRun
from selfalign.training.tracking import read_metrics


def card_facts(run: LoadedRun, licence: str = "") -> dict[str, Any]:
    """What a card says of a run: pass it as `model_card_kwargs` to `SiT.save_pretrained` and `push_to_hub`.

    Args:
        run: from `load_run`.
        licence: of the weights; left out: that of the weights they came from, if it is known.
    """
    config, data = run.config, run.config.data
    origin = read_origin(run.folder)
    start = config.training.start_from
    name = nearest_recipe(config)
    images = (
        "not recorded" if data.name == "none" else f"{data.name} (fingerprint {run.fingerprint})"
    )
    return {
        "recipe": f"`{name}`: {RECIPES[name].summary}",
        "data": f"{images}, {config.model.num_classes} classes",
        "steps": _steps(run, bool(origin)),
        "start": "" if start is None else Path(start).name,
        "metrics": _metrics(run.folder),
        "origin": origin,
        "licence": licence or str(origin.get("licence") or ""),
        "config": config_to_dict(config),
    }


class _Estimate(msgspec.Struct):
    value: float


class _Evaluation(msgspec.Struct):
    """Of evaluation.json, what a card says."""

    metrics: dict[str, _Estimate]


def _steps(run: LoadedRun, is_further: bool) -> str:
    """How many were trained here; those of weights that came from elsewhere are not known."""
    if is_further and not run.step:
        return "none here: the weights as they came"
    words = f"{run.step:,} of batch {run.config.training.batch_size}"
    return f"{words}, from the weights below" if is_further else words


def _metrics(folder: Path) -> dict[str, str]:
    """Of the run's last held-out loss, and of its evaluation."""
    found = {}
    heldout = next(
        (line for line in reversed(read_metrics(folder, most=1)) if "heldout_ema" in line), None
    )
    if heldout is not None:
        found["held-out denoising loss, EMA"] = f"{heldout['heldout_ema']:.4f}"
    path = folder / "evaluation.json"
    if os.path.lexists(path):
        plain = read_plain(path, finite=False)
        held = convert(plain, _Evaluation, f"{path} cannot be read")
        for name, estimate in held.metrics.items():
            found[name.replace("_", " ")] = f"{estimate.value:.4g}"
    return found
