"""The log goes to standard error, and nothing fails because nobody reads that any more."""

from __future__ import annotations

import contextlib
import io
import sys

import structlog


class Stderr(io.TextIOBase):
    """Standard error. What it does not take, as its reader is gone, is dropped."""

    def write(self, text: str, /) -> int:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()


STDERR = Stderr()


def log_to_stderr() -> None:
    """From here on, for this process."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(STDERR))  # type: ignore[arg-type]
