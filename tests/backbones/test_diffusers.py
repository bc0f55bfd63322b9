"""Transformers of diffusers: the same numbers as their own forward passes and as our grouped attention."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file, save_file
from support import clean_images, draw_of, randomize, resolved

from selfalign import SiT, UserError, recipe
from selfalign.backbones.diffusers.folder import DIT, FLUX
from selfalign.backbones.diffusers.model import load_folder, merged_weights, save_folder
from selfalign.cli import main
from selfalign.objective import Objective
from selfalign.runs.load import load_run
from selfalign.runs.start import resume_run, start_run
from selfalign.student import build_student
from selfalign.tokens import TokenGroups, one_group
from selfalign.training.ema import EMA

diffusers = pytest.importorskip("diffusers")

DIT_SETTINGS = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 1,
    "num_layers": 3,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
    "norm_eps": 1e-6,
}
FLUX_SETTINGS = {
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "axes_dims_rope": (4, 6, 6),
}
KINDS = {DIT: DIT_SETTINGS, FLUX: FLUX_SETTINGS}
SIZE = "S/2"  # the patch; the rest is the folder's


def model_of(kind, seed=0, **changes):
    torch.manual_seed(seed)
    model = getattr(diffusers, kind)(**{**KINDS[kind], **changes})
    randomize(model, seed, std=0.15)
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with weights of each kind, and one with the settings alone."""
    found = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("diffusers") / kind
        model_of(kind).save_pretrained(folder)
        bare = folder.with_name(f"{kind}-bare")
        bare.mkdir()
        (bare / "config.json").write_text((folder / "config.json").read_text())
        found |= {kind: folder, f"{kind}-bare": bare}
    return found


def settings_of(folder, **more):
    return {
        "model.backbone": "diffusers",
        "backbones.diffusers.folder": str(folder),
        "model.size": SIZE,
        **more,
    }


def config_of(folder, name="sra-dts-as", **more):
    return resolved(name, settings_of(folder, **more), num_classes=10)


def inputs(groups, seed=0, batch=4, count=16):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, count, 4, generator=generator)
    timesteps = torch.rand(batch, len(groups.sizes), generator=generator)
    labels = torch.randint(10, (batch,), generator=generator)
    return tokens, timesteps, labels


def random_groups(batch=4, count=16, **more):
    order = torch.rand(batch, count, generator=torch.Generator().manual_seed(1)).argsort(dim=1)
    return TokenGroups(order, (4, 12), separate=True, **more)


class TestDiT:
    def test_whole_samples_are_what_diffusers_makes_of_them(self, folders):
        adapter = build_student(config_of(folders[DIT]))
        model, _ = load_folder(str(folders[DIT]), DIT)
        x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        t, labels = torch.tensor([0.1, 0.4, 0.7, 1.0]), torch.tensor([0, 3, 9, 10])
        with torch.no_grad():
            expected = model.eval()(x, timestep=1000 * t, class_labels=labels).sample
            found = adapter.velocity(x, t, labels)
        assert torch.allclose(found, expected, atol=2e-5)

    @pytest.mark.parametrize("whole", [0, 2])
    def test_groups_are_those_of_our_own_transformer(self, folders, whole):
        """A SiT with the DiT's weights: the same velocities and features under separated groups."""
        adapter = build_student(config_of(folders[DIT]))
        sit = as_sit(adapter.model)
        groups = random_groups(whole=whole)
        tokens, timesteps, labels = inputs(groups)
        timesteps[:whole] = timesteps[:whole, :1]
        with torch.no_grad():
            mine = sit(tokens, timesteps, labels, groups, taps=(1, 2, 3))
            theirs = adapter(tokens, timesteps, labels, groups, taps=(1, 2, 3))
        assert torch.allclose(mine.velocity, theirs.velocity, atol=2e-4)
        for block in (1, 2, 3):
            assert torch.allclose(mine.features[block], theirs.features[block], atol=2e-4)


def as_sit(model) -> SiT:
    """Our transformer with the weights of a DiT whose blocks embed timesteps and classes alike."""
    first = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(first.state_dict())
    sit = SiT(
        channels=1, image_size=(8, 8), patch_size=2, hidden_size=24, depth=3, heads=2, num_classes=10
    )  # fmt: skip
    time, names = first.timestep_embedder, {}
    names["x_embedder.proj"] = model.pos_embed.proj
    names["t_embedder.mlp.0"], names["t_embedder.mlp.2"] = time.linear_1, time.linear_2
    for number, block in enumerate(model.transformer_blocks):
        mine = f"blocks.{number}."
        names[f"{mine}attn.proj"] = block.attn1.to_out[0]
        names[f"{mine}mlp.fc1"], names[f"{mine}mlp.fc2"] = block.ff.net[0].proj, block.ff.net[2]
        names[f"{mine}adaLN_modulation.1"] = block.norm1.linear
    names["final_layer.linear"] = model.proj_out_2
    state = {
        f"{name}.{kind}": getattr(module, kind)
        for name, module in names.items()
        for kind in ("weight", "bias")
    }
    for number, block in enumerate(model.transformer_blocks):
        of = block.attn1
        for kind in ("weight", "bias"):
            parts = [getattr(layer, kind) for layer in (of.to_q, of.to_k, of.to_v)]
            state[f"blocks.{number}.attn.qkv.{kind}"] = torch.cat(parts)
    state["y_embedder.embedding_table.weight"] = first.class_embedder.embedding_table.weight
    # theirs are (shift, scale) of the last layer as well
    state["final_layer.adaLN_modulation.1.weight"] = model.proj_out_1.weight
    state["final_layer.adaLN_modulation.1.bias"] = model.proj_out_1.bias
    state["pos_embed"] = model.pos_embed.pos_embed
    sit.load_state_dict(state)
    # diffusers divides by 127 where DiT divides by 128, and counts timesteps to 1000.
    steps = torch.arange(128, dtype=torch.float32)
    sit.t_embedder.frequencies = 1000 * torch.exp(-torch.log(torch.tensor(1e4)) * steps / 127)
    return sit.eval()


class TestFlux:
    def ids(self, side=4):
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        return torch.cat([torch.zeros(len(places), 1), places], dim=1)

    def theirs(self, adapter, model, tokens, t, labels, ids):
        """diffusers' own forward pass, with its own attention."""
        text, pooled = adapter._read(labels, tokens)
        velocity = model(
            hidden_states=adapter._packed(tokens),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=t,
            img_ids=ids,
            txt_ids=torch.zeros(text.shape[1], 3),
            return_dict=False,
        )[0]
        return adapter._unpacked(velocity)

    @pytest.fixture
    def pair(self, folders):
        adapter = build_student(config_of(folders[FLUX]))
        randomize(adapter.y_embedder, 3)
        return adapter, load_folder(str(folders[FLUX]), FLUX)[0].eval()

    def test_whole_samples_are_what_diffusers_makes_of_them(self, pair):
        adapter, model = pair
        tokens, timesteps, labels = inputs(one_group(16))
        with torch.no_grad():
            found = adapter(tokens, timesteps, labels, one_group(16)).velocity
            expected = self.theirs(adapter, model, tokens, timesteps[:, 0], labels, self.ids())
        assert torch.allclose(found, expected, atol=2e-5)

    def test_a_group_is_a_sequence_of_its_own(self, pair):
        adapter, model = pair
        groups = random_groups()
        tokens, timesteps, labels = inputs(groups)
        with torch.no_grad():
            found = adapter(tokens, timesteps, labels, groups).velocity
            for row in range(4):
                for group, part in enumerate(groups.slices):
                    one, ids = tokens[row : row + 1, part], self.ids()[groups.order[row, part]]
                    t, label = timesteps[row : row + 1, group], labels[row : row + 1]
                    expected = self.theirs(adapter, model, one, t, label, ids)
                    assert torch.allclose(found[row : row + 1, part], expected, atol=2e-5)

    def test_features_stop_at_the_last_block_that_is_asked_for(self, pair):
        adapter, _ = pair
        groups = random_groups()
        arguments = (*inputs(groups), groups)
        ran = []
        for number, block in enumerate(adapter.blocks, 1):
            block.register_forward_hook(lambda *_, n=number: ran.append(n))
        with torch.no_grad():
            whole = adapter(*arguments, taps=(1, 3)).features
            ran.clear()
            early = adapter.features(*arguments, taps=(1, 3))
        assert max(ran) == 3
        for block in (1, 3):
            assert whole[block].shape == (4, 16, 32)
            assert torch.equal(whole[block], early[block])

    def test_reads_captions(self, folders):
        config = config_of(folders[FLUX], **{"model.condition": "text"})
        adapter = build_student(config)
        randomize(adapter, 5)
        adapter.describe([f"a {k}" for k in range(10)])
        groups = random_groups()
        tokens, timesteps, labels = inputs(groups)
        with torch.no_grad():
            one = adapter(tokens, timesteps, labels, groups).velocity
            other = adapter(tokens, timesteps, (labels + 1) % 10, groups).velocity
        # Every group sees the caption.
        assert all((one[:, part] != other[:, part]).any() for part in groups.slices)


@pytest.mark.parametrize("kind", KINDS)
class TestTraining:
    def test_losses_have_gradients_everywhere(self, folders, kind):
        config = config_of(folders[kind])
        student = build_student(config)
        teacher = EMA(student, 0.9).model
        x0, draw = clean_images(config, batch=4), draw_of(config, batch=4)
        labels = torch.arange(4)
        losses = Objective(config)(student, teacher, x0, labels, draw)
        losses.total.backward()
        assert losses.total.isfinite()
        without = {name for name, p in student.named_parameters() if p.grad is None}
        # The text's side of Flux's last block of two streams feeds the blocks after it; nothing is idle
        # but the classes' embedders of DiT's blocks, of which all are used.
        assert without == set()

    def test_a_new_models_blocks_are_the_identity_and_its_weights_the_seeds(self, folders, kind):
        config = config_of(folders[f"{kind}-bare"])
        torch.manual_seed(1)
        one = build_student(config)
        torch.manual_seed(2)
        other = build_student(config)
        for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b), name
        groups = random_groups()
        assert (one(*inputs(groups), groups).velocity == 0).all()

    def test_a_run_trains_resumes_samples_and_goes_back_to_its_folder(
        self, folders, kind, tmp_path: Path
    ):
        settings = {**SMALL, **settings_of(folders[kind]), "training.steps": 4}
        quiet = {"monitors": ()}
        config = recipe("sra-dts-as", settings)
        start_run(config, tmp_path / "run", lambda state, values: None, **quiet)
        resume_run(tmp_path / "run", 6, lambda state, values: None, **quiet)
        run = load_run(tmp_path / "run", "raw")
        save_folder(run.model, tmp_path / "back")
        words = ["export", str(tmp_path / "run"), str(tmp_path / "exported"), "--weights", "raw"]
        assert main([*words, "--format", "diffusers"]) == 0
        for file in (tmp_path / "back").iterdir():
            assert file.read_bytes() == (tmp_path / "exported" / file.name).read_bytes()
        back, pretrained = load_folder(str(tmp_path / "back"), kind)
        assert pretrained
        held = run.model.model.state_dict()
        assert all(torch.equal(value, held[name]) for name, value in back.state_dict().items())
        first, _ = load_folder(str(folders[kind]), kind)
        changed = [not torch.equal(v, held[name]) for name, v in first.state_dict().items()]
        assert sum(changed) > 0.9 * len(changed) - 6  # what no batch reached stays
        settings_back = json.loads((tmp_path / "back/config.json").read_text())
        settings_then = json.loads((folders[kind] / "config.json").read_text())
        assert {**settings_then, "_name_or_path": 0} == {**settings_back, "_name_or_path": 0}

    def test_low_rank_adapters(self, folders, kind, tmp_path: Path):
        pytest.importorskip("peft")
        settings = {
            **SMALL,
            **settings_of(folders[kind]),
            "backbones.diffusers.lora_rank": 2,
            "training.steps": 3,
        }
        config = recipe("sra-dts-as", settings)
        quiet = {"monitors": ()}
        start_run(config, tmp_path / "run", lambda state, values: None, **quiet)
        resume_run(tmp_path / "run", 5, lambda state, values: None, **quiet)
        run = load_run(tmp_path / "run", "raw")
        first, _ = load_folder(str(folders[kind]), kind)
        held = run.model.model.state_dict()
        frozen = {name.replace(".base_layer.", "."): v for name, v in held.items()}
        assert all(torch.equal(value, frozen[name]) for name, value in first.state_dict().items())
        assert any(value.any() for name, value in held.items() if ".lora_B." in name)
        # What is written has the adapters added in, and says the same.
        save_folder(run.model, tmp_path / "back")
        merged = copy.deepcopy(run.model)
        merged.model, _ = load_folder(str(tmp_path / "back"), kind)
        if kind == FLUX:
            return_processors(run.model, merged)
        groups = random_groups()
        with torch.no_grad():
            expected = run.model(*inputs(groups), groups).velocity
            found = merged(*inputs(groups), groups).velocity
        assert torch.allclose(found, expected, atol=1e-5)
        assert merged_weights(run.model.model).keys() == first.state_dict().keys()


def return_processors(source, target):
    """The adapter's attention for a transformer that was loaded anew."""
    from selfalign.backbones.diffusers.flux import RowwiseAttention

    for module in target.model.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(RowwiseAttention())


def test_the_command_line_takes_a_folder(folders, tmp_path: Path, capsys):
    arguments = ["train", "sra-dts-as", "--backbone", f"diffusers:{folders[DIT]}"]
    arguments += ["--out", str(tmp_path / "run"), "--model.size", SIZE, "--training.steps", "2"]
    arguments += ["--training.batch-size", "4", "--training.heldout-samples", "10"]
    assert main(arguments) == 0
    config = json.loads((tmp_path / "run/config.json").read_text())["config"]
    assert config["model"]["backbone"] == "diffusers"
    assert config["backbones"]["diffusers"]["folder"] == str(folders[DIT])
    assert "diffusers, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        (DIT, {"backbones.diffusers.folder": ""}, ["needed is a folder"]),
        (DIT, {"backbones.diffusers.folder": "nowhere"}, ["nowhere", "config.json"]),
        (DIT, {"model.size": "S/4"}, ["patches of 2", "S/2"]),
        (DIT, {"views.attention": "full"}, ["views.attention", "separated"]),
        (DIT, {"model.condition": "text"}, ["model.condition", "attends to no texts"]),
        (FLUX, {"model.size": "S/4"}, ["16 values", "4"]),
        (FLUX, {"views.hidden_groups": 1, "views.skipped_blocks": (1, 2)}, ["no way around"]),
    ],
)
def test_refused(folders, kind, changes, words):
    with pytest.raises(UserError) as error:
        config_of(folders[kind], **changes)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize("text", ["", "[]", "{", '{"_class_name": "UNet2DModel"}'])
def test_a_folder_of_something_else_is_refused(tmp_path: Path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        config_of(tmp_path)


def test_damaged_settings_are_refused(tmp_path: Path, folders):
    settings = json.loads((folders[DIT] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "num_layers": "many"}))
    with pytest.raises(UserError, match="num_layers is 'many'"):
        config_of(tmp_path)


WRONG = {
    DIT: {
        "num_layers": [0, True, 10**12],
        "patch_size": [0, -2],
        "in_channels": [10**12],
        "num_attention_heads": [-1, "x"],
        "attention_head_dim": [10**12],
        "norm_eps": ["x", None],
        "activation_fn": ["nosuch", 5],
        "out_channels": [2],
    },
    FLUX: {
        "num_single_layers": [-1],
        "axes_dims_rope": [[16], [4, 6], [4, 5, 7], "x"],
        "joint_attention_dim": [None, -1],
        "pooled_projection_dim": [10**12],
    },
}


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (kind, name, value)
        for kind, fields in WRONG.items()
        for name, values in fields.items()
        for value in values
    ],
)
def test_settings_that_make_no_model_are_refused(tmp_path: Path, folders, kind, name, value):
    settings = json.loads((folders[kind] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, name: value}))
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        build_student(config_of(tmp_path))


def _damage(folder: Path, change) -> None:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: _damage(folder, lambda t: t["proj_out_2.bias"].fill_(torch.nan)), "not finite"),
        (lambda folder: _damage(folder, lambda t: t.pop("proj_out_2.bias")), "lack proj_out_2.bias"),
        (
            lambda folder: _damage(folder, lambda t: t.update({n: v.int() for n, v in t.items()})),
            "whole numbers",
        ),
        (lambda folder: next(folder.glob("*.safetensors")).write_bytes(b"x" * 100), "cannot be read"),
        (
            lambda folder: next(folder.glob("*.safetensors")).rename(
                folder / "diffusion_pytorch_model.bin"
            ),
            r"diffusion_pytorch_model\.bin, and no",
        ),
    ],
)  # fmt: skip
def test_weights_that_are_not_the_models_are_refused(tmp_path: Path, folders, change, words):
    """Nothing begins anew where weights were meant."""
    folder = shutil.copytree(folders[DIT], tmp_path / "dit")
    change(folder)
    with pytest.raises(UserError, match=words):
        build_student(config_of(folder))
