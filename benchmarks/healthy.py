"""Reference curves of the recipes on handwritten digits, for docs/healthy.md.

    python benchmarks/healthy.py OUT [RECIPE …]

trains each recipe with the settings below, writes healthy.json and healthy.png into OUT, and prints the
page's table. Recipes that the file has already are not trained again unless they are named.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from selfalign import recipe
from selfalign.runs.monitors import HeldOutMonitor
from selfalign.runs.start import start_run
from selfalign.training.tracking import read_metrics

RECIPES = (
    "sit",
    "sra",
    "self-flow",
    "sra-dts-as",
    "sra-dts",
    "sra-as",
    "layersync",
    "sra2",
    "repa",
    "irepa",
)
"""Those of the README and the neighbours; of HASTE, none: its encoder has to have attention (DINOv2)."""
ENCODER: dict[str, Any] = {"targets.frozen-encoder.encoders": ("efficientnet-lite0@64",)}
"""The encoder whose weights are a package."""
SETTINGS: dict[str, Any] = {
    "data.name": "digits",
    "model.size": "tiny/2",
    "training.steps": 300,
    "training.batch_size": 32,
    "training.learning_rate": 1e-3,
    "training.ema_decay": 0.995,
    "training.log_every": 10,
    "training.evaluate_every": 50,
    "training.heldout_samples": 400,
    "training.trackers": (),
}
SHOWN = ("denoising_loss", "alignment_loss", "gradient_norm", "heldout_ema")
SAVED = (*SHOWN, "heldout_raw")
EVERY = 50


def curves(name: str) -> dict[str, list[float | None]]:
    """What one recipe logs, averaged over the logged steps up to every fiftieth."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        config = recipe(name, {**SETTINGS, **(ENCODER if "repa" in name else {})})
        start_run(config, folder, lambda state, values: None, [HeldOutMonitor(EVERY)])
        lines = read_metrics(folder)
    found: dict[str, list[float | None]] = {}
    for key in SAVED:
        means = []
        for last in range(EVERY, SETTINGS["training.steps"] + 1, EVERY):
            of_part = [x[key] for x in lines if key in x and last - EVERY < x["step"] <= last]
            means.append(round(sum(of_part) / len(of_part), 4) if of_part else None)
        if any(value is not None for value in means):
            found[key] = means
    return found


def draw(path: Path, found: dict[str, dict[str, list[float | None]]]) -> None:
    """One panel per quantity, a line per recipe."""
    figure = Figure(figsize=(12, 3), dpi=90, layout="constrained")
    for axis, key in zip(figure.subplots(1, len(SHOWN)), SHOWN, strict=True):
        for number, (name, values) in enumerate(found.items()):
            if key in values:
                steps = [EVERY * (k + 1) for k in range(len(values[key]))]
                axis.plot(steps, values[key], f"C{number}", linewidth=1.2, label=name)
        axis.set_title(key.replace("_", " "), fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right", fontsize=7)
    figure.savefig(path)


def table(found: dict[str, dict[str, list[float | None]]]) -> Iterator[str]:
    """A line of Markdown per recipe: the first fifty steps, and the last."""
    yield "| recipe | denoising loss | alignment loss | gradient norm | held-out, EMA | held-out, raw |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, values in found.items():
        cells = [_span(values.get(key)) for key in SAVED]
        yield f"| `{name}` | {' | '.join(cells)} |"


def _span(values: list[float | None] | None) -> str:
    if values is None or values[0] is None or values[-1] is None:
        return "–"
    return f"{values[0]:.2f} → {values[-1]:.3f}"


def main() -> None:
    """Train, write, draw."""
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    file = out / "healthy.json"
    found = json.loads(file.read_text())["recipes"] if file.exists() else {}
    for name in sys.argv[2:] or [name for name in RECIPES if name not in found]:
        found[name] = curves(name)
        print(name, flush=True)
        record = {"settings": SETTINGS, "every": EVERY, "recipes": found}
        file.write_text(json.dumps(record) + "\n")
    draw(out / "healthy.png", found)
    print(*table(found), sep="\n")


if __name__ == "__main__":
    main()
