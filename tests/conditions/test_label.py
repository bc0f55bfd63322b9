"""Class labels as a condition: how they are embedded, dropped and left out."""

import pytest
import torch
from support import resolved

from selfalign import build_student, parts
from selfalign.conditions.label import Label
from selfalign.embedders import LabelEmbedder


def test_is_known_by_name():
    assert "label" in parts.names("condition")
    assert resolved("sit").condition == Label()


def test_the_embedder_has_a_vector_per_class_and_one_for_none():
    embedder = Label().embedder(5, 24)
    assert isinstance(embedder, LabelEmbedder)
    assert embedder.embedding_table.weight.shape == (6, 24)
    labels = torch.tensor([0, 5, 2])
    assert torch.equal(embedder(labels), embedder.embedding_table.weight[labels])


def test_no_classes_make_no_embedder():
    assert Label().embedder(0, 24) is None
    assert build_student(resolved("sit", {"model.num_classes": 0})).y_embedder is None


def test_none_is_the_label_after_the_last():
    null = Label().null(torch.tensor([3, 0]), 5)
    assert null.tolist() == [5, 5] and null.dtype == torch.int64


@pytest.mark.parametrize("dropped", [[False] * 3, [True] * 3, [True, False, True]])
def test_dropping_replaces_the_chosen_samples(dropped):
    labels = torch.tensor([3, 0, 4])
    seen = Label().drop(labels, torch.tensor(dropped), 5)
    expected = [5 if drop else label for drop, label in zip(dropped, [3, 0, 4], strict=True)]
    assert seen.tolist() == expected
    assert labels.tolist() == [3, 0, 4]
