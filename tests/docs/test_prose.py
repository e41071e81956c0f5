"""Options and targets that a page names between two blocks are there, too."""

from __future__ import annotations

import re
import subprocess
from dataclasses import fields

import pytest

from bench.demo import Demo
from model.decode_command import Decode
from serve.config import ServerConfig
from taper_client.command import Ask
from tests.docs.blocks import ROOT, pages

FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")
OPTION = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]*)")
PLUGINS = ("tests/conftest.py", "tests/cpu_seconds.py")  # what pytest takes here
# Of programs of others, in the words of a page about them.
OTHERS = {
    "health-check-interval-secs": "smg",
    "prefix": "npm",
    "python": "uv",
}


def in_sentences(page: str) -> list[str]:
    """What stands in code between the words of a page."""
    return CODE.findall(FENCED.sub("", (ROOT / page).read_text()))


def options() -> set[str]:
    """Of our programs: what their parsers are told, and the fields that are flags."""
    listed = subprocess.run(["git", "ls-files", "*.py", "Makefile"], cwd=ROOT, capture_output=True, text=True)
    files = [file for file in listed.stdout.split() if not file.startswith("tests/") or file in PLUGINS]
    sources = "\n".join((ROOT / file).read_text() for file in files)
    names = [each.name for program in (ServerConfig, Ask, Decode, Demo) for each in fields(program)]
    names += re.findall(
        r"^    (\w+): ", (ROOT / "model/tiny/train.py").read_text(), re.MULTILINE
    )  # needs JAX
    flags = {name.replace("_", "-") for name in names}
    literal = set(re.findall(r"[\"'`]--([a-z][a-z0-9-]*)", sources))
    return flags | {f"no-{flag}" for flag in flags} | literal | OTHERS.keys()


@pytest.fixture(scope="module")
def known() -> set[str]:
    return options()


@pytest.mark.parametrize("page", pages())
def test_an_option_in_a_sentence_is_one_that_there_is(page: str, known: set[str]) -> None:
    named = {option for code in in_sentences(page) for option in OPTION.findall(code)}
    assert named - known == set()


def test_a_target_of_make_in_a_sentence_is_one_that_there_is() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    named = {
        target
        for page in pages()
        for code in in_sentences(page)
        for target in re.findall(r"^make ([a-z][a-z-]*)", code)
    }
    assert named
    assert named - targets == set()
