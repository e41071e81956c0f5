"""Nobody has to read the log."""

from __future__ import annotations

import os
import sys

import pytest
import structlog

from serve.logs import STDERR, log_to_stderr


def test_the_log_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        log_to_stderr()
        structlog.get_logger("taper").info("a word")
    finally:
        structlog.reset_defaults()
    said = capsys.readouterr()
    assert "a word" in said.err
    assert not said.out


def test_what_nobody_reads_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = open(os.dup(writer), "w", buffering=1)  # noqa: SIM115 - it cannot be closed well
    monkeypatch.setattr(sys, "stderr", stream)
    print("a word", file=STDERR, flush=True)
    with pytest.raises(BrokenPipeError):
        stream.flush()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    stream.close()
    os.close(null)
    os.close(writer)
