"""Nobody has to read the log."""

from __future__ import annotations

import os
import sys

import pytest
import structlog

from serve.logs import STDERR, Stderr, log_to_stderr


def test_the_log_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        log_to_stderr()
        structlog.get_logger("taper").info("a word")
        STDERR.drain()
    finally:
        structlog.reset_defaults()
    said = capsys.readouterr()
    assert "a word" in said.err
    assert not said.out


def test_a_traceback_tells_nothing_of_what_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        log_to_stderr()
        try:
            prompt = "a " + "secret"
            raise RuntimeError(len(prompt))
        except RuntimeError:
            structlog.get_logger("taper").exception("a bug")
        STDERR.drain()
    finally:
        structlog.reset_defaults()
    said = capsys.readouterr().err
    assert "RuntimeError: 8" in said
    assert "a secret" not in said


def test_what_nobody_reads_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = open(os.dup(writer), "w", buffering=1)  # noqa: SIM115 - it cannot be closed well
    monkeypatch.setattr(sys, "stderr", stream)
    print("a word", file=STDERR, flush=True)
    STDERR.drain()
    stream.close()
    print("another", file=STDERR, flush=True)
    STDERR.drain()
    os.close(writer)


def test_nobody_waits_for_a_log_that_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    monkeypatch.setattr(Stderr, "MOST_WAITING", 300_000)
    log = Stderr()
    with open(reader) as read, open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        for count in range(1000):
            print(f"line {count} of {'x' * 1000}", file=log)
        log.drain(0.01)
        heard = [read.readline().split()[1] for _ in range(250)]
        assert heard == [str(count) for count in range(250)], "what was taken comes in order and whole"
        log.drain(10)
        print("goes on", file=log)
        log.drain(10)
        os.set_blocking(reader, False)
        rest = read.read()
        assert rest.endswith("goes on\n")
        assert "line 999" not in rest, "what was too much is dropped"
