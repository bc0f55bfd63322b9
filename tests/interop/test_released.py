"""Released checkpoints: conventions, dimensions, files and refusals."""

import argparse
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from selfalign import SiT, TokenGroups, UserError
from selfalign.interop.released import (
    DiT,
    build_dit,
    build_projectors,
    build_sit,
    infer_dimensions,
    load_dit,
    load_projectors,
    load_released,
    read_weights,
    recognise,
)
from selfalign.models.sizes import SIZES
from selfalign.views import patchify

HEADS = 2


def network(seed: int = 0, **changes: Any) -> SiT:
    """A small model in which every parameter matters."""
    settings: dict[str, Any] = {
        "channels": 3,
        "image_size": (8, 8),
        "patch_size": 2,
        "hidden_size": 24,
        "depth": 2,
        "heads": HEADS,
        "num_classes": 5,
    }
    model = SiT(**(settings | changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Images, timesteps, labels."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 8, 8, generator=generator)
    return x, torch.tensor([0.0, 0.2, 0.7, 1.0]), torch.tensor([0, 3, 4, 5])


def plain_weights() -> dict[str, Tensor]:
    return dict(network().state_dict())


def projectors(widths: tuple[int, ...] = (16,)) -> nn.ModuleList:
    """REPA's, as its model holds them."""

    def one(width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(24, 20), nn.SiLU(), nn.Linear(20, 20), nn.SiLU(), nn.Linear(20, width)
        )

    return nn.ModuleList(one(width) for width in widths)


@pytest.mark.parametrize("learned_sigma", [False, True])
def test_sit_runs_backwards_in_time(learned_sigma: bool) -> None:
    theirs = network(out_channels=6 if learned_sigma else 3)
    x, t, labels = inputs()
    ours = build_sit(theirs.state_dict(), "sit", heads=HEADS)
    expected = -theirs.velocity(x, 1 - t, labels)
    torch.testing.assert_close(ours.velocity(x, t, labels), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("learned_sigma", [False, True])
def test_self_flow_runs_backwards_in_time_and_embeds_channels_first(learned_sigma: bool) -> None:
    theirs = network(out_channels=6 if learned_sigma else 3, projection_head=True)
    weights = {
        name.replace("ap_head.", "projector."): value for name, value in theirs.state_dict().items()
    }
    embedder = weights["x_embedder.proj.weight"]
    weights["x_embedder.proj.weight"] = embedder.flatten(1)  # (channel, row, column)
    x, t, labels = inputs()
    ours = build_sit(weights, heads=HEADS, channels=3)
    expected = -theirs.velocity(x, 1 - t, labels)
    torch.testing.assert_close(ours.velocity(x, t, labels), expected, rtol=0, atol=2e-5)

    groups = TokenGroups(order=None, sizes=(16,))
    tokens = patchify(x, 2)
    _, features = ours(tokens, t[:, None], labels, groups, student_block=1)
    _, expected_features = theirs(tokens, 1 - t[:, None], labels, groups, student_block=1)
    torch.testing.assert_close(features, expected_features, rtol=0, atol=2e-5)


def test_self_flow_needs_its_channels() -> None:
    weights = plain_weights()
    weights["x_embedder.proj.weight"] = weights["x_embedder.proj.weight"].flatten(1)
    with pytest.raises(UserError, match="12 values per patch, which is no square of 4 channels"):
        build_sit(weights, heads=HEADS)
    with pytest.raises(UserError, match="pass channels"):
        build_sit(weights, heads=HEADS, channels=0)


@pytest.mark.parametrize("changes", [{}, {"projection_head": True}, {"qk_norm": True}])
def test_sra_and_repa_are_ours(changes: dict[str, Any]) -> None:
    theirs = network(**changes)
    x, t, labels = inputs()
    source = None if "projection_head" in changes else "sra"
    ours = build_sit(theirs.state_dict(), source, heads=HEADS)
    assert torch.equal(ours.velocity(x, t, labels), theirs.velocity(x, t, labels))
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_repa_projectors() -> None:
    theirs = projectors((16, 7))
    weights = plain_weights() | {f"projectors.{k}": v for k, v in theirs.state_dict().items()}
    assert recognise(weights) == ("repa",)
    assert build_sit(weights, heads=HEADS).ap_head is None
    features = torch.randn(2, 16, 24)
    for ours, their in zip(build_projectors(weights), theirs, strict=True):
        assert torch.equal(ours(features), their(features))

    del weights["projectors.1.2.bias"]
    with pytest.raises(UserError, match=r"1\.2\.bias is missing"):
        build_projectors(weights)
    with pytest.raises(UserError, match="no projectors"):
        build_projectors(plain_weights())


def test_dit_predicts_noise_and_sigma() -> None:
    theirs = network(out_channels=6)
    x, _, labels = inputs()
    steps = torch.tensor([0, 30, 500, 999])
    noise, sigma = build_dit(theirs.state_dict(), heads=HEADS)(x, steps, labels)
    assert torch.equal(noise, theirs.velocity(x, steps.float(), labels))
    assert noise.shape == sigma.shape == x.shape


def test_dit_velocity_on_the_linear_path_is_exact() -> None:
    """With the true noise it is the true velocity, and the network sees DiT's own diffusion."""
    dit = DiT(network(out_channels=6))
    x0, _, labels = inputs()
    noise = torch.randn_like(x0)
    steps = torch.tensor([0, 30, 500, 999])
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = (1 - betas).cumprod(0)[steps][:, None, None, None].float()

    def truth(xs: Tensor, seen: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        expected = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
        torch.testing.assert_close(xs, expected, rtol=0, atol=1e-5)
        assert seen is steps
        return noise, noise

    dit.forward = truth  # type: ignore[method-assign]
    t = dit.linear_timesteps(steps)[:, None, None, None]
    velocity = dit.linear_velocity((1 - t) * x0 + t * noise, steps, labels)
    torch.testing.assert_close(velocity, noise - x0, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["S", "B", "L", "XL"])
@pytest.mark.parametrize("patch_size", [2, 4, 8])
@pytest.mark.parametrize("side", [32, 64])
def test_dimensions_of_the_published_sizes(name: str, patch_size: int, side: int) -> None:
    size = SIZES[name]
    with torch.device("meta"):
        model = SiT(
            channels=4,
            image_size=(side, side),
            patch_size=patch_size,
            hidden_size=size.hidden_size,
            depth=size.depth,
            heads=size.heads,
            num_classes=1000,
            projection_head=True,
            out_channels=8,
        )
    dimensions = infer_dimensions(model.state_dict())
    assert (dimensions.hidden_size, dimensions.depth, dimensions.heads) == (
        size.hidden_size,
        size.depth,
        size.heads,
    )
    assert dimensions.image_size == (side, side)
    assert dimensions.patch_size == patch_size
    assert (dimensions.channels, dimensions.out_channels) == (4, 8)
    assert dimensions.num_classes == 1000
    assert dimensions.projection_head and not dimensions.qk_norm


def test_heads() -> None:
    with pytest.raises(UserError, match="width 24 is of no named size: pass heads"):
        build_sit(plain_weights(), "sra")
    with pytest.raises(UserError, match="heads is 5: allowed are divisors of the width, 24"):
        build_sit(plain_weights(), "sra", heads=5)
    with_norm = network(qk_norm=True).state_dict()
    assert infer_dimensions(with_norm).heads == HEADS


def test_layouts_are_recognised() -> None:
    plain = plain_weights()
    assert recognise(plain) == ("sit", "repa", "sra", "dit")
    sigma = dict(network(out_channels=6).state_dict())
    assert recognise(sigma) == ("sit", "dit")
    with_head = dict(network(projection_head=True).state_dict())
    assert recognise(with_head) == ("sra",)
    assert recognise(dict(network(projection_head=True, out_channels=6).state_dict())) == ("dit",)

    with pytest.raises(UserError, match="that of sit and dit, which mean different things"):
        build_sit(sigma, heads=HEADS)
    with pytest.raises(UserError, match="that of sra, not of sit"):
        build_sit(with_head, "sit", heads=HEADS)
    with pytest.raises(UserError, match="use load_dit"):
        build_sit(sigma, "dit", heads=HEADS)
    with pytest.raises(UserError, match="that of sra, not of dit"):
        build_dit(with_head, heads=HEADS)


def test_unknown_layouts_are_refused_by_name() -> None:
    for name in plain_weights():
        weights = plain_weights()
        del weights[name]
        with pytest.raises(UserError, match=f"{name}( is)? missing") as refusal:
            build_sit(weights, "sra", heads=HEADS)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"extra.weight": (1,)}, r"extra\.weight is unknown"),
        ({f"extra.{i}": (1,) for i in range(4)}, "and 1 more"),
        ({"blocks.1.mlp.fc1.bias": (7,)}, r"fc1\.bias has shape \(7,\) and not \(96,\)"),
        ({"pos_embed": (16, 24)}, r"pos_embed has shape \(16, 24\), allowed are 3 axes"),
        ({"pos_embed": (1, 15, 24)}, "15 tokens: allowed are square images"),
        ({"final_layer.linear.weight": (13, 24)}, "13 rows: allowed are 12, or 24 with a learned"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    wrong: dict[str, tuple[int, ...]], message: str
) -> None:
    weights = plain_weights() | {name: torch.zeros(shape) for name, shape in wrong.items()}
    with pytest.raises(UserError, match=message):
        build_sit(weights, "sra", heads=HEADS)


@pytest.mark.parametrize("name", ["a.safetensors", "flat.pt", "ema.pt", "model.pt", "lightning.pt"])
def test_files(tmp_path: Path, name: str) -> None:
    weights, path = plain_weights(), tmp_path / name
    decoy = {key: value + 1 for key, value in weights.items()}
    if name == "a.safetensors":
        save_file({key: value.contiguous() for key, value in weights.items()}, path)
    else:
        # As the projects' training scripts write them.
        contents: dict[str, dict[str, Any]] = {
            "flat.pt": weights,
            "ema.pt": {
                "model": decoy,
                "ema": weights,
                "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]},
                "args": argparse.Namespace(model="SiT-XL/2", resolution=256),
                "steps": 100,
            },
            "model.pt": {"model": weights, "epoch": 3},
            "lightning.pt": {"state_dict": weights, "epoch": 3},
        }
        torch.save(contents[name], path)
    model = load_released(path, "sra", heads=HEADS)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_older_pt_files(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save(plain_weights(), path, _use_new_zipfile_serialization=False)
    assert read_weights(path).keys() == plain_weights().keys()


def test_half_precision_is_widened(tmp_path: Path) -> None:
    path = tmp_path / "half.pt"
    torch.save({key: value.half() for key, value in plain_weights().items()}, path)
    model = load_released(path, "sit", heads=HEADS)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


class RunsCode:
    """Unpickles by touching a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickles_never_run_code(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    for path, save in (
        (tmp_path / "new.pt", torch.save),
        (
            tmp_path / "raw.pt",
            lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2)),
        ),
    ):
        save({"ema": plain_weights(), "args": RunsCode(touched)}, path)
        with pytest.raises(UserError, match="holds more than tensors and plain values"):
            read_weights(path)
        assert not touched.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(plain_weights(), path)
    else:
        save_file({key: value.contiguous() for key, value in plain_weights().items()}, path)
    whole = path.read_bytes()
    cuts = [whole[:length] for length in (0, 1, 7, 8, 9, 100, 5000, len(whole) - 1)]
    for content in [*cuts, b"\x80\x02.", b"not a checkpoint\n", b"\xff" * 64, b"<html></html>"]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"weights\.(pt|safetensors)") as refusal:
            load_released(path, heads=HEADS)
        assert "\n" not in str(refusal.value)


def test_files_without_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_released(tmp_path / "nowhere.pt")
    with pytest.raises(UserError, match="not a file"):
        load_released(tmp_path)
    path = tmp_path / "weights.pt"
    for content in ([1, 2], {}, {"steps": 3}, {"ema": {}}, torch.zeros(3)):
        torch.save(content, path)
        with pytest.raises(UserError, match="holds no weights"):
            read_weights(path)


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "unknown.pt"
    torch.save({"transformer_blocks.0.attn1.to_q.weight": torch.zeros(2, 2)}, path)
    for load in (load_released, load_dit):
        with pytest.raises(UserError, match=r"unknown\.pt': not a layout of .* missing"):
            load(path)
    with pytest.raises(UserError, match=r"unknown\.pt': no projectors"):
        load_projectors(path)
