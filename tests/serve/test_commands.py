"""`taper-serve`, as it is typed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

from serve import commands
from serve.config import GROUPS, ServerConfig
from serve.config.command_line import EXAMPLES, configured
from serve.server.server import EngineFailedError
from tests.absent import DEVICE, run_python, without


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
    assert told.index("--config") < places[0], "what stands for many options comes first"
    assert told.index("listening options") < told.index("--port") < told.index("scheduling options")
    assert told.endswith(EXAMPLES + "\n")


@pytest.mark.parametrize("asked", ["--help", "--version"])
def test_nobody_need_read_what_was_asked_for(asked):
    script = f"from serve import commands; commands.serve([{asked!r}])"
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (1, b"")


def test_help_is_not_broken_where_the_source_is(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        commands.serve(["--help"])
    told = capsys.readouterr().out
    for text in (
        "they can reach it: a third of the time",
        "unless set. float64",
        "if --control-port gives them",
    ):
        assert text in told


@pytest.mark.parametrize("line", re.findall("^    taper-serve(.*)", EXAMPLES, re.MULTILINE))
def test_the_examples_are_taken(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("server.toml").write_text("max-queue = 64")
    assert (configured(line.split()) == ServerConfig()) == (line == "")


def test_versions_and_help_are_told_without_jax():
    for asked, wanted in (
        ("--version", rf"taper {version('taper')} \(jax {version('jax')}, Python 3"),
        ("-h", "usage"),
    ):
        script = f"from serve import commands; commands.serve([{asked!r}, '--config', 'missing'])"
        ran = run_python(without(DEVICE) + script)
        assert re.match(wanted, ran)


@pytest.mark.parametrize("arguments", ["--load-format telepathy", "--port x", "--prot 1", "--port", "x"])
def test_what_is_no_option_is_refused_before_anything_is_loaded(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        commands.serve(arguments.split())
    assert caught.value.code == 2
    assert arguments.split()[-1] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "content", "line"),
    [
        ("--port 70000", None, "--port must be from 0 to 65535, not 70000"),
        ("--min-tpot-slo-ms 0", None, "--min-tpot-slo-ms must be more than 0, not 0.0"),
        ("--policy fast", None, "--policy: unknown policy 'fast': choose .*"),
        ("--config FILE", "port = 70000", "FILE: --port must be from 0 to 65535, not 70000"),
        ("--config FILE", "rho = nan", "FILE: --rho must be a share between 0 and 1, not nan"),
        ("--config FILE", "policy = 'fast'", "FILE: --policy: unknown policy 'fast': choose .*"),
        ("--config FILE --port 70000", "port = 5", "--port must be from 0 to 65535, not 70000"),
        ("--config FILE --port 5", "port = 70000\nrho = 2", "FILE: --rho must be a share .*"),
        ("--config FILE --port 5", "port = 'a'", 'FILE: --port must be a whole number, not "a"'),
        ("--config FILE", "prot = 1", 'FILE: unknown option "prot" [(]is it port[?][)]'),
        ("--config FILE", "prot", "--config: FILE is not TOML: .*"),
        ("--config FILE", None, "--config: cannot read FILE: No such file or directory"),
    ],
)
def test_what_cannot_work_is_told_in_a_line_with_flag_and_file(arguments, content, line, tmp_path, capsys):
    file = str(tmp_path / "server.toml")
    if content is not None:
        Path(file).write_text(content)
    with pytest.raises(SystemExit) as caught:
        commands.serve(arguments.replace("FILE", file).split())
    assert caught.value.code == 2
    assert re.fullmatch(f"taper-serve: {line.replace('FILE', re.escape(file))}\n", capsys.readouterr().err)
