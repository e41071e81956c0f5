"""`taper-client`, as it is typed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from scheduler.events import StageFinished, Started, TokenEmitted
from scheduler.program import ParallelStage, Plan, TagProgram
from scheduler.request import Request
from scheduler.step import Sample
from scheduler.stopping import FinishReason
from taper_client.command import main
from tests.serve.client.options import SAMPLING
from tests.serve.fakes import FakeEngine, begin, finished, fork_and_join, listening

BEGIN = 257  # a special token of the fakes' tokenizer
HIDDEN, SHOWN = "\x1b[?25l", "\x1b[?25h"
ANSWER = "Hi. Tea: goodCoffee: bad, or x, and y So: tea."


@pytest.fixture
def run(address: str, capsys: pytest.CaptureFixture[str]):
    """Runs the command, and returns what it wrote to stdout; nothing may come to stderr."""

    def run(*args: str) -> str:
        main([*args, "--address", address])
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out

    return run


def last(engine: FakeEngine) -> Request:
    return [*engine.requests.values()][-1]


# --- what is asked -----------------------------------------------------------------------------------------


def test_every_option_arrives(run, engine):
    flags = {name: str(value) for name, value in SAMPLING.items() if name != "logit_bias"}
    args = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", value)]
    run("Drinks?", *args, "--logit-bias", "5", "2", "--max-tokens", "3", "--stop", "a", "--stop", "b\n")
    asked = last(engine)
    assert bytes(asked.prompt) == b"user: Drinks?\n", "a chat, where the model knows chats"
    assert isinstance(asked.program, Plan)
    (part,) = asked.program.stages[0].parts
    assert (part.stopping.max_tokens, part.stopping.stop_strings) == (3, ("a", "b\n"))
    got = {name: getattr(asked.sampling, name) for name in SAMPLING}
    assert got == {**SAMPLING, "logit_bias": ((5, 2.0),)}


def test_what_is_not_asked_for_is_the_servers_choice(run, engine):
    run("Drinks?")
    (part,) = last(engine).program.stages[0].parts
    assert part.stopping.stop_strings == ()
    assert last(engine).sampling.temperature == 0


def test_branches_are_a_plan_whose_stages_have_the_options(run, engine):
    run("Drinks?", "--branch", "Tea: ", "--branch", "Coffee: ", "--conclude", "So: ", "--max-tokens", "3")
    fork, conclusion = last(engine).program.stages
    assert isinstance(fork, ParallelStage)
    assert [(bytes(spec.prefix), spec.label) for spec in fork.branches] == [
        (b"Tea: ", "Tea:"),
        (b"Coffee: ", "Coffee:"),
    ]
    assert [part.stopping.max_tokens for part in (*fork.parts, *conclusion.parts)] == [3, 3, 3]


def test_branches_that_begin_alike_can_be_asked_for(run, engine):
    run("Drinks?", "--branch", "A ", "--branch", "A ")
    assert [spec.label for spec in last(engine).program.stages[0].branches] == ["", ""]


def test_several_answers_can_be_asked_for(run, engine):
    run("Drinks?", "--n", "3", "--temperature", "1")
    (fork,) = last(engine).program.stages
    assert (len(fork.branches), fork.join) == (3, "none")


def test_a_model_that_forks_by_itself_does_unless_something_else_is_asked_for():
    engine = FakeEngine(fork_and_join)
    with listening(engine, own_grammar="multiverse") as address:
        own = ("--branch-max-tokens", "5")
        for flags in (own, ("--branch", "a"), ("--n", "2", "--temperature", "1"), ("--raw",)):
            main(["Drinks?", "--max-tokens", "9", *flags, "--address", address])
        with pytest.raises(SystemExit, match="model that branches by itself"):
            main(["Drinks?", "--raw", *own, "--address", address])
    program, *others = (asked.program for asked in engine.requests.values())
    assert isinstance(program, TagProgram)
    assert (program.stopping.max_tokens, program.branch_max_tokens) == (9, 5)
    assert [type(other) for other in others] == [Plan] * 3


def test_a_prompt_can_be_sent_as_it_is(run, engine):
    run("Drinks?", "--raw")
    assert last(engine).prompt == (257, *b"Drinks?")


# --- what is printed ---------------------------------------------------------------------------------------


def test_special_tokens_are_shown_where_they_are_asked_for(capsys):
    def answer(engine: FakeEngine, request: Request) -> None:
        name = request.id
        special = TokenEmitted(name, 0, Sample(BEGIN), 1)
        ended = StageFinished(name, 0, 0, FinishReason.MAX_TOKENS, None, 1, True)
        engine.tell(name, Started(name, 3, 2), begin(name, 0), special, ended, finished(name))

    printed = []
    with listening(FakeEngine(answer)) as address:
        for flags in ((), ("--keep-special-tokens",)):
            main(["go", *flags, "--address", address])
            printed.append(capsys.readouterr().out)
    assert printed == ["\n", "<begin>\n"]


def test_where_there_is_no_terminal_the_answer_is_printed_alone(run):
    assert run("Drinks?") == ANSWER + "\n"


def test_json_is_one_object(run):
    told = json.loads(run("Drinks?", "--json"))
    assert told["text"] == ANSWER
    assert told["usage"]["completion_tokens"] == 17


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_branches_and_what_they_took(address, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    main(["Drinks?", "--address", address])
    assert "17 tokens, 17 on the longest path" in screen.getvalue()
    assert "branch 2" in screen.getvalue()
    screen.truncate(0)
    main(["Drinks?", "--json", "--address", address])
    assert json.loads(screen.getvalue().lstrip("\0"))["text"] == ANSWER


# --- what goes wrong ---------------------------------------------------------------------------------------

WRONG = [
    (("--max-tokens", "0"), "max_tokens is 0: at least 1 is needed"),
    (("--temperature", "101"), "INVALID_ARGUMENT: sampling.temperature: 0 to 100 are possible, got 101"),
    (("--temperature", "nan"), "temperature is nan: a finite number is needed"),
    (("--timeout", "0"), "timeout is 0.0: more than 0 seconds are needed; None waits as long as it takes"),
    (("--stop", ""), "stop[0] is '': at least one character is needed; leave it out"),
    (("--n", "2"), "n is 2: greedy answers are all the same; give a temperature, such as 1.0"),
    (("--n", "2", "--temperature", "1", "--branch", "a"), "n is 2: a plan lays out one answer"),
    (("--conclude", "So:"), "--conclude goes on after branches: give one --branch at least"),
]


@pytest.mark.parametrize(("flags", "said"), WRONG, ids=[" ".join(flags) for flags, _ in WRONG])
def test_what_is_wrong_is_said_in_a_line(flags, said, address, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["Drinks?", *flags, "--address", address])
    assert str(caught.value).startswith(f"taper-client: {said}")
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_an_address_that_leads_nowhere_is_said_in_a_line():
    with pytest.raises(SystemExit) as caught:
        main(["Drinks?", "--address", "localhost"])
    assert str(caught.value).startswith("taper-client: address is 'localhost': host:port is needed")
    with pytest.raises(SystemExit) as caught:
        main(["Drinks?", "--address", "127.0.0.1:1"])
    assert str(caught.value).startswith("taper-client: UNAVAILABLE: ")


@pytest.mark.parametrize("flags", [("--what",), ("--top-k", "few"), ("--temperature",)], ids=" ".join)
def test_a_flag_that_is_wrong_has_an_exit_code_of_its_own(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["Drinks?", *flags])
    printed = capsys.readouterr()
    assert (caught.value.code, printed.out) == (2, "")
    assert flags[0] in printed.err


def test_the_command_says_its_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == "taper-client 0.1.0\n"


def test_the_command_explains_itself(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    flags = {*re.findall(r"--([\w-]+)", shown)}
    assert {name.replace("_", "-") for name in (*SAMPLING, "stop", "n", "timeout", "json")} <= flags
    assert "Same seed, same answer" in shown


# --- as a process ------------------------------------------------------------------------------------------


PROGRAM = "from taper_client.__main__ import main; main()"
# What an interrupt that is raised inside of gRPC can do: it becomes nobody's, and the channel never closes.
STUCK = f"""
import contextlib, threading
from taper_client import Client
generate = Client.generate
def swallowing(*args, **options):
    while True:
        with contextlib.suppress(BaseException):
            yield from generate(*args, **options)
            return
Client.generate = swallowing
Client.close = lambda client: threading.Event().wait()
{PROGRAM}
"""


def begin_or_answer(engine: FakeEngine, request: Request) -> None:
    """Only a prompt that asks for it is answered."""
    if b"answer" in bytes(request.prompt):
        fork_and_join(engine, request)
    else:
        engine.tell(request.id, Started(request.id, 3, 2), begin(request.id, 0))


def begun(prompt: bytes) -> Callable[[FakeEngine], bool]:
    """Whether an engine has got a request with a prompt."""
    return lambda engine: any(prompt in bytes(each.prompt) for each in engine.requests.values())


# Whoever runs the tests in the background may have them, and what they start, ignore interrupts.
HEARS_INTERRUPTS = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"


class Processes:
    """`taper-client`s as processes of their own: with the block they end, and their pipes are closed."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._running = contextlib.ExitStack()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def start(
        self, *args: str, stdout: int = subprocess.PIPE, program: str = PROGRAM
    ) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HEARS_INTERRUPTS + program, *args, "--address", self._address]
        env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        process = subprocess.Popen(
            command, stdout=stdout, stderr=subprocess.PIPE, text=True, env={**env, "TERM": "xterm"}
        )
        self._running.enter_context(process)
        self._running.callback(process.kill)
        return process


def test_exit_codes_of_a_process():
    """They run at the same time: each imports for a second."""
    reading, writing = os.pipe()
    os.close(reading)
    engine = FakeEngine(begin_or_answer)
    with listening(engine) as address, Processes(address) as processes:
        start = processes.start
        good, late = start("answer"), start("wait", "--timeout", "2")
        broken = start("answer", stdout=writing)
        waiting = start("wait for long", program=STUCK)
        os.close(writing)
        engine.wait_for(begun(b"long"), timeout=60)
        waiting.send_signal(signal.SIGINT)
        ends = [(*each.communicate(timeout=60), each.returncode) for each in (good, waiting, broken)]
        assert ends == [(ANSWER + "\n", "", 0), ("", "", 130), (None, "", 1)]
        out, error = late.communicate(timeout=60)
        assert (late.returncode, out, error.count("\n")) == (1, "", 1)
        assert error.startswith("taper-client: DEADLINE_EXCEEDED: ")
        engine.wait_for(lambda e: len(e.cancelled) >= 2)


def read_all(terminal: int) -> str:
    """What comes until nobody has the other end any more."""
    read = b""
    with contextlib.suppress(OSError):
        while more := os.read(terminal, 4096):
            read += more
    return read.decode()


def test_an_interrupt_gives_a_terminal_its_cursor_back():
    terminal, theirs = pty.openpty()
    engine = FakeEngine(begin_or_answer)
    with listening(engine) as address, Processes(address) as processes:
        waiting = processes.start("wait for long", stdout=theirs)
        os.close(theirs)
        engine.wait_for(begun(b"long"), timeout=60)
        shown = os.read(terminal, 4096).decode()
        while HIDDEN not in shown:
            shown += os.read(terminal, 4096).decode()
        waiting.send_signal(signal.SIGINT)
        left = read_all(terminal)
        assert (waiting.communicate(timeout=60)[1], waiting.returncode) == ("", 130)
    os.close(terminal)
    assert SHOWN in left


def test_a_process_that_was_started_so_that_interrupts_are_ignored_ignores_them():
    engine = FakeEngine(begin_or_answer)
    with listening(engine) as address, Processes(address) as processes:
        ignoring = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{PROGRAM}"
        waiting = processes.start("wait for long", program=ignoring)
        engine.wait_for(begun(b"long"), timeout=60)
        waiting.send_signal(signal.SIGINT)
        (asked,) = engine.requests.values()
        fork_and_join(engine, asked)
        assert (*waiting.communicate(timeout=60), waiting.returncode) == (ANSWER + "\n", "", 0)


def test_who_calls_the_command_gets_interrupts_back(run):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run("Drinks?")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
