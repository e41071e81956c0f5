"""The commands, as they are typed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest

from scheduler.program import Plan
from serve import commands
from serve.config import ServerConfig
from tests.serve.fakes import FakeEngine, fork_and_join, listening


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine(fork_and_join)


@pytest.fixture(scope="module")
def address(engine: FakeEngine) -> Iterator[str]:
    with listening(engine) as address:
        yield address


def run_client(*args: str) -> None:
    commands.client([*args])


def test_an_answer_is_printed_branch_by_branch_and_whole(address, capsys):
    run_client(
        "Drinks?", "--branch", "Tea: ", "--branch", "Coffee: ", "--conclude", " So: ", "--address", address
    )
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "[1 tea] Tea: good",
        "[3 ] , or x",
        "[4 ] , and y",
        "[joined 3, 4]",
        "[2 ] Coffee: bad",
        "[joined 1, 2]",
        "Hi. Tea: goodCoffee: bad, or x, and y So: tea.",
    ]
    assert printed.err.startswith("17 tokens, 17 on the longest path, up to 2 at once; first after 500 ms")


def test_every_option_of_the_client_arrives(engine, address):
    run_client("Drinks?", "--max-tokens", "3", "--temperature", "0.5", "--seed", "7", "--address", address)
    asked = [*engine.requests.values()][-1]
    assert bytes(asked.prompt) == b"user: Drinks?\n", "a chat, where the model knows chats"
    assert isinstance(asked.program, Plan)
    (stage,) = asked.program.stages
    assert [part.stopping.max_tokens for part in stage.parts] == [3]
    assert (asked.sampling.temperature, asked.sampling.seed) == (0.5, 7)


def test_a_prompt_can_be_sent_as_it_is(engine, address):
    run_client("Drinks?", "--raw", "--address", address)
    asked = [*engine.requests.values()][-1]
    assert asked.prompt == (257, *b"Drinks?")


def test_what_is_wrong_is_said_in_a_line(address):
    with pytest.raises(SystemExit) as caught:
        run_client("Drinks?", "--max-tokens", "0", "--address", address)
    assert str(caught.value) == "taper-client: INVALID_ARGUMENT: stopping.max_tokens: must be at least 1"


def test_branches_that_begin_alike_can_be_asked_for(address, capsys):
    run_client("Drinks?", "--branch", "A ", "--branch", "A ", "--address", address)
    assert "Hi. " in capsys.readouterr().out


def test_the_server_is_run_with_its_options_and_a_loader(monkeypatch):
    ran, loader = [], ModuleType("serve.engine.startup")
    loader.load = object()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, loader.__name__, loader)  # its own imports JAX
    monkeypatch.setattr("serve.server.server.run", lambda *told: ran.append(told))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    commands.serve(["--policy", "eager"])
    assert ran == [(ServerConfig(policy="eager"), loader.load)]
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5", "an operator's own choice stands"
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
    commands.serve([])
    assert float(os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"]) > 0.9


def test_what_keeps_the_server_from_starting_is_said_in_a_line(monkeypatch):
    def fail(config: ServerConfig, load: object) -> None:
        raise OSError("cannot listen")

    monkeypatch.setitem(sys.modules, "serve.engine.startup", SimpleNamespace(load=None))
    monkeypatch.setattr("serve.server.server.run", fail)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    with pytest.raises(SystemExit) as caught:
        commands.serve([])
    assert str(caught.value) == "taper-serve: cannot listen"


@pytest.mark.parametrize("command", [commands.serve, commands.client])
def test_commands_explain_themselves(command, capsys):
    with pytest.raises(SystemExit) as caught:
        command(["--help"])
    assert caught.value.code == 0
    assert "--" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option", [("--load-format", "telepathy"), ("--policy", "fast"), ("--page-size", "0")]
)
def test_an_option_that_cannot_work_is_refused_before_anything_is_loaded(option, capsys):
    with pytest.raises(SystemExit) as caught:
        commands.serve([*option])
    assert caught.value.code == 2
    assert option[1] in capsys.readouterr().err
