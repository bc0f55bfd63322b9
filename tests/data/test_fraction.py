"""A share of the training images."""

import torch

from selfalign.data.datasets import open_data
from selfalign.sections import DataConfig


def _images(fraction: float) -> torch.Tensor:
    train = open_data(DataConfig(train_fraction=fraction)).train
    return train.read(range(len(train)))[0].flatten(1)


def test_smaller_shares_lie_within_larger_ones() -> None:
    rows = [
        {tuple(image) for image in _images(fraction).tolist()}
        for fraction in (0.125, 0.25, 0.5, 1.0)
    ]
    assert rows[0] < rows[1] < rows[2] < rows[3]
    assert len(_images(0.125)) == round(0.125 * 1397)


def test_held_out_images_stay_and_the_fingerprint_tells() -> None:
    whole, half = open_data(DataConfig()), open_data(DataConfig(train_fraction=0.5))
    everything = range(len(whole.heldout))
    assert torch.equal(whole.heldout.read(everything)[0], half.heldout.read(everything)[0])
    assert whole.fingerprint != half.fingerprint


def test_augmentation_and_labels_follow_the_image() -> None:
    whole = open_data(DataConfig(flip=True)).train
    half = open_data(DataConfig(flip=True, train_fraction=0.5)).train
    images, labels = half.read([0, 3, 5], seeds=[1, 2, 3])
    numbers = half.chosen[[0, 3, 5]].tolist()
    expected, expected_labels = whole.read(numbers, seeds=[1, 2, 3])
    assert torch.equal(images, expected) and torch.equal(labels, expected_labels)
