"""Small images, and a small autoencoder with random weights as diffusers writes it."""

from pathlib import Path

import pytest
import torch
from small_images import random_image


@pytest.fixture
def class_folder(tmp_path: Path) -> Path:
    """Two classes of 20 images each; every file name occurs in both."""
    root = tmp_path / "images"
    for label, name in enumerate(("cats", "dogs")):
        (root / name).mkdir(parents=True)
        for i in range(20):
            random_image(100 * label + i).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an AutoencoderKL that halves each side and has 4 channels."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
    )
    folder = tmp_path_factory.mktemp("autoencoder")
    model.save_pretrained(folder)
    return folder
