"""Linear probes on data whose answer is known."""

import dataclasses

import pytest
import torch
from support import small_model

from selfalign.data.source import DataSource, MemorySplit
from selfalign.errors import UserError
from selfalign.inspect.probes import linear_probe


def _source(informative: bool) -> DataSource:
    """Two classes, bright and dark, or two names for the same noise."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> MemorySplit:
        labels = torch.arange(count) % 2
        images = 0.2 * torch.randn(count, 2, 4, 6, generator=generator)
        if informative:
            images += (labels * 2.0 - 1)[:, None, None, None]
        return MemorySplit(images, labels)

    return DataSource(split(200), split(100), 2, (4, 6), ("dark", "bright"), "made here")


def test_what_features_tell_and_what_they_cannot() -> None:
    model = small_model(dtype=torch.float32).eval()
    assert linear_probe(model, _source(informative=True), "linear", block=2) > 0.95
    assert linear_probe(model, _source(informative=False), "linear", block=2) < 0.65


def test_the_same_every_time() -> None:
    model = small_model(dtype=torch.float32).eval()
    source = _source(informative=True)
    assert linear_probe(model, source, "linear", 1) == linear_probe(model, source, "linear", 1)


def test_labels_are_needed() -> None:
    unlabelled = dataclasses.replace(_source(informative=True), class_names=())
    with pytest.raises(UserError, match="two classes"):
        linear_probe(small_model(dtype=torch.float32), unlabelled, "linear", 1)
