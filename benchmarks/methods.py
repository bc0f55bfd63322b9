"""What docs/results/methods.md says beyond the reports of its two studies, and its picture.

    python benchmarks/methods.py [PICTURE]

Prints contrasts that `selfalign study methods` does not report, from the values by seed in docs/results:
means with half of a 95 % interval, the spread pooled over all variants.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfalign.study.estimates import Estimate, Layout

RESULTS = Path(__file__).parent.parent / "docs" / "results"
STUDIES = {
    "methods": "digits, 5 seeds",
    "methods-fashion": "a twentieth of Fashion-MNIST, 3 seeds",
}
TARGETS = {
    "sit": "none",
    "sra": "EMA (SRA)",
    "repa": "frozen encoder (REPA)",
    "layersync": "same pass (LayerSync)",
    "sra2": "clean input (SRA 2)",
}
SWITCHES = ("Dual timesteps", "Separation", "Dual timesteps and separation")
LOSS = "held-out denoising loss, with minus without"

Report = dict[str, Any]
Signs = Mapping[str, int]
"""Variants of a contrast, each with its sign."""


def read_report(study: str) -> Report:
    """The report.json of a study in docs/results."""
    found: Report = json.loads((RESULTS / study / "report.json").read_text())
    return found


def losses(report: Report) -> Layout:
    """Held-out losses by variant and seed."""
    return Layout(
        {
            (variant, int(seed)): loss
            for variant, means in report["means"].items()
            for seed, loss in means["heldout_loss"]["by_seed"].items()
        }
    )


def estimate(layout: Layout, signs: Signs) -> Estimate:
    """A contrast, with the error that the studies' own effects have, but for the choice of images."""
    found = layout.weigh(signs)
    assert found is not None
    return found


def contrasts() -> dict[str, dict[str, Signs]]:
    """The contrasts by what they are called, and in each by target."""
    aligned = [target for target in TARGETS if target != "sit"]
    return {
        "dual timesteps, separated": {t: {f"{t}-dts-as": 1, f"{t}-as": -1} for t in TARGETS},
        "cross-noise interaction": {
            t: {f"{t}-dts": 1, t: -1, f"{t}-dts-as": -1, f"{t}-as": 1} for t in TARGETS
        },
        "target, with dual timesteps": {t: {f"{t}-dts": 1, "sit-dts": -1} for t in aligned},
        "self-flow less sra-dts": {"self-flow": {"self-flow": 1, "sra-dts": -1}},
    }


def lines(study: str) -> list[str]:
    """What is printed of a study."""
    layout, said = losses(read_report(study)), [STUDIES[study]]
    for title, by_target in contrasts().items():
        found = {target: estimate(layout, signs) for target, signs in by_target.items()}
        told = ", ".join(f"{target} {e.mean:+.4f}" for target, e in found.items())
        half = next(iter(found.values())).half_width()  # one for all, as they weigh runs alike
        said.append(f"  {title}: {told} (± {half:.4f})")
    gain = sum(estimate(layout, {f"{t}-dts": 1, t: -1}).mean for t in TARGETS)
    interaction = sum(
        estimate(layout, s).mean for s in contrasts()["cross-noise interaction"].values()
    )
    said.append(f"  share of the gain that is interaction: {interaction / gain:.0%}")
    return said


def draw(path: Path) -> None:
    """The effects of both switches, and of both together, by target: a panel per study."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    hidden: Any = {f"axes.spines.{side}": False for side in ("top", "right", "left")}
    with plt.rc_context({"font.size": 9, **hidden}):
        figure, axes = plt.subplots(1, len(STUDIES), figsize=(9.5, 3.4), sharey=True)
        for axis, (study, title) in zip(axes, STUDIES.items(), strict=True):
            effects = read_report(study)["effects"]
            found = {e["effect"]: e for e in effects if e["metric"] == "heldout_loss"}
            margin = found["Dual timesteps, sit"]["margin"]
            axis.axvspan(-margin, margin, color="#e4ebe4", linewidth=0)
            axis.axvline(0, color="#777777", linewidth=1)
            for place, (switch, colour) in enumerate(
                zip(SWITCHES, ("#0063a8", "#b84a00", "#6b4fa0"), strict=True)
            ):
                for row, target in enumerate(TARGETS):
                    y = row + 0.2 * (place - 1)
                    difference = found[f"{switch}, {target}"]["difference"]
                    axis.plot(difference["interval"], [y, y], color=colour, linewidth=1.8)
                    label = switch if row == 0 else None
                    axis.plot(difference["mean"], y, "o", color=colour, markersize=5, label=label)
            axis.set_title(title, loc="left", fontsize=10, weight="bold")
            axis.set_xlabel(LOSS)
            axis.tick_params(length=0)
            axis.grid(axis="x", color="#dddddd", linewidth=0.7)
            axis.set_axisbelow(True)
        axes[0].set_yticks(range(len(TARGETS)), list(TARGETS.values()))
        axes[0].set_ylim(len(TARGETS) - 0.4, -0.6)
        figure.legend(
            *axes[0].get_legend_handles_labels(), loc="lower center", ncol=3, frameon=False
        )
        figure.tight_layout(rect=(0, 0.07, 1, 1))
        figure.savefig(path, dpi=110)
        plt.close(figure)


if __name__ == "__main__":
    for name in STUDIES:
        print("\n".join(lines(name)))
    if len(sys.argv) > 1:
        draw(Path(sys.argv[1]))
