"""Captions: read by number, dropped for guidance, and visible to every token of every group."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file, save_file
from support import clean_images, draw_of, randomize, resolved

from selfalign import UserError, recipe
from selfalign.cli import main
from selfalign.conditions.text import Text
from selfalign.objective import Objective
from selfalign.runs.load import load_run
from selfalign.runs.start import start_run
from selfalign.student import build_student
from selfalign.texts import BEGIN, FIRST_BYTE, PADDING, BytesEncoder
from selfalign.tokens import TokenGroups
from selfalign.training.ema import EMA

WORDS = ("red heart", "blue heart", "a cat with a very long name that is cut off", "näive", "")


def model_of(**changes):
    config = resolved("sra-dts-as", {"model.condition": "text", "model.size": "tiny/2", **changes})
    model = build_student(config)
    randomize(model, 1, std=0.1)
    model.describe(WORDS)
    return config, model.eval()


def seen(model, labels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(1, 16, 4, generator=generator).expand(len(labels), -1, -1)
    order = torch.rand(1, 16, generator=generator).argsort(dim=1).expand(len(labels), -1)
    groups = TokenGroups(order, (4, 12), separate=True)
    t = torch.tensor([[0.3, 0.8]]).expand(len(labels), -1)
    with torch.no_grad():
        return model(tokens, t, torch.tensor(labels), groups).velocity, groups


class TestBytes:
    def test_captions_are_bytes_after_a_beginning(self):
        encoder = BytesEncoder(2, 8, length=6, layers=0)
        encoder.describe(["ab", "abcdefgh"], prompts=["é"])
        expected = [
            [BEGIN, *(FIRST_BYTE + b for b in b"ab"), PADDING, PADDING, PADDING],
            [BEGIN, *(FIRST_BYTE + b for b in b"abcde")],
            [BEGIN, *[PADDING] * 5],
            [BEGIN, *(FIRST_BYTE + b for b in "é".encode()), PADDING, PADDING, PADDING],
        ]
        assert encoder.ids.tolist() == expected

    def test_padding_has_no_say(self):
        encoders = [BytesEncoder(1, 32, length=length, layers=2) for length in (8, 20)]
        randomize(encoders[1])
        state = encoders[1].state_dict()
        state["places.weight"] = state["places.weight"][:8]
        encoders[0].load_state_dict(state)
        read = []
        for encoder in encoders:
            encoder.describe(["heart"])
            read.append(encoder(torch.tensor([0])))
        assert torch.allclose(read[0].vector, read[1].vector, atol=1e-5)
        assert torch.allclose(read[0].tokens[:, :6], read[1].tokens[:, :6], atol=1e-5)


class TestModel:
    def test_every_group_reads_the_caption(self):
        _, model = model_of()
        velocity, groups = seen(model, [0, 1])
        for part in groups.slices:
            assert (velocity[0, part] != velocity[1, part]).any(dim=1).all()

    def test_the_same_words_are_the_same_caption(self):
        _, model = model_of()
        model.describe(WORDS, prompts=["red heart", "a thing that nobody has seen"])
        velocity, _ = seen(model, [0, 6, 7])
        assert torch.equal(velocity[0], velocity[1])
        assert not torch.equal(velocity[0], velocity[2])

    def test_the_dropped_caption_is_the_empty_one(self):
        config, model = model_of()
        velocity, _ = seen(model, [4, config.model.num_classes])
        assert torch.equal(velocity[0], velocity[1])

    def test_blocks_start_without_reading(self):
        config = resolved("sra-dts-as", {"model.condition": "text"})
        model = build_student(config)
        for block in model.blocks:
            assert (block.cross.proj.weight == 0).all() and (block.cross.q.weight != 0).any()

    def test_trains_everything_that_reads(self):
        config, student = model_of()
        teacher = EMA(student, 0.9).model
        x0, draw = clean_images(config), draw_of(config)
        labels = torch.arange(8) % 5
        Objective(config)(student, teacher, x0, labels, draw).total.backward()
        without = [name for name, p in student.named_parameters() if p.grad is None]
        assert without == []

    def test_gradient_checkpointing_changes_nothing(self):
        totals = []
        for recompute in (False, True):
            config, student = model_of(**{"model.gradient_checkpointing": recompute})
            teacher = EMA(student, 0.9).model
            arguments = clean_images(config), torch.arange(8) % 5, draw_of(config)
            totals.append(Objective(config)(student, teacher, *arguments).total)
        assert torch.equal(*totals)

    def test_a_model_of_labels_has_no_cross_attention(self):
        model = build_student(resolved("sra-dts-as"))
        assert not [name for name in model.state_dict() if "cross" in name]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny T5 with random weights and a tokenizer of words, as a folder."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "red", "blue", "heart", "cat"]
    of_words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="[UNK]")
    )
    of_words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=of_words, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    settings = transformers.T5Config(
        vocab_size=8, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2
    )
    transformers.T5EncoderModel(settings).save_pretrained(folder)
    return folder


class TestTransformers:
    def test_reads_each_caption_once_and_is_frozen(self, encoder):
        config, model = model_of(**{"conditions.text.encoder": f"transformers:{encoder}"})
        reader = model.y_embedder
        assert reader.features.shape == (6, 32, 12)
        assert not [name for name in model.state_dict() if "encoder" in name or "features" in name]
        assert reader.present.sum(dim=1).tolist()[:2] == [2, 2]
        velocity, groups = seen(model, [0, 1])
        assert all((velocity[0, part] != velocity[1, part]).any() for part in groups.slices)
        assert config.condition == Text(encoder=f"transformers:{encoder}")

    def test_what_is_not_there_is_one_line(self, tmp_path):
        with pytest.raises(UserError, match=r"conditions\.text\.encoder") as error:
            model_of(**{"conditions.text.encoder": f"transformers:{tmp_path / 'none'}"})
        assert "\n" not in str(error.value)

    def test_settings_that_make_no_model_are_one_line(self, encoder, tmp_path):
        folder = shutil.copytree(encoder, tmp_path / "t5")
        (folder / "config.json").write_text('{"model_type": "t5", "d_model": "x"}')
        with pytest.raises(UserError, match=r"conditions\.text\.encoder"):
            model_of(**{"conditions.text.encoder": f"transformers:{folder}"})

    def test_weights_that_lack_some_are_refused(self, encoder, tmp_path):
        """Nothing random reads captions."""
        folder = shutil.copytree(encoder, tmp_path / "t5")
        weights = load_file(folder / "model.safetensors")
        name = next(name for name in weights if name.endswith("SelfAttention.q.weight"))
        del weights[name]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=f"lack {name}"):
            model_of(**{"conditions.text.encoder": f"transformers:{folder}"})

    def test_captions_longer_than_it_reads_are_one_line(self, encoder, tmp_path):
        transformers = pytest.importorskip("transformers")
        folder = shutil.copytree(encoder, tmp_path / "bert")
        settings = transformers.BertConfig(
            vocab_size=8, hidden_size=12, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=16,
        )  # fmt: skip
        transformers.BertModel(settings).save_pretrained(folder)
        changes = {"conditions.text.encoder": f"transformers:{folder}"}
        with pytest.raises(UserError, match=r"conditions\.text\.length 32 tokens") as error:
            model_of(**changes)
        assert "\n" not in str(error.value)
        model_of(**changes, **{"conditions.text.length": 16})

    @pytest.mark.parametrize("changed", [{"padding_side": "left"}, {"pad_token": None}], ids=str)
    def test_whatever_it_fills_up_with_is_not_there(self, encoder, tmp_path, changed):
        transformers = pytest.importorskip("transformers")
        tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
        for name, value in changed.items():
            setattr(tokenizer, name, value)
        tokenizer.eos_token = "[UNK]"
        folder = shutil.copytree(encoder, tmp_path / "t5")
        tokenizer.save_pretrained(folder)
        _, model = model_of(**{"conditions.text.encoder": f"transformers:{folder}"})
        present = model.y_embedder.present
        assert present[:2].sum(dim=1).tolist() == [2, 2] and present[:2, :2].all()
        assert present[4].sum() == 1  # the empty caption

    def test_more_words_than_it_knows_are_one_line(self, encoder, tmp_path):
        transformers = pytest.importorskip("transformers")
        folder = shutil.copytree(encoder, tmp_path / "t5")
        settings = transformers.T5Config(
            vocab_size=3, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2
        )
        transformers.T5EncoderModel(settings).save_pretrained(folder)
        with pytest.raises(UserError, match="it cannot read captions") as error:
            model_of(**{"conditions.text.encoder": f"transformers:{folder}"})
        assert "\n" not in str(error.value)

    def test_models_that_read_alone_are_taken_whole(self, encoder, tmp_path):
        transformers = pytest.importorskip("transformers")
        folder = shutil.copytree(encoder, tmp_path / "bert")
        settings = transformers.BertConfig(
            vocab_size=8, hidden_size=12, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16,
        )  # fmt: skip
        transformers.BertModel(settings).save_pretrained(folder)
        _, model = model_of(**{"conditions.text.encoder": f"transformers:{folder}"})
        assert model.y_embedder.features.shape == (6, 32, 12)


def test_captions_that_are_no_text_are_read(tmp_path):
    """Names of files may be no UTF-8."""
    _, model = model_of()
    model.describe(["\udcff", "b"])
    assert model.y_embedder.ids[0, 1] == ord("?") + FIRST_BYTE


def test_a_run_reads_captions_and_draws_prompts(tmp_path: Path, capsys):
    generator = np.random.default_rng(0)
    captions = np.array(
        [f"{colour} {thing}" for colour in ("red", "blue") for thing in "abcde"] * 2
    )
    images = generator.integers(0, 255, (20, 3, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, captions=captions)
    settings = {
        **SMALL,
        "model.condition": "text",
        "data.name": "arrays",
        "data.root": str(tmp_path / "a.npz"),
        "training.steps": 2,
    }
    start_run(recipe("sra-dts-as", settings), tmp_path / "run", lambda state, values: None)
    assert (tmp_path / "run/samples/step_00000002.png").exists()
    run = load_run(tmp_path / "run")
    assert run.class_names == tuple(sorted(set(captions.tolist())))
    arguments = ["sample", str(tmp_path / "run"), "--num", "4", "--steps", "2"]
    prompts = ["--prompts", "red a", "a purple dog", "--guidance-scale", "2"]
    assert main([*arguments, "--out", str(tmp_path / "out"), *prompts]) == 0
    with np.load(tmp_path / "out/samples.npz") as found:
        assert found["arr_1"].tolist() == [0, 1, 0, 1]
    known = run.class_names.index("red a")
    by_label = ["--labels", str(known), "--guidance-scale", "2"]
    assert main([*arguments, "--out", str(tmp_path / "known"), *by_label]) == 0
    with np.load(tmp_path / "out/samples.npz") as a, np.load(tmp_path / "known/samples.npz") as b:
        assert (a["arr_0"][0] == b["arr_0"][0]).all()
    both = ["--prompts", "x", "--labels", "1"]
    assert main([*arguments, "--out", str(tmp_path / "none"), *both]) == 2
    assert "one of them" in capsys.readouterr().err


def test_without_anything_to_read_no_run_begins(tmp_path: Path):
    np.savez(tmp_path / "a.npz", images=np.zeros((20, 1, 8, 8), np.uint8))
    settings = {**SMALL, "model.condition": "text", "data.name": "arrays"}
    config = recipe("sra-dts-as", {**settings, "data.root": str(tmp_path / "a.npz")})
    with pytest.raises(UserError, match="neither captions nor labels"):
        start_run(config, tmp_path / "run", lambda state, values: None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("sides", [(8,), (4, 4, 4)], ids=str)
def test_captioned_samples_of_other_kinds_are_drawn(tmp_path: Path, sides):
    generator = np.random.default_rng(0)
    samples = generator.normal(size=(20, 1, *sides)).astype(np.float32)
    np.savez(tmp_path / "a.npz", samples=samples, captions=np.array(["a", "b"] * 10))
    settings = {**SMALL, "model.condition": "text", "data.name": "arrays"}
    settings |= {"data.root": str(tmp_path / "a.npz"), "training.steps": 1}
    start_run(recipe("sit", settings), tmp_path / "run", lambda state, values: None)
    arguments = ["sample", str(tmp_path / "run"), "--num", "2", "--steps", "1", "--prompts", "a"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/grid.png").stat().st_size > 2000


@pytest.mark.parametrize("form", ["diffusers", "safetensors", "sit"])
def test_no_form_of_export_holds_what_reads(tmp_path: Path, capsys, form):
    np.savez(
        tmp_path / "a.npz",
        images=np.zeros((20, 1, 8, 8), np.uint8),
        captions=np.array(["a", "b"] * 10),
    )
    settings = {**SMALL, "model.condition": "text", "data.name": "arrays"}
    settings |= {"data.root": str(tmp_path / "a.npz"), "training.steps": 1}
    quiet = {"monitors": ()}
    start_run(recipe("sit", settings), tmp_path / "run", lambda state, values: None, **quiet)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format", form]) == 2
    assert "reads texts" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_prompts_need_a_model_that_reads(small_run: Path, tmp_path: Path, capsys):
    arguments = ["sample", str(small_run), "--out", str(tmp_path / "out"), "--prompts", "x"]
    assert main(arguments) == 2
    assert "reads no texts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("encoder", "words", "bytes, and transformers:NAME"),
        ("encoder", "transformers:", "bytes, and transformers:NAME"),
        ("length", 1, "from 2"),
        ("layers", -1, "from 0"),
    ],
)
def test_refused(setting, value, words):
    with pytest.raises(UserError, match=words):
        resolved("sit", {"model.condition": "text", f"conditions.text.{setting}": value})
