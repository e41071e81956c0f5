"""`taper-serve`, as it is typed."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from dataclasses import fields
from types import ModuleType

import pytest

from serve import commands
from serve.config import GROUPS, ServerConfig
from serve.server.server import EngineFailedError


@pytest.fixture(autouse=True)
def loaders(monkeypatch) -> tuple[object, object]:
    """What loads an engine in a process of its own, and in this one: neither is started."""
    remote, inside = object(), ModuleType("serve.engine.startup")
    inside.load = object()  # type: ignore[attr-defined]
    monkeypatch.setattr("serve.remote.spawn.spawned", lambda: nullcontext(remote))
    monkeypatch.setitem(sys.modules, inside.__name__, inside)  # its own imports JAX
    return remote, inside.load


def test_the_server_is_run_with_its_options_and_a_loader(monkeypatch, loaders):
    ran, (remote, inside) = [], loaders
    monkeypatch.setattr("serve.server.server.run", lambda *told: ran.append(told))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    commands.serve(["--policy", "eager"])
    commands.serve(["--engine-in-process"])
    assert ran == [
        (ServerConfig(policy="eager"), remote),
        (ServerConfig(engine_in_process=True), inside),
    ]
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5", "an operator's own choice stands"
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
    commands.serve([])
    assert float(os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"]) > 0.9


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError("cannot listen"), "taper-serve: cannot listen"),
        (EngineFailedError("the engine failed"), "taper-serve: the engine failed"),
        (MemoryError("3 TiB"), "taper-serve: not enough memory: 3 TiB"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating"),
            "taper-serve: not enough memory: RESOURCE_EXHAUSTED: Out of memory allocating",
        ),
    ],
)
def test_what_keeps_the_server_from_starting_is_said_in_a_line(error, line, monkeypatch, capsys):
    def fail(config: ServerConfig, load: object) -> None:
        raise error

    monkeypatch.setattr("serve.server.server.run", fail)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    with pytest.raises(SystemExit) as caught:
        commands.serve([])
    assert caught.value.code == 1
    assert capsys.readouterr().err == line + "\n"


def test_a_fault_of_the_servers_own_keeps_its_traceback(monkeypatch):
    def fail(config: ServerConfig, load: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("serve.server.server.run", fail)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    with pytest.raises(RuntimeError, match="a bug"):
        commands.serve([])


def test_the_command_explains_itself(capsys):
    with pytest.raises(SystemExit) as caught:
        commands.serve(["--help"])
    assert caught.value.code == 0
    told = capsys.readouterr().out
    places = [told.index(f"{group} options") for group in GROUPS if fields(GROUPS[group])]
    assert places == sorted(places)
    assert told.index("listening options") < told.index("--port") < told.index("scheduling options")


@pytest.mark.parametrize(
    "option", [("--load-format", "telepathy"), ("--policy", "fast"), ("--page-size", "0")]
)
def test_an_option_that_cannot_work_is_refused_before_anything_is_loaded(option, capsys):
    with pytest.raises(SystemExit) as caught:
        commands.serve([*option])
    assert caught.value.code == 2
    assert option[1] in capsys.readouterr().err


def test_a_value_that_cannot_work_is_told_in_a_line(capsys):
    with pytest.raises(SystemExit) as caught:
        commands.serve(["--port", "70000"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "taper-serve: --port must be from 0 to 65535, not 70000\n"
