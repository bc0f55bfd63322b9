"""The data set's classifier: trained once, whoever asks for it, and kept."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from selfalign.data.datasets import open_data
from selfalign.evaluation import classifier
from selfalign.evaluation.classifier import get_classifier
from selfalign.sections import DataConfig

SOURCE = open_data(DataConfig())
ASKED_AT_ONCE = 4


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One number for every training, which ends when all who ask have begun to."""
    seeds: list[int] = []
    wanted = threading.Barrier(ASKED_AT_ONCE)
    monkeypatch.setattr(classifier, "_train", lambda model, split, seed: seeds.append(seed))
    read = classifier._read_kept
    first = threading.local()

    def when_all_ask(file: Path, model: classifier.Classifier) -> float | None:
        found = read(file, model)
        if not hasattr(first, "over"):
            first.over = True
            wanted.wait(30)
        return found

    monkeypatch.setattr(classifier, "_read_kept", when_all_ask)
    return seeds


def ask_at_once() -> list[dict[str, object]]:
    """What several who ask at once are given."""
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        asked = [pool.submit(get_classifier, SOURCE, "digits") for _ in range(ASKED_AT_ONCE)]
        return [one.result().module.state_dict() for one in asked]


def test_of_several_who_ask_at_once_one_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[int]
) -> None:
    monkeypatch.setenv("SELFALIGN_CACHE", str(tmp_path))
    states = ask_at_once()
    assert trained == [0]
    assert all(state.keys() == states[0].keys() for state in states)
    assert [path.suffix for path in (tmp_path / "classifiers").iterdir()] == [".safetensors"]


@pytest.mark.filterwarnings("ignore:the classifier is not kept")
def test_without_a_cache_each_trains_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[int]
) -> None:
    (tmp_path / "file").write_text("where a folder should be")
    monkeypatch.setenv("SELFALIGN_CACHE", str(tmp_path / "file"))
    ask_at_once()
    assert trained == [0] * ASKED_AT_ONCE
