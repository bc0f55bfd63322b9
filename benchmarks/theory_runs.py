"""The two experiments of docs/theory.md that need training: gradients at a checkpoint, Gaussian images.

    python benchmarks/theory_runs.py gradients RUN    about 3 minutes on one core
    python benchmarks/theory_runs.py gaussians STEPS  about 4 minutes for 1,000 steps

write benchmarks/theory.json, which `python benchmarks/theory.py` draws.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from theory import MEASURED, SHARES, by_token, separation_cost, stationary_covariance
from torch import Tensor

import selfalign
from selfalign.config import ResolvedConfig
from selfalign.data.datasets import open_data
from selfalign.network import Backbone
from selfalign.runs.load import load_run
from selfalign.tokens import TokenGroups, one_group

BATCH, BATCHES, BLOCKS = 8, 400, 20
LENGTHS = (0.5, 1.0, 2.0, 4.0)
"""Correlation lengths in pixels; one class each."""
GAUSSIAN_BATCH, LEARNING_RATE = 128, 2e-3
TESTED = 2000
"""Images of each class whose error is measured."""


def main(arguments: Sequence[str]) -> None:
    """Measure, and keep the results beside those of the other experiment."""
    if len(arguments) != 2 or arguments[0] not in ("gradients", "gaussians"):
        sys.exit(__doc__)
    found = gradients(Path(arguments[1])) if arguments[0] == "gradients" else None
    rows = gaussians(int(arguments[1])) if arguments[0] == "gaussians" else []
    # Read after the measurement: the other experiment may have ended meanwhile.
    known = json.loads(MEASURED.read_text()) if MEASURED.is_file() else {}
    if found is not None:
        known["gradients"] = found
    new = {row["steps"] for row in rows}
    kept = [row for row in known.get("gaussians", []) if row["steps"] not in new]
    known["gaussians"] = kept + rows
    MEASURED.write_text(json.dumps(known, indent=1) + "\n")


# Gradients at a checkpoint.


@dataclass
class Moments:
    """Sums over draws of gradients, whole and group by group."""

    count: int = 0
    total: Any = 0.0
    squares: float = 0.0

    def add(self, gradient: Float[Tensor, "D"]) -> None:
        """Take in a draw."""
        self.count += 1
        self.total = self.total + gradient
        self.squares += float(gradient @ gradient)


def gradients(folder: Path) -> dict[str, Any]:
    """Moments of the gradient at one θ, under single and dual timesteps, with full and separated attention.

    The same images, partitions and noise serve both schedules. Each value comes with its jackknife error over
    blocks of draws.

    Args:
        folder: a run of `sra`, whose raw weights are θ and whose EMA is the teacher.
    """
    run = load_run(folder, "ema")
    student = selfalign.build_student(run.config)  # what is loaded takes no gradients
    student.load_state_dict(load_run(folder, "raw").model.state_dict())
    source = open_data(run.config.data)
    found = {}
    for attention in ("separated", "full"):
        objectives = {}
        for schedule in ("single", "independent"):
            config = selfalign.override(
                run.config,
                {
                    "views.timesteps": schedule,
                    "views.attention": attention,
                    "views.mask_ratios": SHARES,
                    "targets.ema.groups": True,
                },
            )
            objectives[schedule] = selfalign.Objective(config)
        found[attention] = _compare(objectives, student, run.model, source.train)
    return found


def _compare(
    objectives: Mapping[str, Any], student: Backbone, teacher: Backbone, split: Any
) -> Any:
    parameters = [p for p in student.parameters() if p.requires_grad]
    blocks = []
    for block in range(BLOCKS):
        sums = {key: Moments() for key in ("single", "dual", "difference")}
        products = {key: np.zeros(5) for key in ("single", "dual")}
        means: dict[str, list[Any]] = {"single": [0.0, 0.0], "dual": [0.0, 0.0]}
        for number in range(BATCHES // BLOCKS):
            step = block * (BATCHES // BLOCKS) + number
            chosen = torch.randint(
                len(split), (BATCH,), generator=selfalign.make_generator(0, "gradients", step)
            )
            images, labels = split.read(chosen.tolist())
            drawn = {}
            for name, key in (("single", "single"), ("independent", "dual")):
                objective = objectives[name]
                generator = selfalign.make_generator(0, "views", step)
                draw = selfalign.draw_views(objective.config, images.shape, generator)
                forward = objective.predict(student, teacher, images, labels, draw)
                parts = _by_group(objective, forward)
                # Denoising and alignment of each group, weighted by its share: they add up to the loss.
                pieces = [
                    torch.cat(
                        [
                            g.flatten() if g is not None else torch.zeros(p.numel())
                            for g, p in zip(
                                torch.autograd.grad(
                                    part, parameters, retain_graph=k == 0, allow_unused=True
                                ),
                                parameters,
                                strict=True,
                            )
                        ]
                    )
                    for k, part in enumerate(parts)
                ]
                scaled = [piece / share for piece, share in zip(pieces, SHARES, strict=True)]
                products[key] += [
                    1.0,
                    float(scaled[0] @ scaled[0]),
                    float(scaled[1] @ scaled[1]),
                    float(scaled[0] @ scaled[1]),
                    0.0,
                ]
                means[key] = [a + b for a, b in zip(means[key], scaled, strict=True)]
                drawn[key] = pieces[0] + pieces[1]
                sums[key].add(drawn[key])
            sums["difference"].add(drawn["dual"] - drawn["single"])
        blocks.append((sums, products, means))

    def values(kept: Sequence[Any]) -> dict[str, float]:
        def moments(key: str) -> tuple[float, float]:
            count = sum(b[0][key].count for b in kept)
            total = sum(b[0][key].total for b in kept)
            squares = sum(b[0][key].squares for b in kept)
            variance = (squares - float(total @ total) / count) / (count - 1)
            return variance, float(total @ total) / count**2 - variance / count

        def correlation(key: str) -> float:
            count = sum(b[1][key][0] for b in kept)
            first, second = (sum(b[2][key][k] for b in kept) for k in (0, 1))
            centred = [
                sum(b[1][key][1 + k] for b in kept) - float(x @ y) / count
                for k, (x, y) in enumerate(((first, first), (second, second), (first, second)))
            ]
            return centred[2] / (centred[0] * centred[1]) ** 0.5

        single, dual, difference = (moments(k) for k in ("single", "dual", "difference"))
        return {
            "variance_ratio": dual[0] / single[0],
            "correlation_shared": correlation("single"),
            "correlation_independent": correlation("dual"),
            "moved_mean_squared": difference[1] / single[1],
        }

    whole = values(blocks)
    without = [values(blocks[:k] + blocks[k + 1 :]) for k in range(BLOCKS)]
    return {
        key: (
            value,
            float(np.sqrt((BLOCKS - 1) * np.var([other[key] for other in without]))),
        )
        for key, value in whole.items()
    }


def _by_group(objective: Any, forward: Any) -> list[Tensor]:
    """The total loss in parts, one per token group; they add up to it."""
    from torch.nn import functional

    config = objective.config
    weight = config.terms["alignment"].weight
    error = (forward.output.velocity - forward.views.target).square().mean(dim=2)
    projected, target = forward.output.projected["ap_head"], forward.targets["ema"]
    align = 1 - functional.cosine_similarity(projected, target, dim=2)
    per_token = (error + weight * align) / error.shape[1]
    return [per_token[:, part].sum(dim=1).mean() for part in forward.views.groups.slices]


# Gaussian images.


def gaussian_config(attention: str) -> ResolvedConfig:
    """A tiny transformer on 8×8 images of one channel, 16 tokens, a class for each correlation length."""
    settings: dict[str, Any] = {"model.size": "tiny/2", "views.class_dropout": 0.0}
    if attention == "separated":
        settings |= {"views.attention": "separated", "views.mask_ratios": SHARES}
    return selfalign.resolve(selfalign.recipe("sit", settings), 1, (8, 8), len(LENGTHS))


def draw_images(
    roots: Float[Tensor, "K D D"], labels: Tensor, generator: torch.Generator
) -> Float[Tensor, "B 1 8 8"]:
    """Fresh images, each with its class's covariance."""
    normal = torch.randn(len(labels), roots.shape[1], generator=generator)
    return torch.einsum("bij,bj->bi", roots[labels], normal).view(-1, 1, 8, 8)


def train(attention: str, roots: Float[Tensor, "K D D"], steps: int) -> Backbone:
    """The EMA of a model trained on images that never repeat."""
    config = gaussian_config(attention)
    student = selfalign.build_student(config)
    ema = selfalign.EMA(student, decay=0.99)
    objective = selfalign.Objective(config)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05
    )
    for step in range(steps):
        generator = selfalign.make_generator(0, "gaussian images", step)
        labels = torch.randint(len(LENGTHS), (GAUSSIAN_BATCH,), generator=generator)
        images = draw_images(roots, labels, generator)
        draw = selfalign.draw_views(config, images.shape, selfalign.make_generator(0, "v", step))
        optimizer.zero_grad()
        objective(student, ema.model, images, labels, draw, step).total.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.update(step)
        if step % 300 == 0:
            print(f"{attention}: step {step}", flush=True)
    return ema.model


def best_velocity(
    covariance: Float[Tensor, "B D D"], xt: Float[Tensor, "B D"], t: Float[Tensor, "B"]
) -> Float[Tensor, "B D"]:
    """E[ε - x0 | x_t] of Gaussian images: (t - (1-t)Σ)((1-t)²Σ + t²)⁻¹ x_t."""
    t = t[:, None]
    eye = torch.eye(covariance.shape[1], dtype=covariance.dtype)
    noised = (1 - t[..., None]) ** 2 * covariance + t[..., None] ** 2 * eye
    solved = torch.linalg.solve(noised, xt)
    return t * solved - (1 - t) * torch.einsum("bij,bj->bi", covariance, solved)


@torch.no_grad()
def excess(
    model: Backbone, covariances: Float[Tensor, "K D D"], label: int, separate: bool
) -> float:
    """How far a model's loss is above the least one: its mean squared distance from the best velocity.

    Args:
        model: trained.
        covariances: of the classes, token by token.
        label: the class.
        separate: whether tokens see their own group alone, model and best velocity alike.
    """
    generator = selfalign.make_generator(1, "test", label)
    covariance = covariances[label]
    root = torch.linalg.cholesky(covariance)
    tokens, size = model.num_tokens, len(covariance) // model.num_tokens
    total = 0.0
    for _ in range(TESTED // 200):
        x0 = torch.randn(200, len(covariance), generator=generator, dtype=torch.float64) @ root.T
        noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
        t = torch.rand(200, generator=generator, dtype=torch.float64)
        order = torch.rand(200, tokens, generator=generator).argsort(dim=1)
        xt = (1 - t[:, None]) * x0 + t[:, None] * noise
        sizes = [round(share * tokens) for share in SHARES] if separate else [tokens]
        groups = TokenGroups(order, tuple(sizes), separate=True) if separate else one_group(tokens)
        shown = groups.sort(xt.view(200, tokens, size))
        times = t[:, None].expand(-1, len(sizes))
        labels = torch.full((200,), label)
        found = model(shown.float(), times.float(), labels, groups).velocity.double()
        places = order if separate else torch.arange(tokens).expand(200, -1)
        for part in groups.slices:
            rows = (places[:, part, None] * size + torch.arange(size)).flatten(1)
            own = covariance[rows[:, :, None], rows[:, None, :]]
            best = best_velocity(own, torch.gather(xt, 1, rows), t)
            total += float((found[:, part].flatten(1) - best).square().sum())
    return total / (TESTED * len(covariance))


def gaussians(steps: int) -> list[dict[str, float]]:
    """C_own and C_whole of models of Gaussian images, beside the predicted cost.

    A model's loss is the least possible one and its excess, so that only the excess has to be measured.
    """
    pixels = [stationary_covariance(8, length) for length in LENGTHS]
    roots = torch.stack([torch.linalg.cholesky(torch.tensor(c)).float() for c in pixels])
    covariances = torch.stack([torch.tensor(by_token(c, 8, 2)) for c in pixels])
    whole, separated = (train(a, roots, steps) for a in ("full", "separated"))
    rows = []
    for label, length in enumerate(LENGTHS):
        least, cost = separation_cost(by_token(pixels[label], 8, 2), 16)
        of_whole = excess(whole, covariances, label, separate=False)
        of_own = excess(separated, covariances, label, separate=True)
        of_mismatch = excess(separated, covariances, label, separate=False)
        rows.append(
            {
                "length": length,
                "steps": steps,
                "least_loss": least,
                "predicted": cost,
                "C_own": cost + of_own - of_whole,
                "C_whole": of_mismatch - of_whole,
                "excess_whole": of_whole,
                "excess_own": of_own,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
