"""What separation costs, and what two timesteps do to a gradient: formulas, predictions and their figure.

    python benchmarks/theory.py [STUDY…]

prints what docs/theory.md predicts for the digits, sets it beside benchmarks/theory.json (which
`python benchmarks/theory_runs.py` measures) and beside the report.json of studies, and draws
docs/images/theory.png, with the costs of docs/results/patches.

Images are Gaussian here: x0 ~ N(0, Σ) over N tokens of P numbers each, on the linear path of Eq. 1. Losses
are per number, as everywhere in this package.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from selfalign.partitions import Ungrouped
from selfalign.parts import get
from selfalign.randomness import make_generator
from selfalign.tokens import TokenGrid, group_sizes

Array = np.ndarray[Any, Any]
HERE = Path(__file__).parent
MEASURED = HERE / "theory.json"
PATCHES = HERE.parent / "docs" / "results" / "patches"
FIGURE = HERE.parent / "docs" / "images" / "theory.png"
SHARES = (0.25, 0.75)
"""Token groups of the recipes."""
SUBSETS = 100
"""Random partitions over which a prediction is averaged."""


def velocity_loss(variance: Float[Array, "..."], t: float) -> Float[Array, "..."]:
    """f_t(λ) = λ/(t² + (1-t)²λ): the least error of the velocity along an axis of variance λ (Eq. 2).

    Operator concave in λ.
    """
    return variance / (t**2 + (1 - t) ** 2 * variance)


def mean_loss(variance: Float[Array, "..."]) -> Float[Array, "..."]:
    """f_t(λ) averaged over t uniform in [0, 1]: (π/2)·√λ."""
    return math.pi / 2 * np.sqrt(np.clip(variance, 0, None))


def axes(covariance: Float[Array, "D D"]) -> Float[Array, "D"]:
    """Variances along the principal axes."""
    return np.linalg.eigvalsh(covariance)


def hidden_pairs(shares: Sequence[float]) -> float:
    """h = 1 - Σα²: the share of pairs of tokens that separation hides from each other, for many tokens."""
    return 1 - sum(share**2 for share in shares)


def partitions(
    tokens: int, sizes: Sequence[int], count: int, seed: int = 0
) -> list[list[Int[Array, "n"]]]:
    """Random partitions of the tokens into groups of these sizes."""
    generator = np.random.default_rng(seed)
    cuts = np.cumsum(sizes)[:-1]
    return [np.split(generator.permutation(tokens), cuts) for _ in range(count)]


def separation_cost(
    covariance: Float[Array, "D D"],
    tokens: int,
    shares: Sequence[float] = SHARES,
    t: float | None = None,
    subsets: int = SUBSETS,
    drawn: Sequence[Sequence[Int[Array, "n"]]] | None = None,
) -> tuple[float, float]:
    """The least loss of whole images, and how much larger it is where tokens see their own group alone.

    A group S is predicted from itself: L_S = tr f(Σ_SS)/|S|. f is operator concave, so that
    tr f(Σ_SS) ≥ tr f(Σ)_SS (Hansen and Pedersen 1982), and the mean cost over subsets is never negative.

    Args:
        covariance: of the numbers of an image, token by token.
        tokens: N.
        shares: of the groups; rounded to whole tokens.
        t: the timestep; None for the mean over all.
        subsets: random partitions.
        drawn: other partitions in their place, the groups of each.
    """
    size = len(covariance) // tokens
    counts = [round(share * tokens) for share in shares]

    def loss(chosen: Int[Array, "n"]) -> float:
        rows = (chosen[:, None] * size + np.arange(size)).ravel()
        variances = axes(covariance[np.ix_(rows, rows)])
        return float((mean_loss(variances) if t is None else velocity_loss(variances, t)).sum())

    whole = loss(np.arange(tokens)) / len(covariance)
    drawn = drawn or partitions(tokens, counts, subsets)
    apart = sum(loss(group) for groups in drawn for group in groups) / len(drawn) / len(covariance)
    return whole, apart - whole


def small_signal_cost(
    covariance: Float[Array, "D D"], tokens: int, shares: Sequence[float], t: float
) -> float:
    """The cost where noise dominates: (1-t)²/t⁴ · h·N/(N-1) · Σ_{i≠j}‖Σ_ij‖², per number.

    To second order in Σ the loss is tr Σ/t² less (1-t)²/t⁴ times the squared covariances of the tokens
    that see each other; separation hides a share h·N/(N-1) of the pairs.
    """
    size = len(covariance) // tokens
    blocks = (covariance.reshape(tokens, size, tokens, size) ** 2).sum(axis=(1, 3))
    between = blocks.sum() - np.trace(blocks)
    hidden = hidden_pairs(shares) * tokens / (tokens - 1)
    return float((1 - t) ** 2 / t**4 * hidden * between / len(covariance))


def variance_ratio(shares: Sequence[float], correlation: float, independent: float = 0.0) -> float:
    """Variance of the gradient under dual timesteps over that under a single one, with separated attention.

    The gradient is Σ α_k g_k. With A = Σα², h = 1 - A, groups of equal variance, and correlations of their
    gradients ρ where they share a timestep and ρ' where they do not: (A + h·ρ')/(A + h·ρ).

    Args:
        shares: α.
        correlation: ρ.
        independent: ρ': what image, label and weights make two groups' gradients share in any case.
    """
    hidden = hidden_pairs(shares)
    return (1 - hidden + hidden * independent) / (1 - hidden + hidden * correlation)


def stationary_covariance(side: int, length: float, variance: float = 0.5) -> Float[Array, "D D"]:
    """Pixels of a square whose correlation falls as exp(-distance/length)."""
    places = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1).reshape(
        -1, 2
    )
    distance = np.linalg.norm(places[:, None] - places[None], axis=-1)
    return variance * np.exp(-distance / length)


def by_token(covariance: Float[Array, "D D"], side: int, patch: int) -> Float[Array, "D D"]:
    """A covariance of pixels (one channel, row by row) in the order of patches."""
    pixels = np.arange(side**2).reshape(side // patch, patch, side // patch, patch)
    order = pixels.transpose(0, 2, 1, 3).ravel()
    return covariance[np.ix_(order, order)]


def digits_covariances() -> dict[str, list[Float[Array, "D D"]]]:
    """Covariances of the digits' training images (8×8, in [-1, 1]) given the class, estimated in two ways."""
    from sklearn.covariance import ledoit_wolf

    from selfalign.data.datasets import open_data
    from selfalign.sections import DataConfig

    source = open_data(DataConfig())
    images, labels = source.train.read(range(len(source.train)))
    pixels, classes = images.flatten(1).double().numpy(), labels.numpy()
    groups = [pixels[classes == label] for label in np.unique(classes)]
    centred = np.concatenate([group - group.mean(axis=0) for group in groups])
    pooled = centred.T @ centred / (len(centred) - len(groups))
    return {
        "one covariance for all classes": [pooled],
        "one per class, shrunk (Ledoit and Wolf)": [ledoit_wolf(group)[0] for group in groups],
    }


def partitioned(
    name: str, patch: int, shares: Sequence[float], count: int
) -> list[list[Int[Array, "n"]]]:
    """Groups that a partition of the package makes of the tokens of a digit, drawn some times."""
    grid = TokenGrid((8, 8), patch)
    sizes = group_sizes(shares, grid.num_tokens)
    batch = Ungrouped(grid, sizes, count, make_generator(0, "theory"))
    order = get("partition", name)().order(batch).numpy()
    return [np.split(row, np.cumsum(sizes)[:-1]) for row in order]


def predictions() -> dict[str, Any]:
    """C_own on digits by patch, by share of the first group, by number of groups and by partition."""
    found: dict[str, Any] = {}
    for name, covariances in digits_covariances().items():

        def cost(
            patch: int, shares: Sequence[float], part: str = "", of: Any = covariances
        ) -> float:
            tokens, subsets = (8 // patch) ** 2, max(20, SUBSETS // len(of))
            drawn = partitioned(part, patch, shares, subsets) if part else None
            costs = [
                separation_cost(by_token(c, 8, patch), tokens, shares, None, subsets, drawn)[1]
                for c in of
            ]
            return float(np.mean(costs))

        found[name] = {
            "by_patch": {str(patch): cost(patch, SHARES) for patch in (4, 2, 1)},
            "by_first_group_of_16": {str(k): cost(2, (k / 16, 1 - k / 16)) for k in (1, 2, 4, 8)},
            "by_groups": {
                str(len(shares)): cost(2, shares)
                for shares in (SHARES, (0.25, 0.25, 0.5), (0.25, 0.25, 0.25, 0.25))
            },
            "by_partition": {
                part: cost(2, SHARES, part)
                for part in ("random", "blocks", "stripes", "checkerboard")
            },
        }
    return found


def _separations(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """What studies found separation to cost."""
    rows = []
    for folder in folders:
        report = json.loads((folder / "report.json").read_text())
        for fraction, costs in report.get("separation_costs", {}).items():
            rows += [{"study": folder.name, "fraction": fraction, **cost} for cost in costs]
    return rows


def _benefits(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The gain of separation on whole images beside the generalisation gap that bounds it."""
    rows = []
    for folder in folders:
        report = json.loads((folder / "report.json").read_text())
        gaps = report.get("sample_efficiency", {}).get("generalisation_gap", {})
        for fraction, costs in report.get("separation_costs", {}).items():
            for cost in costs:
                of_all = report["means"].get(cost["whole"], {}).get("generalisation_gap")
                gap = gaps.get(cost["whole"], {}).get(fraction, of_all)
                if gap is not None:
                    rows.append(
                        {
                            "study": f"{folder.name}, {float(fraction):.0%}",
                            "pair": f"{cost['separated']} - {cost['whole']}",
                            "gap": gap,
                            "cost": cost["C_whole"],
                        }
                    )
    return rows


def _draw(predicted: dict[str, Any], measured: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), dpi=120, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    correlations = np.linspace(0, 1, 50)
    left.plot(
        correlations, [variance_ratio(SHARES, rho) for rho in correlations], label="A/(A + hρ)"
    )
    left.axhline(1 - hidden_pairs(SHARES), color="0.6", linestyle="--", label="A, the wrong one")
    if "gradients" in measured:
        found = measured["gradients"]["separated"]
        left.errorbar(
            [found["correlation_shared"][0]],
            [found["variance_ratio"][0]],
            xerr=[found["correlation_shared"][1]],
            yerr=[found["variance_ratio"][1]],
            fmt="o",
            capsize=3,
            label="measured, ± 1 s.e.",
        )
    left.set(xlabel="ρ", ylabel="variance, dual / single", title="Gradients under separation")
    left.legend(fontsize=7)
    for name, found in predicted.items():
        tokens = [(8 // int(patch)) ** 2 for patch in found["by_patch"]]
        middle.plot(tokens, list(found["by_patch"].values()), marker="o", label=name)
    costs = [row for row in _separations([PATCHES]) if "dts" not in row["whole"]]
    tokens = [(8 // int(row["whole"].rpartition("patch")[2])) ** 2 for row in costs]
    means = np.array([row["C_own"]["mean"] for row in costs])
    ends = np.array([row["C_own"]["interval"] for row in costs])
    middle.errorbar(
        tokens, means, np.abs(ends - means[:, None]).T, fmt="ko", capsize=3, label="measured"
    )
    middle.set(xlabel="tokens", ylabel="C own", title="Digits", xscale="log")
    middle.set_xticks([4, 16, 64], ["4", "16", "64"])
    middle.minorticks_off()
    middle.set_ylim(0)
    middle.legend(fontsize=7)
    rows = measured.get("gaussians", [])
    if rows:
        line = np.array([0, 1.1 * max(row["predicted"] for row in rows)])
        right.fill_between(line, 0.85 * line, 1.15 * line, color="0.9", label="within 15 %")
        for steps in sorted({row["steps"] for row in rows}):
            some = [row for row in rows if row["steps"] == steps]
            points = [[row[key] for row in some] for key in ("predicted", "C_own")]
            right.plot(*points, "o", label=f"{steps:,} steps")
        right.set(xlabel="C own, predicted", ylabel="measured", title="Gaussian images")
        right.legend(fontsize=7)
    figure.savefig(FIGURE)


def main(arguments: Sequence[str]) -> None:
    """Print predictions beside what was measured, and draw the figure."""
    folders = [Path(name) for name in arguments]
    predicted = predictions()
    measured = json.loads(MEASURED.read_text()) if MEASURED.is_file() else {}
    for name, found in predicted.items():
        print(f"C_own on digits, {name}:")
        for key, costs in found.items():
            print(f"  {key}: " + ", ".join(f"{k}: {cost:.4f}" for k, cost in costs.items()))
    for row in _separations(folders):
        own, whole, share = row["C_own"], row["C_whole"], row["R"]
        print(
            f"{row['study']} at {float(row['fraction']):.0%}: {row['separated']} - {row['whole']}: "
            f"C_own {own['mean']:.4f}, C_whole {whole['mean']:.4f}"
            + (f", R {share['value']:.2f} {share['interval']}" if share else "")
        )
    for row in _benefits(folders):
        print(
            f"{row['study']}, {row['pair']}: benefit {-row['cost']['mean']:+.4f}, at most the gap "
            f"{row['gap']['mean']:+.4f} (95 % intervals of the cost {row['cost']['interval']}, of the gap "
            f"{row['gap']['interval']})"
        )
    for row in measured.get("gaussians", []):
        print(
            f"Gaussians, length {row['length']:g}, {row['steps']} steps: predicted "
            f"{row['predicted']:.4f}, measured {row['C_own']:.4f} "
            f"({row['C_own'] / row['predicted'] - 1:+.0%}), on whole images {row['C_whole']:.4f}"
        )
    for attention, found in measured.get("gradients", {}).items():
        print(f"gradients, {attention}: " + json.dumps(found))
    _draw(predicted, measured)


if __name__ == "__main__":
    main(sys.argv[1:])
