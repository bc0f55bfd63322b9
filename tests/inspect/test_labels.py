"""Label reliance of a model that knows its classes exactly."""

import torch
from known import Analytic, class_means, class_source

from selfalign.inspect.labels import Relabelled, label_reliance
from selfalign.randomness import make_generator
from selfalign.tokens import TokenGrid
from selfalign.training.heldout import summarise

MEANS = torch.randn(5, 16, generator=make_generator(0, "means"), dtype=torch.float64)
DEVIATION = 0.3


def test_the_truth_helps_and_other_labels_harm():
    source = class_source(MEANS, DEVIATION, 100)
    model = Analytic(TokenGrid((4, 4), 1), 5, class_means(MEANS, DEVIATION))
    told, permuted = (
        summarise(label_reliance(model, source.heldout, "linear", 1000, shuffled))
        for shuffled in (False, True)
    )
    assert told.overall > 4 * told.standard_error > 0
    assert permuted.overall < -2 * permuted.standard_error < 0
    assert told.by_timestep[-1] > told.by_timestep[0], "at high noise a label is worth more"


def test_a_model_without_use_for_labels():
    source = class_source(MEANS, DEVIATION, 50)
    model = Analytic(TokenGrid((4, 4), 1), 5, lambda tokens, t, labels, groups: 0 * tokens)
    assert not label_reliance(model, source.heldout, "linear", pairs=100).errors.any()


def test_only_labels_change():
    split = class_source(MEANS, DEVIATION, 10).heldout
    other = Relabelled(split, split.labels.flip(0))
    images, labels = other.read([0, 3])
    assert torch.equal(images, split.read([0, 3])[0]) and len(other) == 10
    assert labels.tolist() == split.labels.flip(0)[[0, 3]].tolist()
    assert not other.reads_in_threads
