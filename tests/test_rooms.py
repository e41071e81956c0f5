"""Rooms know each other in one direction: serve -> {scheduler, model}, model -> attention, bench -> all."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("attention", "bench", "model", "scheduler", "serve")
KNOWS = {
    "scheduler": {"scheduler"},
    "attention": {"attention"},
    "model": {"model", "attention"},
    "serve": {"serve", "scheduler", "model", "attention"},
    "bench": {*ROOMS},
}
# Single modules of other rooms: how a token is drawn is described once, in the standard library alone.
KNOWS_TOO = {"model": {"scheduler.sampling"}}


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imported(source: Path) -> Iterator[str]:
    """Dotted names of everything that a module imports, wherever in it; the room alone where relative."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield source.relative_to(ROOT).parts[0] if node.level else node.module or ""


def imports(source: Path, *but: str) -> set[str]:
    """Top-level names of what a module imports, `but` for some modules."""
    return {name.partition(".")[0] for name in imported(source) if name not in but}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_knows_only_those_it_may(room: str) -> None:
    strangers = {*ROOMS, "tests"} - KNOWS[room]
    found = {
        (str(path.relative_to(ROOT)), name)
        for path in modules(room)
        for name in imports(path, *KNOWS_TOO.get(room, ()))
    }
    assert not {(path, name) for path, name in found if name in strangers}


def test_the_scheduler_is_written_in_the_standard_library_alone() -> None:
    found = {name for path in modules("scheduler") for name in imports(path)}
    assert found <= sys.stdlib_module_names | {"scheduler"}


def test_importing_the_scheduler_loads_no_third_party() -> None:
    """In a fresh interpreter that has no site-packages."""
    names = [f"scheduler.{path.stem}" for path in modules("scheduler") if path.stem != "__init__"]
    script = f"""
import importlib, sys
sys.path.insert(0, {str(ROOT)!r})
for name in {names!r}:
    importlib.import_module(name)
loaded = {{name.partition(".")[0] for name in sys.modules}} - {{"scheduler", "__main__"}}
print(*sorted(loaded - sys.stdlib_module_names))
"""
    command = [sys.executable, "-S", "-I", "-c", script]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == []
    assert len(names) > 10


def test_the_check_finds_imports() -> None:
    assert {"scheduler", "threading"} <= imports(ROOT / "serve" / "engine" / "engine.py")
