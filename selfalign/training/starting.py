"""Weights that a run starts from: of another run, or of a file; what does not fit them begins anew."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from selfalign.errors import UserError
from selfalign.network import Backbone
from selfalign.training.checkpoint import WEIGHTS, choose_checkpoint
from selfalign.weights import Weights, differences, listed, read_safetensors

LABELS = "y_embedder.embedding_table.weight"
POSITIONS = "pos_embed"
TIMESTEP_BIAS = "t_embedder.mlp.2.bias"
BORDERS = ("x_embedder.", "final_layer.", "mask_token")
"""What lies between tokens and features, and follows channels and patches."""


@dataclass(frozen=True)
class Start:
    """Weights to start from, by name: what is trained, and its average."""

    raw: Weights
    ema: Weights


def read_start(place: Path, weights: str) -> Start:
    """The weights of a run's last checkpoint, or of a released file.

    Args:
        place: a run's folder, or a .safetensors or .pt file.
        weights: `both` as they are, or `ema` or `raw` for both.

    Raises:
        UserError: there are none, or it has to be said whose they are.
    """
    if place.is_dir():
        checkpoint = choose_checkpoint(place / "checkpoints", None, list(WEIGHTS.values()))
        raw, ema = (read_safetensors(checkpoint / WEIGHTS[name]) for name in ("raw", "ema"))
    elif place.is_file():
        from selfalign.interop.files import read_weights, stated_project
        from selfalign.interop.released import SOURCES, recognise, translate

        found = read_weights(place)
        stated = [source for source in SOURCES if source == stated_project(place)]
        fitting = tuple(stated) or recognise(found)
        if len(fitting) > 1:
            raise UserError(
                f"{place} has the layout of {' and '.join(fitting)}, which mean different things by it: "
                f"`selfalign import {place} RUN --from …` says which, and --init takes that run"
            )
        if fitting[0] == "dit":
            raise UserError(
                f"training.start_from is {str(place)!r}: it predicts noise at diffusion steps; allowed are "
                "models that predict velocities"
            )
        ema, _ = translate(found, fitting[0])
        raw, _ = translate(read_weights(place, "raw"), fitting[0])
    else:
        raise UserError(f"training.start_from is {str(place)!r}: there is no such run or file")
    chosen = {"both": Start(raw, ema), "ema": Start(ema, ema), "raw": Start(raw, raw)}
    return chosen[weights]


def fit_weights(weights: Weights, model: Backbone) -> tuple[dict[str, Tensor], list[str]]:
    """Weights as a model takes them, all of its own, and what had to be done for it, a phrase each.

    Blocks and timesteps must fit. Another number of classes begins with every class as "no label" is;
    another grid has its positions interpolated; other channels or patches get new first and last layers;
    heads that are not there are new, and others left out.

    Args:
        weights: by this package's names, at its time and sign.
        model: what they are for, freshly initialised.

    Raises:
        UserError: it is another transformer.
    """
    own = model.state_dict()
    fitted = {name: value for name, value in weights.items() if name in own}
    told = _fit_labels(fitted, weights, own) + _fit_positions(fitted, own)
    heads = tuple(f"{name.partition('.')[0]}." for name in model.head_taps)
    misfits = {
        name[: name.rfind(".") + 1] or name
        for name, value in own.items()
        if name.startswith((*heads, *BORDERS))
        and (name not in fitted or fitted[name].shape != value.shape)
    }
    anew = {name: value for name, value in own.items() if name.startswith(tuple(misfits))}
    fitted |= anew  # whole layers: half of one would fit nothing
    fresh = dict.fromkeys(name.partition(".")[0] for name in anew)
    wrong = differences(own, fitted, dtypes=False)
    wrong += [f"{name} is unknown" for name in weights if name not in own and _of_trunk(name)]
    if wrong:
        raise UserError(
            f"the weights are of another transformer, {_shape(weights)}, and the model has {_shape(own)} "
            f"(model.size): {listed(wrong)}"
        )
    told += [f"{part} begins anew" for part in fresh]
    left_out = {name.partition(".")[0] for name in weights if name not in own} - {"y_embedder"}
    told += [f"{part} is left out" for part in sorted(left_out)]
    return {name: fitted[name].to(value) for name, value in own.items()}, told


def _shape(weights: Weights) -> str:
    """Depth and width, as far as names and shapes tell."""
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    embedder = weights.get("x_embedder.proj.weight")
    return f"{len(blocks)} blocks" + ("" if embedder is None else f" of width {len(embedder)}")


def _of_trunk(name: str) -> bool:
    return name.startswith(("blocks.", "t_embedder.", "x_embedder."))


def _fit_labels(fitted: dict[str, Tensor], weights: Weights, own: Weights) -> list[str]:
    """Another set of classes: every class starts as "no label", exactly as the weights have that."""
    theirs, ours = weights.get(LABELS), own.get(LABELS)
    if theirs is None and ours is None:
        return []
    if theirs is not None and ours is not None:
        if theirs.shape == ours.shape or theirs.shape[1:] != ours.shape[1:]:
            return []
        fitted[LABELS] = theirs[-1:].expand_as(ours).clone()
        return [f"{len(theirs) - 1} classes become {len(ours) - 1}: each starts as no label"]
    if ours is not None:
        fitted[LABELS] = torch.zeros_like(ours)
        return [f"weights without classes get {len(ours) - 1}: each starts as no label"]
    assert theirs is not None
    if TIMESTEP_BIAS in fitted:  # what the null label adds to every condition
        fitted[TIMESTEP_BIAS] = fitted[TIMESTEP_BIAS] + theirs[-1]
    return [f"{len(theirs) - 1} classes are left out: what stays is no label"]


def _fit_positions(fitted: dict[str, Tensor], own: Weights) -> list[str]:
    """Positions over another square grid, interpolated."""
    theirs, ours = fitted.get(POSITIONS), own.get(POSITIONS)
    if theirs is None or ours is None or theirs.shape == ours.shape:
        return []
    sides = [round(table.shape[1] ** 0.5) for table in (theirs, ours)]
    squares = [side**2 == table.shape[1] for side, table in zip(sides, (theirs, ours), strict=True)]
    if not all(squares) or theirs.shape[2] != ours.shape[2]:
        return []
    grid = theirs.transpose(1, 2).unflatten(2, (sides[0], sides[0]))
    resized = functional.interpolate(grid.float(), (sides[1], sides[1]), mode="bicubic")
    fitted[POSITIONS] = resized.flatten(2).transpose(1, 2)
    return [f"positions of {sides[0]}×{sides[0]} tokens are interpolated to {sides[1]}×{sides[1]}"]


def load_start(start: Start, student: Backbone, averages: Iterable[Backbone]) -> list[str]:
    """Load weights into a student and its averages, and say what had to be done.

    Args:
        start: from `read_start`.
        student: the trained model.
        averages: all of its averages, which take the average's weights.

    Raises:
        UserError: it is another transformer.
    """
    raw, told = fit_weights(start.raw, student)
    averaged = raw if start.ema is start.raw else fit_weights(start.ema, student)[0]
    student.load_state_dict(raw)
    for average in averages:
        average.load_state_dict(averaged)
    return told
