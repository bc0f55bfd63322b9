"""What is said of a data set."""

from selfalign.data.summary import Summary


def test_a_set_without_classes_has_none_without_images() -> None:
    found = Summary((12,), (2,), (), {})
    assert found.untrained == ()
    assert found.lines() == ["images: 12 to train on, 2 held out, no classes"]


def test_classes_without_training_images_are_named() -> None:
    found = Summary((3, 0), (1, 1), ("cat", "dog"), {})
    assert found.untrained == ("dog",)
    assert "dog" in found.lines()[1]
