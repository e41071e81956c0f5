"""Whether a program takes the words of a command, without running it."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import tomllib
from collections.abc import Callable
from typing import Any

import pytest
import tyro

from bench.command import Command, split
from serve.config.command_line import configured
from serve.health_command import parser as health_parser
from taper_client.command import Ask
from tests.docs.blocks import ROOT

GATEWAY = (ROOT / "tests/outside/test_gateway.py").read_text()
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
OTHERS = {
    "cd",
    "curl",
    "cut",
    "docker",
    "export",
    "git",
    "grep",
    "kubectl",
    "openssl",
    "printf",
    "smg",
    "tee",
    "tr",
}
"""Programs of others, whose words are not looked at."""


class Parsed(BaseException):
    """Raised in place of what a benchmark would go on to do."""


def check(command: list[str]) -> None:
    """Raises AssertionError, or what the program raises, for words that it does not take."""
    program = command[0].removeprefix(".venv/bin/").removeprefix(".venv-openai/bin/")
    assert program in KNOWN or program in OTHERS, f"{program} is not known: tests/docs/typed.py"
    if program in KNOWN:
        KNOWN[program](command[1:])


def _make(words: list[str]) -> None:
    subprocess.run(["make", "--dry-run", *words], cwd=ROOT, check=True, capture_output=True)


def _python(words: list[str]) -> None:
    match words:
        case ["-m", "venv", _]:
            pass
        case ["-m", module, *rest]:
            _benchmark(module, rest)
        case ["-c", code]:
            compile(code, "-c", "exec")
        case [file, *_]:
            page = (ROOT / "docs/quick-start.md").read_text()
            assert (ROOT / file).exists() or f"Save this as `{file}`" in page, file


def _benchmark(module: str, words: list[str]) -> None:
    found = importlib.util.find_spec(module)
    assert found is not None, module
    main = importlib.import_module(f"{module}.__main__" if found.submodule_search_locations else module).main
    parse = Command.parse_args

    def only(parser: Command, arguments: Any = None, namespace: Any = None) -> Any:
        raise Parsed(parse(parser, arguments, namespace))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Command, "parse_args", only)
        with pytest.raises(Parsed):
            main(words)
    if "--" in words:
        configured(split(words)[1])


def _pip(words: list[str]) -> None:
    assert words[0] == "install"
    for word in words[1:]:
        extra = re.fullmatch(r"\.\[(\w+)\]", word)
        assert not extra or extra[1] in EXTRAS, word
        assert "==" not in word or f'"{word}"' in GATEWAY, f"{word}: another version than is tested"


def _convert(words: list[str]) -> None:
    convert = importlib.import_module("model.convert")
    inspect.signature(getattr(convert, words[0])).bind(*words[1:])


KNOWN: dict[str, Callable[[list[str]], object]] = {
    "make": _make,
    "pip": _pip,
    "python": _python,
    "python3": _python,
    "taper-client": lambda words: tyro.cli(Ask, args=words, config=(tyro.conf.FlagCreatePairsOff,)),
    "taper-convert": _convert,
    "taper-health": lambda words: health_parser().parse_args(words),
    "taper-serve": configured,
}
