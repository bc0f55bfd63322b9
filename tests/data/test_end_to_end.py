"""Real images → autoencoder → shards → train → sample → images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_images import FASHION_MNIST

from selfalign import recipe, resolve
from selfalign.cli import main
from selfalign.data.datasets import open_data
from selfalign.data.files import read_mnist
from selfalign.data.shapes import to_uint8
from selfalign.sampling.generate import generate
from selfalign.sampling.settings import SamplingConfig
from selfalign.sections import DataConfig
from selfalign.training.accelerator import make_accelerator
from selfalign.training.loop import begin, train


@pytest.fixture
def clothes(tmp_path: Path) -> Path:
    """30 images of each class of Fashion-MNIST, in colours of their own."""
    if not FASHION_MNIST.is_dir():
        pytest.skip("needs the Debian package dataset-fashion-mnist")
    images, labels, *_ = read_mnist(FASHION_MNIST, "fashion-mnist")
    colours = torch.rand(len(images), 3, 1, 1, generator=torch.Generator().manual_seed(0))
    for label in range(10):
        folder = tmp_path / "clothes" / f"class {label}"
        folder.mkdir(parents=True)
        for index in torch.nonzero(labels == label)[:30, 0].tolist():
            pixels = (images[index] * colours[index]).to(torch.uint8).permute(1, 2, 0)
            Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    return tmp_path / "clothes"


def test_from_images_to_images(clothes: Path, tmp_path: Path, autoencoder: Path) -> None:
    out = tmp_path / "latents"
    words = [str(clothes), str(out), "--image-size", "16", "--vae", str(autoencoder)]
    assert main(["prepare", *words]) == 0
    assert main(["prepare", "--verify", str(out)]) == 0
    source = open_data(DataConfig(name="latents", root=str(out), workers=1))
    config = resolve(
        recipe(
            "sra-dts-as",
            {
                "model.size": "tiny/2",
                "training.steps": 60,
                "training.batch_size": 16,
                "training.learning_rate": 2e-3,
                "training.ema_decay": 0.9,
                "training.trackers": (),
                "data.name": "latents",
                "data.root": str(out),
                "data.workers": 1,
            },
        ),
        source.channels,
        source.image_size,
        source.num_classes,
    )
    losses: list[float] = []
    run = tmp_path / "run"
    run.mkdir()
    state = train(
        begin(config, source, run, make_accelerator(config.training, run)),
        progress=lambda state, values: losses.append(values["denoising_loss"]),
    )
    assert state.step == 60 and np.isfinite(losses).all() and losses[-1] < losses[0]
    (batch,) = generate(
        state.ema.model.eval(), "linear", SamplingConfig(steps=5), 4, batch_size=4, labels=[0, 9]
    )
    images = to_uint8(source.decode(batch.images))
    assert images.shape == (4, 3, 16, 16) and images.float().std() > 1
