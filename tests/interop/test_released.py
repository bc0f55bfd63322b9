"""Released checkpoints: conventions, dimensions, files and refusals."""

import argparse
import contextlib
import datetime
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from small_weights import HEADS, network, projectors
from torch import Tensor

from selfalign import SiT, UserError
from selfalign.backbones.sit.sizes import SIZES
from selfalign.heads import ProjectionHead
from selfalign.interop.files import read_weights
from selfalign.interop.released import (
    DiT,
    build_dit,
    build_projectors,
    build_sit,
    infer_dimensions,
    load_dit,
    load_projectors,
    load_released,
    recognise,
)
from selfalign.tokens import one_group


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Images, timesteps, labels."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 8, 8, generator=generator)
    return x, torch.tensor([0.0, 0.2, 0.7, 1.0]), torch.tensor([0, 3, 4, 5])


def plain_weights() -> dict[str, Tensor]:
    return dict(network().state_dict())


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

    tokens, groups, heads = ours.grid.patchify(x), one_group(16), ("ap_head",)
    ours.head_taps["ap_head"] = 1
    found = ours(tokens, t[:, None], labels, groups, heads=heads).projected["ap_head"]
    expected = theirs(tokens, 1 - t[:, None], labels, groups, heads=heads).projected["ap_head"]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


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
    assert "ap_head" not in dict(build_sit(weights, heads=HEADS).named_children())
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
            out_channels=8,
        )
        model.add_head("ap_head", ProjectionHead(size.hidden_size), tap=1)
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


def test_quantised_weights_are_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "quantised.pt"
    torch.save({key: (value * 99).to(torch.int8) for key, value in plain_weights().items()}, path)
    with pytest.raises(UserError, match="is int8 and not float32"):
        load_released(path, "sit", heads=HEADS)


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


@pytest.mark.parametrize(
    "prefix",
    [
        *(
            "module.",
            "_orig_mod.",
            "model.",
            "module._orig_mod.",
            "_orig_mod.module.",
            "model.module.",
        ),
        *("net.", "student.", "model.diffusion_model.", "_forward_module._orig_mod."),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_prefixes_of_wrappers_are_taken_off(tmp_path: Path, prefix: str, suffix: str) -> None:
    weights, path = plain_weights(), tmp_path / f"weights{suffix}"
    named = {prefix + name: value.contiguous() for name, value in weights.items()}
    if suffix == ".pt":
        torch.save({"state_dict": named}, path)
    else:
        save_file(named, path)
    assert read_weights(path).keys() == weights.keys()
    mixed = {**named, "other": torch.zeros(1)}  # a prefix that not all names share is a name
    torch.save(mixed, tmp_path / "mixed.pt")
    assert read_weights(tmp_path / "mixed.pt").keys() == mixed.keys()
    lists = {f"projectors.0.{n}.weight": torch.zeros(1) for n in range(2)}  # and so is a list's
    torch.save(lists, tmp_path / "lists.pt")
    assert read_weights(tmp_path / "lists.pt").keys() == lists.keys()


def test_an_empty_average_falls_back(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    for empty in ({}, None, {"decay": 0.999}, []):
        torch.save({"ema": empty, "model": plain_weights()}, path)
        with pytest.warns(UserWarning, match="not averaged"):
            assert read_weights(path).keys() == plain_weights().keys()
    torch.save({"model": {"state_dict": plain_weights()}}, path)
    assert read_weights(path).keys() == plain_weights().keys()


@pytest.mark.parametrize("inner", ["", "module.", "_orig_mod."])
def test_averages_of_wrappers(tmp_path: Path, inner: str) -> None:
    """torch's AveragedModel and ema-pytorch keep counters beside them, and that the trained weights too."""
    weights, path = plain_weights(), tmp_path / "weights.pt"
    trained = {f"online_model.{inner}{name}": value + 1 for name, value in weights.items()}
    averaged = {
        "torch": {f"module.{inner}{name}": value for name, value in weights.items()}
        | {"n_averaged": torch.tensor(5)},
        "Lightning": {f"ema.{inner}{name}": value for name, value in weights.items()} | trained,
        "ema-pytorch": {f"ema_model.{inner}{name}": value for name, value in weights.items()}
        | {"initted": torch.tensor(True), "step": torch.tensor(9), **trained},
    }
    for named in averaged.values():
        torch.save({"model": trained, "ema": named}, path)
        found = read_weights(path)
        assert found.keys() == weights.keys()
        assert all(torch.equal(value, weights[name]) for name, value in found.items())
    torch.save({"ema": {"step": torch.tensor(1)}}, path)
    assert list(read_weights(path)) == ["step"]


def test_an_average_without_names_is_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(
        {"ema": {"shadow_params": list(plain_weights().values())}, "model": plain_weights()}, path
    )
    with pytest.warns(
        UserWarning, match="ema holds no weights by name; those of the trained model"
    ):
        assert read_weights(path).keys() == plain_weights().keys()


def test_the_example_of_the_docs_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(channels=4, hidden_size=384, heads=6, num_classes=20)
    weights = model.state_dict() | projectors().state_dict(prefix="projectors.")
    torch.save({"ema": weights}, tmp_path / "repa-last.pt")
    docs = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    example = docs.partition("```python\nimport torch\n")[2].partition("vae = ")[0]
    assert "repa-last.pt" in example and "diffusers" in example
    lines = [line for line in example.splitlines() if "diffusers" not in line]
    monkeypatch.chdir(tmp_path)
    made: dict[str, Any] = {}
    exec("\n".join(lines).replace("250", "3"), made)
    assert made["samples"].images.shape == (16, 4, 8, 8)
    assert made["samples"].images.isfinite().all()


def test_what_scripts_keep_beside_weights_is_read(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    arguments = argparse.Namespace(results=Path("out") / "run", seed=np.int64(3), lr=np.float32(1))
    beside = {
        "args": arguments,
        "best": np.float64(1.5),
        "done": np.bool_(True),
        "name": np.str_("run"),
        "betas": (0.9, 1),
        "seen": np.arange(6).reshape(2, 3),
        "rng": (np.random.get_state(), random.getstate(), torch.get_rng_state()),
    }
    for zipped in (True, False):
        torch.save({"ema": plain_weights(), **beside}, path, _use_new_zipfile_serialization=zipped)
        assert read_weights(path).keys() == plain_weights().keys()


def test_a_refusal_names_the_class_and_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    for value, name in (
        (datetime.timedelta(1), "datetime.timedelta"),
        (np.datetime64("2020-01-01"), "DateTime64DType"),
        (np.array([{}], dtype=object), "ObjectDType"),
    ):
        torch.save({"ema": plain_weights(), "when": value}, path)
        with pytest.raises(UserError, match=rf"\([\w.]*{name}\); if you trust it, .*save_file"):
            read_weights(path)


def test_tensors_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    for tensor, problem in (
        (torch.zeros(1).expand(10**12), "is no plain tensor"),  # 4 TB, if anybody copied it
        (torch.eye(3).to_sparse(), "is no plain tensor"),
        (torch.nested.nested_tensor([torch.zeros(2)]), "is no plain tensor"),
        (torch.zeros(2, dtype=torch.complex64), "is no plain tensor"),
        (torch.zeros(2).to(torch.float8_e4m3fn), r"x .float8_e4m3fn. is no plain tensor"),
        (torch.zeros(2, device="meta"), "is no plain tensor"),
        (torch.tensor([1.0, torch.nan]), "is not finite"),
    ):
        torch.save({"ema": {**plain_weights(), "x": tensor}}, path)
        with pytest.raises(UserError, match=problem) as refusal:
            read_weights(path)
        assert "\n" not in str(refusal.value)


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02.")
        with archive.open("archive/data/0", "w", force_zip64=True) as entry:
            for _ in range(2**8):
                entry.write(bytes(2**20))
    with pytest.raises(UserError, match="unpacks to 268,435,4.. bytes, more than it has"):
        read_weights(path)


def test_a_table_of_labels_without_a_null_row() -> None:
    classes = network(num_classes=9)  # with the null class ten rows
    with pytest.warns(UserWarning, match="10 rows, which are taken for one class less"):
        assert build_sit(classes.state_dict(), "sra", heads=HEADS).num_classes == 9
    model = build_sit(classes.state_dict(), "sra", heads=HEADS, null_row=False)
    assert model.num_classes == 10
    table = model.y_embedder.embedding_table.weight
    torch.testing.assert_close(table[10], table[:10].mean(dim=0))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_change_of_a_file_is_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = (
        tmp_path_factory.getbasetemp()
        / f"fuzz{data.draw(st.sampled_from(['.pt', '.safetensors']))}"
    )
    weights = {"a": torch.arange(4.0), "b": torch.zeros(2, 3)}
    if path.suffix == ".pt":
        torch.save(
            {"ema": weights, "args": argparse.Namespace(x=1)},
            path,
            _use_new_zipfile_serialization=data.draw(st.booleans()),
        )
    else:
        save_file(weights, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(UserError):
        read_weights(path)
