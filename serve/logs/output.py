"""How the log is written: which lines, and in which form. All that a process says to people goes this way."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import MutableMapping
from typing import Any, Literal

import structlog

from serve.logs.bugs import show_everything, trace
from serve.logs.stderr import STDERR

LogForm = Literal["console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

LONGEST = 2000  # characters of a value; a traceback may have more
_LONGEST_TRACE = 40_000

Line = MutableMapping[str, Any]

_form: LogForm = "console"
_level: LogLevel = "info"


def log_to_stderr(form: LogForm = "console", level: LogLevel = "info") -> None:
    """From here on, for this process: lines of structlog and of `logging`, warnings, and what is not caught.

    What exceptions say is shown until `expect_prompts` is called; at level debug, after it, too.
    """
    global _form, _level
    _form, _level = form, level
    least = logging.getLevelNamesMapping()[level.upper()]
    people = form == "console"
    stamp = structlog.processors.TimeStamper(fmt="%Y-%m-%d %H:%M:%S" if people else "iso", utc=not people)
    show_everything(True)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.dev.set_exc_info,
            stamp,
            traced,
            escaped,
            _for_people() if people else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(least),
        logger_factory=structlog.WriteLoggerFactory(STDERR),  # type: ignore[arg-type]
    )
    STDERR.on_dropped = _dropped
    logging.captureWarnings(True)
    logging.root.handlers[:] = [_Handler()]
    logging.root.setLevel(max(least, logging.WARNING))
    sys.excepthook = _uncaught
    threading.excepthook = _uncaught_in_thread
    sys.unraisablehook = _unraisable


def expect_prompts() -> None:
    """From here on, what an exception says may be a prompt."""
    show_everything(_level == "debug")


def say(text: str, level: LogLevel = "info") -> None:
    """What is for people and is no line of the log, such as a table: as it is, or one object of a level."""
    if _form == "json":
        getattr(structlog.get_logger("taper"), level)("said", text=text)
    else:
        print(text, file=STDERR)


def log_loop() -> None:
    """What goes wrong in this thread's event loop is told to the log, without what its tasks hold."""
    log = structlog.get_logger("taper")

    def handle(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        what = context["message"].partition("(")[0]  # what follows is what a callback was called with
        log.error("bug in the event loop", what=what, exc_info=context.get("exception"))

    asyncio.get_running_loop().set_exception_handler(handle)


def _for_people() -> structlog.dev.ConsoleRenderer:
    return structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())


def traced(_: Any, __: str, line: Line) -> Line:
    """Writes out the exception of a line."""
    given = line.pop("exc_info", None)
    error = sys.exc_info()[1] if given is True else given
    if isinstance(error, BaseException):
        line["exception"] = trace(error)
    return line


def escaped(_: Any, __: str, line: Line) -> Line:
    """No value breaks its line or steers a terminal, and none is endless."""
    for name, value in line.items():
        if value is None or isinstance(value, bool | int | float):
            continue
        whole = str(value)
        most = _LONGEST_TRACE if name in ("exception", "text") else LONGEST
        text = whole if len(whole) <= most else f"{whole[:most]}... ({len(whole)} characters)"
        line[name] = _many_lines(text) if name in ("exception", "text") else _printable(text)
    return line


def _many_lines(text: str) -> str:
    return "\n".join(map(_printable, text.split("\n")))


def _printable(text: str) -> str:
    """Control characters, and those that steer the direction of text or break lines, as escapes."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text
    )


class _Handler(logging.Handler):
    """Lines of `logging`, and so Python's warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
        except Exception:
            text = str(record.msg)
        log = structlog.get_logger("taper")
        error = record.exc_info[1] if record.exc_info else None
        log.log(record.levelno, text, logger=record.name, exc_info=error)


def _dropped(count: int) -> None:
    structlog.get_logger("taper").warning("lines of the log were dropped", count=count)


def _uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if isinstance(error, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    structlog.get_logger("taper").error("bug", exc_info=error.with_traceback(trace))
    STDERR.drain()  # the process ends


def _uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        thread = args.thread.name if args.thread else ""
        structlog.get_logger("taper").error("bug in a thread", thread=thread, exc_info=args.exc_value)


def _unraisable(args: sys.UnraisableHookArgs) -> None:
    structlog.get_logger("taper").error("bug in a destructor", exc_info=args.exc_value)
