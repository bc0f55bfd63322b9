"""What comes from the hub: its cache without network, and a hub that is out of reach ends at once."""

import time
from types import SimpleNamespace

import pytest

pytest.importorskip("huggingface_hub")
from selfalign.hub import from_hub, use_cache_if_out_of_reach


@pytest.fixture
def out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


def test_the_cache_needs_no_network(out_of_reach: None) -> None:
    asked = []

    def fetch(local: bool) -> str:
        asked.append(local)
        return "weights"

    assert from_hub(fetch) == "weights"
    assert asked == [True]


def test_a_hub_that_is_out_of_reach_is_asked_once(out_of_reach: None) -> None:
    asked = []

    def fetch(local: bool) -> None:
        asked.append(local)
        raise FileNotFoundError("not in the cache")

    begun = time.perf_counter()
    with pytest.raises(Exception, match="refused"):
        from_hub(fetch)
    assert time.perf_counter() - begun < 5
    assert asked == [True]


def test_what_cannot_be_told_to_use_its_cache_has_its_network_switched_off(
    out_of_reach: None,
) -> None:
    reader = SimpleNamespace(HF_HUB_OFFLINE=False)
    use_cache_if_out_of_reach(reader)
    assert reader.HF_HUB_OFFLINE
