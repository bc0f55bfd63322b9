"""Compare selfalign with recorded behaviour of the released implementations.

    python tests/golden/check.py FILE…

prints a line per compared tensor with its maximum absolute error, ends with `N passed, M failed`,
and exits with 1 if any failed. The files' format is described in tests/golden/README.md.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from selfalign import Draw, Objective, SiT, TokenGroups, recipe, resolve
from selfalign.flow import PATHS
from selfalign.heads import ProjectionHead
from selfalign.interop.released import (
    Source,
    build_dit,
    build_projectors,
    build_sit,
    turn_around,
)
from selfalign.sampling.guidance import GuidedModel
from selfalign.sampling.settings import Guidance
from selfalign.sampling.solvers import Solver
from selfalign.sampling.solvers.euler import Euler
from selfalign.sampling.solvers.heun import Heun
from selfalign.sampling.solvers.sde import EulerMaruyama
from selfalign.terms.alignment import HEAD, distance, normalised
from selfalign.terms.contrastive import NEGATIVES
from selfalign.tokens import one_group

TOLERANCE = 2e-5
LOSS_NAMES = {"cos": "cosine-over-tokens", "sml1": "smooth-l1", "l1": "l1", "l2": "l2"}
TEACHER_TIMESTEPS = {"sra": "below", "self_flow": "minimum", "same": "same"}
SOURCES: dict[str, Source] = {
    "willisma/SiT": "sit",
    "sihyun-yu/REPA": "repa",
    "black-forest-labs/Self-Flow": "self-flow",
    "vvvvvjdy/SRA": "sra",
}
Tensors = dict[str, Tensor]
Results = dict[str, Tensor]


def read(file: Path) -> tuple[dict[str, Any], Tensors]:
    """The settings and the tensors of a golden file."""
    with safe_open(file, framework="pt") as opened:
        meta = json.loads(opened.metadata()["meta"])
        return meta, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def weights(tensors: Tensors, prefix: str) -> Tensors:
    """The state dict recorded under a prefix."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def make_model(state: Tensors, meta: dict[str, Any], channels: int, **settings: Any) -> SiT:
    """A model of the recorded dimensions with the recorded weights."""
    side = meta["input_size"]
    tap = settings.pop("head_after", None)
    model = SiT(
        channels=channels,
        image_size=(side, side),
        patch_size=meta["patch"],
        hidden_size=meta["hidden"],
        depth=meta["depth"],
        heads=meta["heads"],
        num_classes=(
            len(state["y_embedder.embedding_table.weight"]) - 1 if state else meta["num_classes"]
        ),
        **settings,
    )
    if tap is not None:
        model.add_head("ap_head", ProjectionHead(model.hidden_size), tap)
    if state:
        model.load_state_dict(state)
    return model


def check_objective(meta: dict[str, Any], tensors: Tensors) -> Results:
    """Losses, features and gradients of one training step."""
    settings = {
        # Only the patch is taken from the named size here; the model is made from the file.
        "model.size": f"XL/{meta['patch']}",
        "flow.path": meta["path"],
        "views.mask_ratios": tuple(meta["mask_ratio"]),
        "views.timesteps": "independent" if meta["dual_timestep"] else "single",
        "views.attention": "separated" if meta["attention_separation"] else "full",
        "views.whole_image_fraction": meta["whole_image_samples"] / len(tensors["x0"]),
        "terms.alignment.block": meta["student_block"],
        "terms.alignment.distance": LOSS_NAMES[meta["loss_type"]],
        "terms.alignment.weight": meta["align_weight"],
        "targets.ema.block": meta["teacher_block"],
        "targets.ema.timestep": TEACHER_TIMESTEPS[meta["teacher_t"]],
        "targets.ema.groups": meta["teacher_mask"],
        "training.batch_size": len(tensors["x0"]),
    }
    side = meta["input_size"]
    config = resolve(recipe("sra", settings), meta["channels"], (side, side), meta["num_classes"])
    student, teacher = (
        make_model(
            weights(tensors, f"{role}."),
            meta,
            meta["channels"],
            qk_norm=meta["qk_norm"],
            head_after=meta["student_block"],
        )
        for role in ("student", "teacher")
    )
    draw = Draw(
        noise=tensors["noise"],
        timesteps=tensors["timesteps"],
        order=tensors["group_ids"].argsort(dim=1, stable=True) if config.num_groups > 1 else None,
        teacher_interval=tensors["teacher_interval"],
        label_dropout=torch.zeros_like(tensors["labels"], dtype=torch.bool),
    )
    objective = Objective(config)
    forward = objective.predict(student, teacher, tensors["x0"], tensors["labels"], draw)
    losses = objective.losses(forward)
    losses.total.backward()
    projected, target = forward.output.projected[HEAD], forward.targets["ema"]
    restore = forward.views.groups.restore
    results = {
        "out.velocity_tokens": restore(forward.output.velocity),
        "out.target_tokens": restore(forward.views.target),
        "out.student_features": restore(projected),
        "out.teacher_features": restore(target),
        "out.denoising_loss": losses.terms["denoising"],
        "out.align_released": losses.terms["alignment"][None],
        "out.align_cosine_per_token": distance("cosine", projected, target)[None],
        "out.total_released": losses.total[None],
    }
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            results[f"grad.{name}"] = parameter.grad
    return results


SYSTEMS: dict[str, dict[str, Any]] = {
    "repa": {"terms.alignment.target": "frozen-encoder"},
    "irepa": {"terms.alignment.target": "frozen-encoder"},
    "layersync": {"terms.alignment.target": "same-pass", "terms.alignment.projector": "none"},
    "contrastive-flow-matching": {"objective.terms": ("contrastive",)},
}
"""Where each system lies in the space."""


def check_term(meta: dict[str, Any], tensors: Tensors) -> Results:
    """Losses, features and gradients of a neighbouring system's step on plain SiT."""
    state, side, channels = weights(tensors, "student."), meta["input_size"], tensors["x0"].shape[1]
    found = (name for name in tensors if name.startswith("encoder."))
    encoders = sorted(found, key=lambda name: int(name.removeprefix("encoder.")))
    words = tuple(f"timm:recorded#{name}" for name in encoders)
    settings: dict[str, Any] = {
        **SYSTEMS[meta["system"]],
        "model.size": f"XL/{meta['patch']}",
        "model.qk_norm": meta.get("qk_norm", False),
        "flow.path": meta["path"],
        "training.batch_size": len(tensors["x0"]),
    }
    if "student_block" in meta:
        settings["terms.alignment.block"] = meta["student_block"]
        settings["terms.alignment.weight"] = meta["weight"]
        settings["terms.alignment.spatial_norm"] = meta.get("spatial_norm", "none")
    else:
        settings["terms.contrastive.weight"] = meta["weight"]
    if "teacher_block" in meta:
        settings["targets.same-pass.block"] = meta["teacher_block"]
    if "projector" in meta:
        settings["terms.alignment.projector"] = meta["projector"]
        settings["targets.frozen-encoder.encoders"] = words
        settings["targets.frozen-encoder.widths"] = tuple(tensors[n].shape[2] for n in encoders)
    if "kernel" in meta:
        settings["projectors.conv.kernel"] = meta["kernel"]
    if "projector_dim" in meta:
        settings["projectors.mlp3.width"] = meta["projector_dim"]
    config = resolve(recipe("sit", settings), channels, (side, side), meta["num_classes"])
    turned = "t_convention" in meta
    if turned:  # SiT's own weights, in its time
        student = build_sit(state, "sit", heads=meta["heads"], channels=channels)
    else:
        student = make_model({}, meta, channels, qk_norm=config.model.qk_norm)
    for term in config.used_terms().values():
        for name, (tap, head) in term.heads(config, student).items():
            student.add_head(name, head, tap)
    if not turned:
        student.load_state_dict(state)
    rows = student.grid.shape[0]
    objective = Objective(config)
    draw = Draw(
        noise=tensors["noise"],
        timesteps=tensors["timesteps"],
        order=None,
        teacher_interval=torch.zeros_like(tensors["timesteps"]),
        label_dropout=torch.zeros_like(tensors["labels"], dtype=torch.bool),
        more={NEGATIVES: tensors["negatives"]} if "negatives" in tensors else {},
    )
    stored = {
        word: tensors[name].unflatten(1, (rows, -1))
        for word, name in zip(words, encoders, strict=True)
    }
    forward = objective.predict(
        student, None, tensors["x0"], tensors["labels"], draw, stored=stored
    )
    losses = objective.losses(forward)
    losses.total.backward()
    results = {
        "out.velocity": student.grid.unpatchify(forward.output.velocity),
        "out.denoising_loss": losses.terms["denoising"],
        "out.total": losses.total[None],
    }
    if "contrastive" in losses.terms:  # ours is minus their error
        results["out.contrastive_loss"] = -losses.terms["contrastive"]
    else:  # theirs is the negative similarity, without the 1 of a distance
        results["out.alignment_loss"] = losses.terms["alignment"][None] - 1
        results["out.total"] = results["out.total"] - meta["weight"]
        alignment = config.terms["alignment"]
        target = normalised(alignment.spatial_norm, forward.targets[alignment.target])
        widths = [tensors[name].shape[2] for name in encoders] or [student.hidden_size]
        for index, part in enumerate(target.split(widths, dim=2)):
            results[f"out.normalised.{index}"] = results["out.target_features"] = part
        for index, name in enumerate(alignment.head_names(config)):
            results[f"out.projected.{index}"] = forward.output.projected[name]
        if alignment.projector == "none":
            results["out.student_features"] = forward.output.features[meta["student_block"]]
    gradients = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    if turned:
        gradients = turn_around(gradients, student.t_embedder.frequencies)
    return results | {f"grad.{name}": gradient for name, gradient in gradients.items()}


def check_sampler(meta: dict[str, Any], tensors: Tensors) -> Results:
    """Samples from recorded noise."""
    noise = tensors["z"]
    model = make_model(
        weights(tensors, "model."), meta, noise.shape[1], qk_norm=meta.get("qk_norm", False)
    )
    guided = GuidedModel(
        model,
        tensors["labels"],
        torch.full_like(tensors["labels"], meta["null_class"]),
        # A scale up to 1 is unguided in the released samplers too.
        Guidance(max(1.0, meta["cfg_scale"]), (meta["guidance_low"], meta["guidance_high"])),
        recorded_groups(meta, tensors, model.num_tokens),
    )
    solver: Solver = EulerMaruyama()
    if meta["kind"] == "ode":
        solver = Heun() if meta["heun"] else Euler()
    with torch.no_grad():
        samples = solver.solve(
            guided,
            noise.double(),
            meta["steps"],
            PATHS[meta["path"]],
            lambda step: tensors["step_noise"][step],
        )
    return {"out.samples": samples}


def recorded_groups(
    meta: dict[str, Any], tensors: Tensors, num_tokens: int
) -> Callable[[int], TokenGroups] | None:
    """The sampler's own token groups, step by step, where the file has them."""
    if not 0 < meta["mask_ratio"] < 1:
        return None
    orders, first = tensors["token_order"], int(num_tokens * meta["mask_ratio"])
    fixed = meta["mask_type"] == "fix" or meta["kind"] == "ode"  # the ODE samplers draw once
    return lambda step: TokenGroups(
        order=orders[0 if fixed else step],
        sizes=(first, num_tokens - first),
        separate=meta["attention_separation"],
    )


def check_checkpoint(meta: dict[str, Any], tensors: Tensors) -> Results:
    """What a released checkpoint predicts."""
    x, t, labels = tensors["x"], tensors["t"], tensors["labels"]
    state, heads = weights(tensors, "model."), meta["heads"]
    if "out.eps_sigma" in tensors:
        return {"out.eps_sigma": torch.cat(build_dit(state, heads=heads)(x, t, labels), dim=1)}
    source = SOURCES[meta["source"].split()[0]]
    model = build_sit(state, source, heads=heads, channels=x.shape[1])
    if source == "sit":  # recorded in its own time, t = 1 is data, and towards data
        return {"out.velocity": -model.velocity(x, 1 - t, labels)}
    velocity = model.velocity(x, t, labels)
    results = {"out.velocity": velocity, "out.model_image": velocity}
    tokens = model.grid.patchify(x)
    if "t_per_token" in tensors:
        groups = TokenGroups(order=None, sizes=(1,) * model.num_tokens)
        output = model(tokens, tensors["t_per_token"], labels, groups)
        results["out.model_image_per_token"] = model.grid.unpatchify(output.velocity)
    if "encoder_features" in tensors:
        block = meta["encoder_depth"]
        features = model.features(tokens, t[:, None], labels, one_group(model.num_tokens), (block,))
        projected = build_projectors(state)[0](features[block])
        results["out.projected"] = projected
        # REPA's loss is the negative similarity, without the 1 of a distance.
        loss = distance("cosine", projected, tensors["encoder_features"]) - 1
        results["out.projection_loss"] = loss[None]
    return results


def check(file: Path) -> Iterator[tuple[str, float]]:
    """Every recorded tensor of a file with its maximum absolute error (infinite where absent)."""
    meta, tensors = read(file)
    if meta.get("kind") == "term":
        results = check_term(meta, tensors)
    elif "kind" in meta:
        results = check_sampler(meta, tensors)
    elif "x0" in tensors:
        results = check_objective(meta, tensors)
    else:
        results = check_checkpoint(meta, tensors)
    for name in sorted(k for k in tensors if k.startswith(("out.", "grad."))):
        error = float("inf")
        if name in results and results[name].shape == tensors[name].shape:
            error = (results[name].detach().double() - tensors[name].double()).abs().max().item()
        yield name, error


def main(files: list[str]) -> int:
    """Check files, print a line per tensor, and return the exit code."""
    torch.set_num_threads(1)
    passed = failed = 0
    for file in files:
        try:
            rows = list(check(Path(file)))
        except Exception as error:  # noqa: BLE001 - a file that cannot be run is a failed file
            rows = [(f"{type(error).__name__}: {error}", float("inf"))]
        for name, error in rows:
            ok = error <= TOLERANCE  # false for NaN
            passed, failed = passed + ok, failed + (not ok)
            print(f"{'pass' if ok else 'FAIL'}  {error:.2e}  {Path(file).name}  {name}")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not files else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
