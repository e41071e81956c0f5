"""The log: lines for people and for machines, which show no prompt, and which nobody has to read."""

from __future__ import annotations

import asyncio
import functools
import io
import json
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from serve.logs import STDERR, expect_prompts, log_loop, log_to_stderr, say
from serve.logs.bugs import trace, what
from serve.logs.stderr import Stderr

SECRET = "a secret " + "prompt"
log = structlog.get_logger("taper")
pytestmark = pytest.mark.usefixtures("restored_log")


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    def read() -> str:
        STDERR.drain()
        out, err = capsys.readouterr()
        assert not out
        return err

    return read


def failed(error: BaseException, message: Any = None) -> BaseException:
    """An exception that was raised, with what its raiser knew."""
    try:
        raise error
    except BaseException as caught:
        return caught


# --- lines -------------------------------------------------------------------------------------------------


def test_a_line_for_people_goes_to_standard_error(said: Callable[[], str]) -> None:
    log_to_stderr()
    log.info("a word", size=3)
    say("a table\nof two lines")
    text = said()
    assert "a word" in text
    assert "size=3" in text
    assert text.endswith("a table\nof two lines\n")


def test_a_line_for_machines_is_an_object(said: Callable[[], str]) -> None:
    log_to_stderr("json")
    expect_prompts()
    log.info("a word", size=3, names=["a", "b"], left=None)
    say("a table\nof two lines")
    log.error("a bug", exc_info=failed(KeyError(SECRET)))
    logging.getLogger("library").warning("of %d", 5)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    first, table, bug, library, warning = map(json.loads, said().splitlines())
    assert first.pop("timestamp").endswith("Z")
    assert first == {"level": "info", "event": "a word", "size": 3, "names": "['a', 'b']", "left": None}
    assert table["text"] == "a table\nof two lines"
    assert (bug["level"], bug["exception"].splitlines()[-1]) == (
        "error",
        f"KeyError: ({len(SECRET) + 2} characters)",
    )
    assert (library["logger"], library["event"]) == ("library", "of 5")
    assert "DeprecationWarning: old" in warning["event"]


@pytest.mark.parametrize("form", ["console", "json"])
def test_lines_that_matter_less_are_left_out(form: Any, said: Callable[[], str]) -> None:
    names = ("debug", "info", "warning", "error")
    for least, level in enumerate(names):
        log_to_stderr(form, level)
        for name in names:
            getattr(log, name)(f"a {name}")
            logging.getLogger("library").log(logging.getLevelNamesMapping()[name.upper()], f"of {name}")
        text = said()
        assert [name for name in names if f"a {name}" in text] == [*names[least:]]
        assert [name for name in names if f"of {name}" in text] == [*names[max(2, least) :]]


def test_why_a_server_leaves_is_said_at_every_level(said: Callable[[], str]) -> None:
    for form in ("console", "json"):
        log_to_stderr(form, "error")
        say("why", "error")
        assert "why" in said()


CHOSEN = st.text(st.characters(categories=["Cc", "Cf", "Zl", "Zp", "Lu"]), min_size=1)


@given(CHOSEN)
def test_what_a_client_chooses_neither_breaks_a_line_nor_steers_a_terminal(chosen: str) -> None:
    whole = f"a{chosen}b"
    for form in ("console", "json"):
        log_to_stderr(form)
        line = {"event": whole, "name": whole, "level": "info", "timestamp": ""}
        for process in structlog.get_config()["processors"]:
            line = process(None, "info", line)
        assert isinstance(line, str)
        assert line.replace(" ", "").isprintable(), line
        assert len(line.splitlines()) == 1


def test_no_value_is_endless(said: Callable[[], str]) -> None:
    log_to_stderr("json")
    log.info("a word", name="x" * 100_000)
    line = json.loads(said())
    assert len(line["name"]) < 2100
    assert line["name"].endswith("x... (100000 characters)")


# --- bugs --------------------------------------------------------------------------------------------------


def test_a_traceback_tells_nothing_of_what_was_asked_for(said: Callable[[], str]) -> None:
    log_to_stderr()
    expect_prompts()
    try:
        prompt = SECRET.upper()
        raise RuntimeError(prompt)
    except RuntimeError:
        log.exception("a bug")
    text = said()
    assert "RuntimeError: (15 characters)" in text
    assert "raise RuntimeError(prompt)" in text
    assert SECRET.upper() not in text


class BadError(Exception):
    def __str__(self) -> str:
        raise ValueError(SECRET)


def chained() -> BaseException:
    try:
        try:
            raise KeyError(SECRET)
        except KeyError as error:
            raise ValueError(SECRET) from error
    except ValueError as error:
        error.add_note(SECRET)
        return failed(ExceptionGroup(SECRET, [error, ExceptionGroup(SECRET, [failed(BadError())])]))


@pytest.mark.parametrize(
    "error",
    [
        KeyError(SECRET),
        UnicodeDecodeError("utf-8", SECRET.encode(), 2, 3, SECRET),
        SyntaxError(SECRET, (SECRET, 1, 1, SECRET)),
        OSError(SECRET),
        BadError(),
        SystemExit(SECRET),
        chained(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_an_exception_says_is_left_out(error: BaseException) -> None:
    expect_prompts()
    shown = trace(failed(error))
    assert type(error).__name__ in shown
    assert SECRET not in shown
    assert "secret" not in shown


@pytest.mark.parametrize("bind", [False, True])
def test_a_callback_that_fails_is_named_without_what_it_was_called_with(
    bind: bool, said: Callable[[], str]
) -> None:
    log_to_stderr()
    expect_prompts()

    def fail(prompt: str) -> None:
        raise RuntimeError(prompt)

    async def run() -> None:
        log_loop()
        loop = asyncio.get_running_loop()
        if bind:
            loop.call_soon(functools.partial(fail, SECRET))
        else:
            loop.call_soon(fail, SECRET)
        await asyncio.sleep(0)

    asyncio.run(run())
    text = said()
    assert "fail" in text.partition("Traceback")[0]
    assert SECRET not in text


def test_those_that_led_to_it_are_shown() -> None:
    expect_prompts()
    shown = trace(chained())
    parts = ("\nKeyError", "which caused:", "\nValueError", "2 of 2:", "1 of 1:", "BadError: (1 char")
    assert [shown.count(part) for part in parts] == [1] * len(parts)


def test_a_long_chain_of_exceptions_is_cut() -> None:
    error: Exception = ValueError()
    for _ in range(5000):
        error, error.__context__ = ValueError(), error
    assert trace(error).endswith("ValueError")
    assert trace(error).startswith("and more")


def test_an_exception_that_is_its_own_cause_has_an_end() -> None:
    error = ValueError()
    error.__cause__ = KeyError()
    error.__cause__.__cause__ = error
    assert trace(error).count("ValueError") == 1


def test_what_cannot_be_a_prompt_is_shown() -> None:
    class DeviceError(RuntimeError):
        __module__ = "jaxlib.any"

    assert what(failed(DeviceError("no memory"))) == f"{DeviceError.__qualname__}: no memory"
    assert what(OSError(28, "No space left", "/disk")) == "OSError: [Errno 28] No space left: '/disk'"
    with pytest.raises(RuntimeError) as caught:
        raise RuntimeError("words of the code itself")
    assert what(caught.value) == "RuntimeError: words of the code itself"
    assert what(ValueError()) == "ValueError"


def test_all_is_shown_to_whoever_asks_for_everything(said: Callable[[], str]) -> None:
    log_to_stderr("console", "debug")
    expect_prompts()
    log.error("a bug", exc_info=failed(KeyError(SECRET)))
    assert SECRET in said()


def test_all_is_shown_until_there_may_be_prompts(said: Callable[[], str]) -> None:
    log_to_stderr()
    log.error("a bug", exc_info=failed(KeyError("no such model")))
    assert "no such model" in said()


@pytest.mark.parametrize("form", ["console", "json"])
def test_what_nobody_catches_is_told_in_the_same_way(form: Any, said: Callable[[], str]) -> None:
    log_to_stderr(form)
    expect_prompts()
    sys.excepthook(KeyError, failed(KeyError(SECRET)), None)

    class Destroyed:
        def __del__(self) -> None:
            raise KeyError(SECRET)

    def run() -> None:
        Destroyed()
        raise KeyError(SECRET)

    thread = threading.Thread(target=run, name="worker")
    thread.start()
    thread.join()
    text = said()
    assert text.count("KeyError: (") == 3
    assert "worker" in text
    assert SECRET not in text


# --- standard error ----------------------------------------------------------------------------------------


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
    log, dropped = Stderr(), list[int]()
    log.on_dropped = dropped.append
    with open(reader) as read, open(writer, "w") as stream, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(sys, "stderr", stream)
        for count in range(1000):
            log.write(f"line {count} of {'x' * 1000}\n")
        log.drain(0.01)
        heard = [read.readline().split()[1] for _ in range(250)]
        assert heard == [str(count) for count in range(250)], "what was taken comes in order and whole"
        reading = pool.submit(read.read)
        log.drain(10)
        log.write("goes on\n")
        log.drain(10)
        stream.close()
        rest = reading.result()
        assert rest.endswith("goes on\n")
        assert "line 999" not in rest, "what was too much is dropped"
    assert sum(dropped) == 1000 - 250 - rest.count("line")


def test_lines_of_many_threads_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    log_to_stderr("json")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: log.info("a word", number=number), range(500)))
    STDERR.drain(10)
    assert sorted(json.loads(line)["number"] for line in stream.getvalue().splitlines()) == [*range(500)]
