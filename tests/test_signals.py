"""Which signals ask to stop, and which of them are the same wish again."""

import os
import signal

import pytest

from selfalign import signals
from selfalign.signals import StopSignals, stop_signals


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> StopSignals:
    """What a process has heard that was started by no launcher."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
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


def test_a_launcher_passes_on_what_its_processes_have_been_sent_already(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    heard = StopSignals()
    monkeypatch.delenv("LOCAL_RANK")  # as commands do that are done by the first process alone
    assert [heard.hear(signal.SIGINT) for _ in range(2)] == ["first", "again"]
    monkeypatch.setattr(signals, "PASSED_ON_SECONDS", 0)
    assert heard.hear(signal.SIGINT) == "another"


def test_a_launchers_death_is_no_second_wish(
    heard: StopSignals, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert heard.hear(signal.SIGINT) == "first"
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert [heard.hear(signal.SIGTERM) for _ in range(3)] == ["again"] * 3
