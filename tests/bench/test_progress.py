"""A long run says how far it has come, and stays out of standard output."""

from __future__ import annotations

import io

import pytest

from bench import progress


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in a list of one."""
    now = [0.0]
    monkeypatch.setattr(progress, "clock", lambda: now[0])
    return now


def test_without_a_terminal_a_line_is_printed_now_and_then(
    now: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    for index in progress.tracked(range(4), "simulations", 4):
        now[0] = 6.0 * (index + 1)
    assert capsys.readouterr() == ("", "simulations: 3 of 4, 4 s left\n")


def test_on_a_terminal_a_bar_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    assert [*progress.tracked(["a", "b"], "simulations", 2)] == ["a", "b"]
    shown = terminal.getvalue()
    assert "simulations" in shown
    assert "2/2" in shown


def test_what_is_timed_says_for_how_long_it_has_gone_on(
    now: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.001)
    said = ""
    with progress.waiting("serving requests"):
        now[0] = 12.0
        while "12 s" not in said:
            said += capsys.readouterr().err
    assert "serving requests: 12 s\n" in said
