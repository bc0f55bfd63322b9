"""Which signals ask to stop, and which of them are the same wish again."""

import os
import signal

import pytest

from selfalign.signals import StopSignals, stop_signals


@pytest.fixture
def heard() -> StopSignals:
    """What a process has heard: nothing yet."""
    return StopSignals()


def test_a_hang_up_is_left_alone_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert stop_signals() == (signal.SIGINT, signal.SIGTERM)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert stop_signals() == (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_one_is_another_wish(heard: StopSignals, number: int) -> None:
    assert heard.hear(number) == "first"
    assert heard.first == number
    assert heard.hear(number) == "another"


def test_terminals_hang_up_several_times(heard: StopSignals) -> None:
    assert [heard.hear(signal.SIGHUP) for _ in range(3)] == ["first", "again", "again"]
    assert heard.hear(signal.SIGINT) == "another"


def test_a_launchers_death_is_no_second_wish(
    heard: StopSignals, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert heard.hear(signal.SIGINT) == "first"
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert [heard.hear(signal.SIGTERM) for _ in range(3)] == ["again"] * 3
