"""Autoencoders other than Stable Diffusion's: other strides, channels, normalisations and ranges."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import on_cpus

from selfalign import UserError
from selfalign.cli import main
from selfalign.data.datasets import open_data
from selfalign.data.latents.autoencoder import encode_moments, load_autoencoder
from selfalign.data.latents.prepare import prepare
from selfalign.data.latents.settings import PrepareConfig
from selfalign.data.latents.store import read_manifest
from selfalign.sections import DataConfig

diffusers = pytest.importorskip("diffusers")
SIDE = 16


def deep_compression() -> Any:
    """Stride 4, 8 channels, no posterior."""
    return diffusers.AutoencoderDC(
        latent_channels=8,
        attention_head_dim=2,
        encoder_block_out_channels=(4, 8, 16),
        decoder_block_out_channels=(4, 8, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        scaling_factor=0.41,
    )


def representation() -> Any:
    """A DINOv2 of one head (64 wide) and patches of 4; latents normalised within, images from 0 to 1."""
    return diffusers.AutoencoderRAE(
        encoder_hidden_size=64,
        encoder_patch_size=4,
        encoder_num_hidden_layers=1,
        decoder_hidden_size=8,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
        patch_size=4,
        encoder_input_size=SIDE,
        latents_mean=[[[0.1]]] * 64,
        latents_std=[[[2.0]]] * 64,
    )


def per_channel() -> Any:
    """An AutoencoderKL of 3 channels with a mean and a deviation for each."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=4,
        latent_channels=3,
        scaling_factor=0.5,
        latents_mean=(0.1, 0.2, 0.3),
        latents_std=(1.0, 2.0, 4.0),
    )


KINDS = {
    "AutoencoderDC": (deep_compression, (8, 4, 4)),
    "AutoencoderRAE": (representation, (64, 4, 4)),
    "AutoencoderKL": (per_channel, (3, 8, 8)),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    torch.manual_seed(0)
    made = KINDS[request.param][0]()
    made.save_pretrained(tmp_path / "autoencoder")
    return request.param, tmp_path / "autoencoder"


def settings(autoencoder: Path, **more: Any) -> PrepareConfig:
    return PrepareConfig(SIDE, str(autoencoder), "float32", **more)


@on_cpus
@pytest.mark.parametrize("normalise", ["config", "measured"])
def test_round_trip(
    kind: tuple[str, Path], class_folder: Path, tmp_path: Path, normalise: str
) -> None:
    """What the model sees is decoded to what the autoencoder itself makes of its latents."""
    name, folder = kind
    out = tmp_path / "out"
    prepare(str(class_folder), out, settings(folder, normalise=normalise))
    source = open_data(DataConfig(name="latents", root=str(out)))
    assert (source.channels, *source.image_size) == KINDS[name][1]
    latents, _ = source.train.read(range(2))
    own = load_autoencoder(str(folder))
    assert type(own).__name__ == name
    pictures = open_data(DataConfig(name="folder", root=str(class_folder), image_size=SIDE))
    manifest = read_manifest(out)
    scale, shift = (torch.tensor(v).reshape(-1, 1, 1) for v in (manifest.scale, manifest.shift))
    raw = (latents - shift) / scale
    with torch.inference_mode():
        expected = own.decode(raw).sample
    expected = 2 * expected - 1 if name == "AutoencoderRAE" else expected
    torch.testing.assert_close(source.decode(latents), expected.clamp(-1, 1))
    images = torch.cat([pictures.train.read(range(len(pictures.train)))[0],
                        pictures.heldout.read(range(len(pictures.heldout)))[0]])  # fmt: skip
    encoded = encode_moments(own, ((images + 1) * 127.5).round().to(torch.uint8)).chunk(2, dim=1)[0]
    nearest = (encoded[None] - raw[:, None]).abs().amax(dim=(2, 3, 4)).min(dim=1).values
    assert nearest.max() < 1e-4  # they are latents of the folder's own images
    if normalise == "measured":
        count = len(source.train)
        seen = torch.cat(
            [source.train.read(range(count), range(k, k + count))[0] for k in range(0, 9000, 100)]
        )
        torch.testing.assert_close(
            seen.mean(dim=(0, 2, 3)), torch.zeros(source.channels), atol=0.1, rtol=0
        )
        torch.testing.assert_close(
            seen.std(dim=(0, 2, 3)), torch.ones(source.channels), atol=0.1, rtol=0
        )
    elif name == "AutoencoderKL":
        assert manifest.scale == (0.5, 0.25, 0.125)
        np.testing.assert_allclose(manifest.shift, (-0.05, -0.05, -0.0375))
    else:
        assert manifest.scale == (0.41 if name == "AutoencoderDC" else 1.0)


def test_a_run_on_such_latents_is_sampled_and_exported(class_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    deep_compression().save_pretrained(tmp_path / "dc")
    out, run = tmp_path / "latents", tmp_path / "run"
    words = ["--vae", str(tmp_path / "dc"), "--image-size", str(SIDE), "--normalise", "measured"]
    assert main(["prepare", str(class_folder), str(out), *words]) == 0
    words = ["--data.name", "latents", "--data.root", str(out), "--model.size", "tiny/2"]
    words += ["--training.steps", "1", "--training.batch-size", "4", "--training.trackers"]
    assert main(["train", "sit", "--out", str(run), *words]) == 0
    words = ["--num", "2", "--steps", "2"]
    assert main(["sample", str(run), "--out", str(tmp_path / "s"), *words]) == 0
    assert np.load(tmp_path / "s" / "samples.npz")["arr_0"].shape == (2, SIDE, SIDE, 3)
    assert main(["export", str(run), str(tmp_path / "e"), "--format", "diffusers"]) == 0
    index = (tmp_path / "e" / "model_index.json").read_text()
    assert "AutoencoderDC" in index and index.count("latent_s") == 2
    assert (tmp_path / "e" / "vae" / "config.json").is_file()


def test_what_is_no_autoencoder_of_images_is_refused(tmp_path: Path, class_folder: Path) -> None:
    diffusers.UNet2DModel(
        block_out_channels=(4,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=2,
        layers_per_block=1,
    ).save_pretrained(tmp_path / "unet")
    with pytest.raises(UserError, match="it is a UNet2DModel: allowed are autoencoders"):
        load_autoencoder(str(tmp_path / "unet"))
    torch.manual_seed(0)
    deep_compression().save_pretrained(tmp_path / "dc")
    config = PrepareConfig(18, str(tmp_path / "dc"))
    with pytest.raises(UserError, match="image_size is 18 .* multiples of 4"):
        prepare(str(class_folder), tmp_path / "out", config)
    with pytest.raises(UserError, match="there is no autoencoder 'nowhere'"):
        load_autoencoder("nowhere")
