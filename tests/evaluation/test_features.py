"""Feature networks: the real architectures with random weights, through the real loading code."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

from selfalign import UserError
from selfalign.evaluation import features
from selfalign.evaluation.config import EvaluationConfig
from selfalign.evaluation.estimate import Estimate
from selfalign.evaluation.evaluate import evaluate
from selfalign.evaluation.features import Backbone, FeatureNetwork, extract, feature_network
from selfalign.evaluation.inputs import ImageSet
from selfalign.sampling.settings import SamplingConfig

IMAGES = torch.randint(
    256, (3, 3, 40, 52), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


def image_set(images: Tensor) -> ImageSet:
    """Images in memory as a set."""
    shape = tuple(images.shape[1:])
    return ImageSet("test images", len(images), shape, "0", lambda numbers: images[list(numbers)])


@pytest.fixture(scope="module")
def inception_weights() -> dict[str, Tensor]:
    """Random weights for torch-fidelity's Inception, scaled so that activations stay of order one."""
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Unloaded(fidelity.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict: object, strict: bool = True) -> None: ...

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *args, **kwargs: {})
        network = Unloaded("test", ["2048"], feature_extractor_weights_path="none")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in network.state_dict().items():
        if name.endswith("conv.weight"):
            nn.init.kaiming_normal_(tensor, generator=generator)
        elif name.endswith("bn.bias"):
            tensor.normal_(std=0.1, generator=generator)
    return network.state_dict()


@pytest.fixture(scope="module")
def inception(
    inception_weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> FeatureNetwork:
    cache = tmp_path_factory.mktemp("inception")
    (cache / "weights").mkdir()
    torch.save(inception_weights, cache / "weights" / features.INCEPTION_FILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SELFALIGN_CACHE", str(cache))
        return feature_network("inception", None, "")


class TestInception:
    @torch.no_grad()
    def test_is_torch_fidelitys(self, inception: FeatureNetwork) -> None:
        found = inception.module(IMAGES)
        extractor = inception.module.extractor
        pooled, logits = extractor(IMAGES)
        assert found["features"].shape == (3, 2048) and found["logits"].shape == (3, 1008)
        assert torch.equal(found["features"], pooled) and torch.equal(found["logits"], logits)
        torch.testing.assert_close(logits, pooled @ extractor.fc.weight.T)  # without bias

    @torch.no_grad()
    def test_spatial_features_by_hand(self, inception: FeatureNetwork) -> None:
        """First 7 channels of Mixed_6d's 1×1 branch after batch norm and ReLU, as (row, column, channel)."""
        block = inception.module.extractor.Mixed_6d
        seen: list[Tensor] = []
        handle = block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        spatial = inception.module(IMAGES)["spatial"]
        handle.remove()
        branch = block.branch1x1
        x = torch.einsum("bchw,oc->bohw", seen[0].double(), branch.conv.weight[..., 0, 0].double())
        x = (x - branch.bn.running_mean[:, None, None]) / (
            branch.bn.running_var[:, None, None].double() + 0.001
        ).sqrt()
        x = x * branch.bn.weight[:, None, None] + branch.bn.bias[:, None, None]
        expected = x.clamp(min=0)[:, :7]
        assert spatial.shape == (3, 2023)
        torch.testing.assert_close(
            spatial.view(3, 17, 17, 7).permute(0, 3, 1, 2).double(), expected, rtol=1e-4, atol=1e-4
        )
        assert 0.2 < (expected > 0).double().mean() < 0.8

    def test_grey_images_are_repeated(self, inception: FeatureNetwork) -> None:
        grey = IMAGES[:1, :1]
        with torch.no_grad():
            both = [inception.module(x)["features"] for x in (grey, grey.repeat(1, 3, 1, 1))]
        assert torch.equal(*both)

    def test_says_that_weights_are_not_the_published_ones(self, inception: FeatureNetwork) -> None:
        assert inception.notes == ("the Inception weights are not the published ones",)
        assert len(inception.facts["weights_file_sha256"]) == 16

    def test_refuses_absent_and_damaged_weights(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("torch_fidelity")

        def offline(*arguments: object, **options: object) -> None:
            raise OSError("no network")

        monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
        file = cache / "weights" / features.INCEPTION_FILE
        file.parent.mkdir(exist_ok=True)
        with pytest.raises(UserError, match=rf"cannot be downloaded .*put it at {file}"):
            feature_network("inception", None, "")
        file.write_bytes(b"not weights")
        with pytest.raises(UserError, match="does not hold the Inception weights"):
            feature_network("inception", None, "")
        torch.save({"wrong": torch.zeros(1)}, file)
        with pytest.raises(UserError, match="does not hold the Inception weights"):
            feature_network("inception", None, "")
        file.unlink()

    @pytest.mark.slow
    def test_evaluates_against_a_reference_in_adms_format(
        self, inception: FeatureNetwork, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr("selfalign.evaluation.setup.feature_network", lambda *_: inception)
        pixels = torch.randint(256, (48, 12, 12, 3), dtype=torch.uint8).numpy()
        np.savez(tmp_path / "samples.npz", arr_0=pixels[:24])
        np.savez(tmp_path / "real.npz", arr_0=pixels[24:])
        file = tmp_path / "reference.npz"

        def run(reference: Path, **settings: object) -> dict[str, Estimate]:
            config = EvaluationConfig(str(reference), "inception", **settings)  # type: ignore[arg-type]
            found = evaluate(tmp_path / "samples.npz", config, SamplingConfig(), Accelerator())
            assert found is not None
            assert any("do not compare" in note for note in found.notes)
            return dict(found.metrics)

        from_images = run(tmp_path / "real.npz", write_reference=file)
        assert set(from_images) == {"fid", "sfid", "inception_score", "precision", "recall"}
        arrays = np.load(file)
        assert arrays["mu"].shape == (2048,) and arrays["sigma_s"].shape == (2023, 2023)
        assert arrays["arr_0"].shape == (24, 12, 12, 3)
        assert run(file) == from_images
        np.savez(file, mu=arrays["mu"], sigma=arrays["sigma"])
        from_statistics = run(file)
        assert from_statistics == {k: from_images[k] for k in ("fid", "inception_score")}
        with pytest.raises(UserError, match=r"sfid needs .* mu_s and sigma_s"):
            run(file, metrics=("sfid",))
        with pytest.raises(UserError, match="kid needs at least 1000 samples, here are 24"):
            run(tmp_path / "real.npz", metrics=("kid",))


class TestTimm:
    def test_dinov2_from_a_file(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The real architecture of the smallest size, its positions resampled from 518 to 224 pixels."""
        timm = pytest.importorskip("timm")
        from safetensors.torch import save_file

        monkeypatch.setattr(features, "DINOV2", "vit_small_patch14_dinov2.lvd142m")
        torch.manual_seed(0)
        state = timm.create_model("vit_small_patch14_dinov2", num_classes=0).state_dict()
        file = cache / "weights" / "vit_small_patch14_dinov2.lvd142m.safetensors"
        file.parent.mkdir(exist_ok=True)
        save_file(state, file)
        network = feature_network("dinov2", None, "")
        with torch.no_grad():
            found = network.module.eval()(IMAGES)["features"]
        assert found.shape == (3, 384)

        # The same by hand: resized without cropping, ImageNet's statistics, the class token.
        model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=224)
        model.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(state, model))
        x = functional.interpolate(IMAGES.float(), (224, 224), mode="bicubic", antialias=True)
        x = x.clamp(0, 255) / 255
        x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
            [0.229, 0.224, 0.225]
        )[:, None, None]
        with torch.no_grad():
            expected = model.eval().forward_features(x)[:, 0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def test_refusals(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        pytest.importorskip("timm")

        def offline(*arguments: object, **options: object) -> None:
            raise OSError("no network")

        monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
        with pytest.raises(UserError, match=r"get https://.*resnet18.* and put it at .*weights"):
            feature_network("timm:resnet18", None, "")
        with pytest.raises(UserError, match="timm has no model nonsense"):
            feature_network("timm:nonsense", None, "")
        file = cache / "weights" / "resnet18.a1_in1k.safetensors"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"not weights")
        with pytest.raises(UserError, match="does not hold the weights of resnet18"):
            feature_network("timm:resnet18", None, "")
        file.unlink()


def test_any_module_can_serve() -> None:
    module = Backbone(nn.Conv2d(3, 5, 3), None, mean=[0.5] * 3, std=[0.5] * 3)
    network = FeatureNetwork("mine", module)
    assert module(IMAGES)["features"].shape == (3, 5)
    before = network.weight_hash
    assert len(before) == 16 and before == FeatureNetwork("other", module).weight_hash
    with torch.no_grad():
        module.model.bias += 1
    assert network.weight_hash != before


def test_refuses_unknown_networks() -> None:
    with pytest.raises(UserError, match="allowed are inception, dinov2, classifier and timm:NAME"):
        feature_network("clip", None, "")
    with pytest.raises(UserError, match=r"needs --data\.name"):
        feature_network("classifier", None, "")


def test_extraction_keeps_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "PART", 16)
    images = torch.randint(256, (37, 1, 4, 4), dtype=torch.uint8)
    network = FeatureNetwork("flat", Backbone(nn.Flatten(), None, [0.0], [1.0]))
    told: list[tuple[str, int, int]] = []
    parts = extract(network, image_set(images), Accelerator(), 5, lambda *now: told.append(now))
    found = torch.cat([part["features"] for part in parts])
    torch.testing.assert_close(found, images.flatten(1) / 255)
    assert told == [("test images", done, 37) for done in (16, 32, 37)]
