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

from selfalign import Draw, Objective, SiT, TokenGroups, recipe
from selfalign.alignment import DISTANCES
from selfalign.flow import PATHS
from selfalign.interop.released import Source, build_dit, build_projectors, build_sit
from selfalign.sampling.guidance import Guidance, GuidedModel
from selfalign.sampling.solvers import solve_ode, solve_sde
from selfalign.views import patchify, unpatchify

TOLERANCE = 2e-5
LOSS_NAMES = {"cos": "cosine-over-tokens", "sml1": "smooth-l1", "l1": "l1", "l2": "l2"}
TEACHER_TIMESTEPS = {"sra": "sra", "self_flow": "self-flow", "same": "same"}
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
    model = SiT(
        channels=channels,
        image_size=(side, side),
        patch_size=meta["patch"],
        hidden_size=meta["hidden"],
        depth=meta["depth"],
        heads=meta["heads"],
        num_classes=len(state["y_embedder.embedding_table.weight"]) - 1,
        **settings,
    )
    model.load_state_dict(state)
    return model


def check_objective(meta: dict[str, Any], tensors: Tensors) -> Results:
    """Losses, features and gradients of one training step."""
    config = recipe(
        "sra",
        {
            # Only the patch is taken from the named size here; the model is made from the file.
            "model.size": f"XL/{meta['patch']}",
            "model.num_classes": meta["num_classes"],
            "flow.path": meta["path"],
            "views.mask_ratios": tuple(meta["mask_ratio"]),
            "views.timesteps": "dual" if meta["dual_timestep"] else "single",
            "views.attention": "separated" if meta["attention_separation"] else "full",
            "views.whole_image_fraction": meta["whole_image_samples"] / len(tensors["x0"]),
            "alignment.student_block": meta["student_block"],
            "alignment.teacher_block": meta["teacher_block"],
            "alignment.teacher_timestep": TEACHER_TIMESTEPS[meta["teacher_t"]],
            "alignment.teacher_groups": meta["teacher_mask"],
            "alignment.distance": LOSS_NAMES[meta["loss_type"]],
            "alignment.weight": meta["align_weight"],
        },
    )
    student, teacher = (
        make_model(
            weights(tensors, f"{role}."),
            meta,
            meta["channels"],
            qk_norm=meta["qk_norm"],
            projection_head=True,
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
    predictions = objective.predict(student, teacher, tensors["x0"], tensors["labels"], draw)
    losses = objective.losses(predictions)
    losses.total.backward()
    assert predictions.student_features is not None
    assert predictions.teacher_features is not None
    restore = predictions.groups.restore
    results = {
        "out.velocity_tokens": restore(predictions.velocity),
        "out.target_tokens": restore(predictions.target),
        "out.student_features": restore(predictions.student_features),
        "out.teacher_features": restore(predictions.teacher_features),
        "out.denoising_loss": losses.denoising,
        "out.align_released": losses.alignment[None],
        "out.align_cosine_per_token": DISTANCES["cosine"](
            predictions.student_features, predictions.teacher_features
        )[None],
        "out.total_released": losses.total[None],
    }
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            results[f"grad.{name}"] = parameter.grad
    return results


def check_sampler(meta: dict[str, Any], tensors: Tensors) -> Results:
    """Samples from recorded noise."""
    noise = tensors["z"]
    model = make_model(
        weights(tensors, "model."), meta, noise.shape[1], qk_norm=meta.get("qk_norm", False)
    )
    guided = GuidedModel(
        model,
        tensors["labels"],
        meta["null_class"],
        # A scale up to 1 is unguided in the released samplers too.
        Guidance(max(1.0, meta["cfg_scale"]), (meta["guidance_low"], meta["guidance_high"])),
        recorded_groups(meta, tensors, model.num_tokens),
    )
    if meta["kind"] == "ode":
        samples = solve_ode(guided, noise, meta["steps"], heun=meta["heun"])
    else:
        samples = solve_sde(
            guided,
            noise,
            meta["steps"],
            path=PATHS[meta["path"]],
            step_noise=lambda step: tensors["step_noise"][step],
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
    tokens = patchify(x, model.patch_size)
    if "t_per_token" in tensors:
        groups = TokenGroups(order=None, sizes=(1,) * model.num_tokens)
        velocity, _ = model(tokens, tensors["t_per_token"], labels, groups)
        results["out.model_image_per_token"] = unpatchify(
            velocity, model.patch_size, model.image_size
        )
    if "encoder_features" in tensors:
        whole = TokenGroups(order=None, sizes=(model.num_tokens,))
        features = model.features(tokens, t[:, None], labels, whole, meta["encoder_depth"])
        projected = build_projectors(state)[0](features)
        results["out.projected"] = projected
        # REPA's loss is the negative similarity, without the 1 of a distance.
        distance = DISTANCES["cosine"](projected, tensors["encoder_features"])
        results["out.projection_loss"] = distance[None] - 1
    return results


def check(file: Path) -> Iterator[tuple[str, float]]:
    """Every recorded tensor of a file with its maximum absolute error (infinite where absent)."""
    meta, tensors = read(file)
    if "kind" in meta:
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
