"""Look into several runs of a study, and put what matters of each analysis into one table.

    python benchmarks/inspections.py STUDY OUT.json VARIANT … [--seeds 0 1] [--only NAME …] [--fraction 0.25]

Every run is looked into beside the next of the seeds, which gives the ceilings. Analyses that a run's folder
`inspect` has already are not repeated, so that a stopped command goes on. Prints the tables of
docs/results/inspect.md.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from selfalign.inspect import attention, interventions, labels, timesteps
from selfalign.inspect.analyses import ANALYSES
from selfalign.inspect.page import FOLDER, inspect
from selfalign.inspect.subject import open_subject
from selfalign.records import write_json

COUNTS = (
    (timesteps, "IMAGES"),
    (attention, "IMAGES"),
    (interventions, "IMAGES"),
    (interventions, "PAIRS"),
    (interventions, "SAMPLES"),
    (labels, "PAIRS"),
)
"""What grows with the time of an analysis, and shrinks by --fraction."""

Found = Mapping[str, Any]
"""The numbers of each analysis of a run, by its name."""


def _last(pairs: Sequence[Sequence[Any]], which: int = -1) -> float:
    return float(pairs[which][1]["value"])


def _mean_over_blocks(found: Found, name: str, gap: int) -> float:
    """log S(t, s)/S(t, t) at the largest gap either way, over blocks."""
    return statistics.mean(_last(points, gap) for points in found["attention"][name].values())


def _pair(found: Found, begins: str, measure: str) -> float:
    pairs = found["similarity"]["pairs"]
    return statistics.mean(p[measure]["value"] for n, p in pairs.items() if n.startswith(begins))


def _ceiling(found: Found, measure: str) -> float:
    pairs = found["similarity"]["pairs"]
    return statistics.mean(p[measure]["value"] for n, p in pairs.items() if "ceiling" in n)


def _change(name: str, which: str) -> Callable[[Found], float]:
    return lambda found: found["interventions"]["mean_change"][name][which]["value"]


MEASURES: dict[str, tuple[str, Callable[[Found], float]]] = {
    "held-out loss, whole images": (
        "interventions",
        lambda f: f["interventions"]["loss_by_share"]["0.0"]["value"],
    ),
    "the same with separated attention (a quarter), minus whole": (
        "interventions",
        lambda f: f["interventions"]["loss_minus_full"]["0.25"]["value"],
    ),
    "ΔL, the other group cut off, two timesteps": (
        "interventions",
        _change("cut", "two_timesteps"),
    ),
    "ΔL, the other group cut off, one timestep": ("interventions", _change("cut", "one_timestep")),
    "ΔL, another image's content, two timesteps": (
        "interventions",
        _change("content", "two_timesteps"),
    ),
    "ΔL, another image's content, one timestep": (
        "interventions",
        _change("content", "one_timestep"),
    ),
    "ΔL, the other group's timestep mislabelled": (
        "interventions",
        _change("timestep", "two_timesteps"),
    ),
    "loss with the other group .8 away, minus none, full attention": (
        "interventions",
        lambda f: _last(f["interventions"]["by_gap"]["full attention"]),
    ),
    "U, full attention: a clean other group against noise, own t > 0": (
        "timesteps",
        lambda f: statistics.mean(gain["value"] for gain in f["timesteps"]["context_gain"][1:]),
    ),
    "the same of the best linear denoiser": (
        "timesteps",
        lambda f: statistics.mean(f["timesteps"]["context_gain_linear"][1:]),
    ),
    "U at own t = 0": ("timesteps", lambda f: f["timesteps"]["context_gain"][0]["value"]),
    "attention to a group cleaner by .8, log ratio to one timestep": (
        "attention",
        lambda f: _mean_over_blocks(f, "log_ratio_over_gap", 0),
    ),
    "attention to a group noisier by .8, log ratio": (
        "attention",
        lambda f: _mean_over_blocks(f, "log_ratio_over_gap", -1),
    ),
    "the same weighted by ‖A v W‖, cleaner by .8": (
        "attention",
        lambda f: _mean_over_blocks(f, "log_ratio_over_gap_weighted", 0),
    ),
    "label reliance": ("labels", lambda f: f["labels"]["this model"]["overall"]),
    "label reliance, permuted labels": (
        "labels",
        lambda f: f["labels"]["shuffled labels"]["overall"],
    ),
    "held-out loss where t > .9": ("batch", lambda f: f["batch"]["loss_in_highest_bin"]["value"]),
    "P(all timesteps > .9) in training": ("batch", lambda f: f["batch"]["all_high"]["value"]),
    "clean tokens' worth that a token sees in training": (
        "batch",
        lambda f: f["batch"]["clean_tokens_worth"],
    ),
    "probe accuracy, best block and t": (
        "probes",
        lambda f: max(max(row) for row in f["probes"]["accuracy"]),
    ),
    "CKA, student with teacher at the aligned blocks": (
        "similarity",
        lambda f: _pair(f, "student, block", "cka"),
    ),
    "CKA with another seed, mean over blocks (ceiling)": (
        "similarity",
        lambda f: _ceiling(f, "cka"),
    ),
    "CKNNA with another seed, mean over blocks (ceiling)": (
        "similarity",
        lambda f: _ceiling(f, "cknna"),
    ),
    "CKA with the classifier, mean over blocks": (
        "similarity",
        lambda f: statistics.mean(
            p["cka"]["value"]
            for n, p in f["similarity"]["pairs"].items()
            if n.endswith("with classifier")
        ),
    ),
}
"""What the table shows: the analysis, and the number in it."""


def look_into(run: Path, beside: Path | None, only: Sequence[str]) -> dict[str, Any]:
    """The numbers of a run's analyses, made where they are missing."""
    folder = run / FOLDER
    missing = [name for name in only if not (folder / f"{name}.json").exists()]
    if missing:
        inspect(open_subject(run, beside=beside), missing, folder)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in only}


def plot(found: Mapping[str, Sequence[Found]], file: Path) -> None:
    """U(t), attention over the gap, and label reliance over t: a line per run, a colour per variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), dpi=110, layout="constrained")
    gain, attention, reliance = figure.subplots(1, 3)
    for colour, (variant, runs) in enumerate(found.items()):
        for number, run in enumerate(runs):
            style = {"color": f"C{colour}", "label": None if number else variant, "linewidth": 1.2}
            levels, gains = run["timesteps"]["levels"], run["timesteps"]["context_gain"]
            gain.plot(levels[1:], [point["value"] for point in gains[1:]], **style)
            blocks = list(run["attention"]["log_ratio_over_gap"].values())
            gaps = [point[0] for point in blocks[0]]
            means = [statistics.mean(b[k][1]["value"] for b in blocks) for k in range(len(gaps))]
            attention.plot(gaps, means, **style)
            of_bins = run["labels"]["this model"]["by_timestep"]
            reliance.plot([(k + 0.5) / len(of_bins) for k in range(len(of_bins))], of_bins, **style)
    linear = next(iter(found.values()))[0]["timesteps"]
    gain.plot(
        linear["levels"][1:], linear["context_gain_linear"][1:], "k--", label="best linear", lw=1
    )
    gain.set(xlabel="own t (1 is noise)", ylabel="U(t) = L(t, 1) − L(t, 0)")
    attention.set(
        xlabel="the other group’s t − own t", ylabel="log S(t, s)/S(t, t), mean over blocks"
    )
    reliance.set(xlabel="t", ylabel="label reliance G(t)")
    for axis in (gain, attention, reliance):
        axis.grid(alpha=0.3)
    gain.legend(fontsize="x-small")
    figure.savefig(file)


def main() -> None:
    """Look into all runs that are there, write the numbers, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--only", nargs="+", choices=list(ANALYSES), default=list(ANALYSES))
    parser.add_argument("--fraction", type=float, default=1.0, help="of images, pairs and samples")
    given = parser.parse_args()
    for module, count in COUNTS:
        setattr(module, count, round(given.fraction * getattr(module, count)))
    numbers: dict[str, dict[str, list[float]]] = {}
    names = {
        variant: variant.partition("_data")[0] for variant in given.variants
    }  # without its share
    by_variant: dict[str, list[Found]] = {name: [] for name in names.values()}
    for seed, other in zip(given.seeds, given.seeds[1:] + given.seeds[:1], strict=True):
        for variant in given.variants:
            runs = [given.study / "runs" / variant / f"seed_{s}" for s in (seed, other)]
            beside = runs[1] if other != seed and (runs[1] / "result.json").exists() else None
            found = look_into(runs[0], beside, given.only)
            by_variant[names[variant]].append(found)
            print(f"{variant}, seed {seed}", flush=True)
            for name, (analysis, value) in MEASURES.items():
                if analysis in found and not ("ceiling" in name and beside is None):
                    of_variant = numbers.setdefault(name, {})
                    of_variant.setdefault(names[variant], []).append(float(value(found)))
            write_json(given.out, {"seeds": given.seeds, "numbers": numbers})
    if {"timesteps", "attention", "labels"} <= set(given.only):
        plot(by_variant, given.out.with_suffix(".png"))
    print("\n| | " + " | ".join(f"`{name}`" for name in by_variant) + " |")
    print("| --- |" + " --- |" * len(by_variant))
    for name, of_all in numbers.items():
        cells = [", ".join(f"{x:.4g}" for x in of_all.get(v, [])) for v in by_variant]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
