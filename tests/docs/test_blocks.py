"""Every block of every page says what it is, and every command in it is one that its program takes.

tests/docs/ways.py says by which test it is run, or why it cannot be run here.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
from pathlib import Path

import pytest

from tests.docs.blocks import BLOCKS, ROOT, SERVES, SHELL, Block
from tests.docs.typed import check
from tests.docs.ways import WAYS, By, Run

LANGUAGES = {"", "text", "sh", "python", "pycon", "toml", "yaml", "promql"}
LOOKS_TYPED = re.compile(
    r"(\.venv/bin/|taper-\w+ |python3? |make |pip |git |docker |kubectl |curl |openssl |npm )"
)


def test_a_block_says_what_it_is_and_commands_say_that_they_are() -> None:
    for block in BLOCKS:
        assert block.language in LANGUAGES, block.name
        if block.language in ("", "text"):
            typed = [line for line in block.lines if LOOKS_TYPED.match(line)]
            assert typed == [], f"{block.page}: a block that is typed begins with ```sh"


def test_every_block_of_commands_has_a_way_to_be_run_or_a_reason_why_not() -> None:
    found = {page: [block.name for block in SHELL if block.page == page] for page in {b.page for b in SHELL}}
    assert found.keys() == WAYS.keys()
    for page, names in found.items():
        assert len(names) == len(WAYS[page]), f"{names} and their ways in tests/docs/ways.py"


def test_the_other_tests_are_there() -> None:
    for way in (way for ways in WAYS.values() for way in ways if isinstance(way, By)):
        file, _, function = way.test.partition("::")
        assert f"\ndef {function}(" in (ROOT / file).read_text(), way.test


def test_shells_read_all_of_it(tmp_path: Path) -> None:
    script = tmp_path / "all.sh"
    script.write_text("\n".join(block.text for block in SHELL))
    checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize("page", WAYS)
def test_programs_take_what_they_are_given(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for block in SHELL:
        for command in block.commands if block.page == page else ():
            check(command)


@pytest.mark.parametrize(
    "line",
    [
        "taper-serve --prot 1",
        "taper-client",
        "make dinner",
        "python -m bench.load.serve --num-promts 3",
        "python -m bench.nothing",
        "pip install -e .[gpus]",
        "taper-convert hf FOLDER",
        "taper-sing",
    ],
)
def test_what_a_program_does_not_take_is_found(line: str) -> None:
    (command,) = Block("page", "sh", line, "").commands
    with pytest.raises(
        (AssertionError, SystemExit, TypeError, ModuleNotFoundError, subprocess.CalledProcessError)
    ):
        check(command)


def test_whoever_copies_a_block_has_a_server_before_asking_it() -> None:
    """It takes seconds to start, and a terminal of its own: what starts one is the last line of its block."""
    for block in SHELL:
        ways = WAYS[block.page]
        way = ways[[other for other in SHELL if other.page == block.page].index(block)]
        if isinstance(way, Run):
            assert [line for line in block.lines[:-1] if SERVES.search(line)] == [], block.name


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS if block.language == "python"}))
def test_python_compiles_and_what_it_imports_exists(page: str) -> None:
    for block in BLOCKS:
        if block.page != page or block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and node.module not in (None, "openai"):
                module = importlib.import_module(node.module)
                assert [each.name for each in node.names if not hasattr(module, each.name)] == [], block.name
