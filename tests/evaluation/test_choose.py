"""Which metrics are measured: derived from what each says that it needs."""

from dataclasses import replace

import pytest

from selfalign import UserError
from selfalign.evaluation.metrics import (
    HIGHER,
    Available,
    Evidence,
    Finding,
    Metric,
    aims,
    choose,
    metrics,
)

CLASSIFIER = Available(
    network="classifier",
    features=frozenset({"features", "logits"}),
    samples=1000,
    labels=(0, 9),
    classes=10,
    statistics=frozenset({"features"}),
    reference_images=1397,
    heldout_images=400,
    run=True,
    run_data=None,
    inception_splits=10,
)
INCEPTION = replace(
    CLASSIFIER,
    network="inception",
    features=frozenset({"features", "logits", "spatial"}),
    statistics=frozenset({"features", "spatial"}),
)
STATISTICS_ONLY = replace(INCEPTION, reference_images=0, heldout_images=0, run=False)


def names(available: Available, *wanted: str) -> set[str]:
    return {metric.name for metric in choose(wanted, available)[0]}


def test_all_that_inputs_and_features_allow() -> None:
    assert names(CLASSIFIER) == {
        "fd",
        "precision-recall",
        "consistency",
        "memorisation",
        "denoising",
    }
    assert names(INCEPTION) == {"fid", "sfid", "is", "kid", "precision-recall", "denoising"}
    assert names(STATISTICS_ONLY) == {"fid", "sfid", "is"}
    assert names(INCEPTION, "memorisation") == {"memorisation"}  # only when asked for
    assert choose((), CLASSIFIER)[1] == []


@pytest.mark.parametrize(
    ("change", "left_out", "note"),
    [
        ({"samples": 19}, "fd", "fd is left out: it needs at least 20 samples, here are 19"),
        ({"samples": 3}, "precision-recall", "needs more than 3 samples, here are 3"),
        ({"reference_images": 3}, "precision-recall", "at least 4 reference images, here are 3"),
        ({"samples": 1}, "memorisation", "needs at least 2 samples, here are 1"),
        ({"heldout_images": 19}, "memorisation", "at least 20 held-out images, here are 19"),
        ({"labels": (-7, 3)}, "consistency", "0 to 9: here are labels from -7 to 3"),
        ({"labels": (0, 10)}, "consistency", "0 to 9: here are labels from 0 to 10"),
        ({"run_data": "data of the model's 3 classes"}, "denoising", "the model's 3 classes"),
    ],
)
def test_what_does_not_apply_is_left_out_with_a_note_or_refused(
    change: dict[str, object], left_out: str, note: str
) -> None:
    available = replace(CLASSIFIER, **change)  # type: ignore[arg-type]
    chosen, notes = choose((), available)
    assert left_out not in {metric.name for metric in chosen}
    assert any(note in line for line in notes)
    with pytest.raises(UserError, match=f"--metrics {left_out} needs .*; possible here are"):
        choose((left_out,), available)


@pytest.mark.parametrize(
    ("change", "left_out", "note"),
    [
        ({"samples": 999}, "kid", "at least 1000 samples, here are 999"),
        ({"reference_images": 999}, "kid", "at least 1000 reference images, here are 999"),
        ({"samples": 19}, "is", "at least 20 samples with --inception-splits 10"),
        ({"inception_splits": 501}, "is", "at least 1002 samples with --inception-splits 501"),
    ],
)
def test_too_few_for_inceptions_metrics(
    change: dict[str, object], left_out: str, note: str
) -> None:
    chosen, notes = choose((), replace(INCEPTION, **change))  # type: ignore[arg-type]
    assert left_out not in {metric.name for metric in chosen}
    assert any(note in line for line in notes)


def test_another_kind_of_input_is_worth_no_note() -> None:
    """Nobody expects FID of a classifier's features, or a denoising loss of a file."""
    assert choose((), replace(CLASSIFIER, run=False, heldout_images=0, labels=None))[1] == []


def test_nothing_to_measure_is_refused() -> None:
    alone = replace(
        CLASSIFIER, samples=1, heldout_images=0, labels=None, run=False, reference_images=2
    )
    with pytest.raises(UserError, match="nothing to measure: fd is left out"):
        choose((), alone)


def test_aims_follow_from_the_metrics() -> None:
    found = aims("classifier")
    assert found["fd_classifier"].best == "lower" and found["recall"].best == "higher"
    assert found["memorised_share"].best == "0.05" and found["nearer_than_heldout"].best == "0.5"
    assert not found["inception_score"].share and found["precision"].share


def test_a_metric_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name, needs, values and computation are all there is to add."""
    from selfalign.evaluation import metrics as package

    monkeypatch.setattr(package, "_registered", dict(package._registered))

    class Brightness(Metric):
        name = "brightness"
        values = {"mean_brightness": HIGHER}  # noqa: RUF012
        needs = ()

        def measure(self, evidence: Evidence) -> Finding:
            return Finding()

    assert "brightness" in metrics()
    assert "brightness" in names(CLASSIFIER)
    assert aims("x")["mean_brightness"] == HIGHER
