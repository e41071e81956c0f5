"""Rooms know each other in one direction: serve -> {scheduler, model}, model -> attention, bench -> all.

Inside `serve/` there are walls too: at the wire (`taper_client`, a package of its own), at the engine's door,
and round the device.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.absent import DEVICE, run_python, without

ROOT = Path(__file__).parent.parent
ROOMS = ("attention", "bench", "model", "scheduler", "serve", "taper_client")
ELSEWHERE = {"taper_client": ROOT / "serve" / "client"}  # the folder of a room that is not at the top
KNOWS = {
    "scheduler": {"scheduler"},
    "attention": {"attention"},
    "model": {"model", "attention"},
    "serve": {"serve", "scheduler", "model", "attention", "taper_client"},
    "taper_client": {"taper_client"},
    "bench": {*ROOMS},
}
# Single modules of other rooms: how a token is drawn is described once, in the standard library alone.
KNOWS_TOO = {"model": {"scheduler.sampling"}}

PARTS = {
    "text": {"text"},
    "config": {"config"},
    "door": {"door"},
    "lateness": {"lateness", "door"},
    "logs": {"logs"},
    "processes": {"processes"},
    "rate": {"rate"},
    "served": {"served", "door", "config", "text"},
    "reading": {"reading", "text", "served", "processes", "logs", "config"},
    "server": {"server", "reading", "text", "door", "served", "config", "lateness", "logs"},
    "engine": {"engine", "text", "door", "served", "config", "rate", "logs"},
    "remote": {"remote", "engine", "text", "door", "served", "config", "rate", "logs", "processes"},
}

ABSENT = {
    "serve/text": DEVICE,
    "serve/config": DEVICE,
    "serve/door.py": DEVICE,
    "serve/lateness.py": DEVICE,
    "serve/logs": (*DEVICE, "model", "scheduler"),
    "serve/processes.py": (*DEVICE, "model", "scheduler"),
    "serve/rate.py": DEVICE,
    "serve/reading": DEVICE,
    "serve/remote": DEVICE,
    "serve/served.py": DEVICE,
    "serve/server": DEVICE,
    "taper_client": (*DEVICE, "model", "scheduler", "serve"),
}


CLIENT = ("answer", "plan", "request")


def modules(part: str) -> list[Path]:
    path = ELSEWHERE.get(part, ROOT) / part
    others = [folder for name, folder in ELSEWHERE.items() if name != part]
    found = [path] if path.suffix else sorted(path.rglob("*.py"))
    return [source for source in found if not any(source.is_relative_to(folder) for folder in others)]


def dotted(source: Path) -> str:
    top = next((folder for folder in ELSEWHERE.values() if source.is_relative_to(folder)), ROOT)
    return ".".join(source.relative_to(top).with_suffix("").parts).removesuffix(".__init__")


def file_of(module: str) -> Path:
    return ELSEWHERE.get(module.partition(".")[0], ROOT) / f"{module.replace('.', '/')}.py"


def imported(source: Path) -> Iterator[str]:
    """Dotted names of everything that a module imports, wherever in it, for type checkers too."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = dotted(source.parent / "__init__.py").split(".")
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                is_module = file_of(f"{module}.{alias.name}").exists()
                yield f"{module}.{alias.name}" if is_module else module


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


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_server_knows_only_those_it_may(part: str) -> None:
    folder = ROOT / "serve" / part
    paths = modules(f"serve/{part}" if folder.is_dir() else f"serve/{part}.py")
    known = {
        (dotted(path), name.split(".")[1])
        for path in paths
        for name in imported(path)
        if name.startswith("serve.")
    }
    assert not {(path, name) for path, name in known if name not in PARTS[part]}


def test_no_module_imports_itself_through_others() -> None:
    graph = {dotted(path): set(imported(path)) for room in ROOMS for path in modules(room)}
    try:
        TopologicalSorter({name: found & graph.keys() for name, found in graph.items()}).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_no_file_imports_from_a_test() -> None:
    """What several of them need is in a module beside them that is named for what it has."""
    found = {
        (str(path.relative_to(ROOT)), name)
        for path in modules("tests")
        for name in imported(path)
        if name.startswith("tests.") and ".test_" in name
    }
    assert not found


def test_the_scheduler_is_written_in_the_standard_library_alone() -> None:
    found = {name for path in modules("scheduler") for name in imports(path)}
    assert found <= sys.stdlib_module_names | {"scheduler"}


def test_importing_the_scheduler_loads_no_third_party() -> None:
    """In a fresh interpreter that has no site-packages."""
    names = [dotted(path) for path in modules("scheduler")]
    script = f"""
import importlib, sys
sys.path.insert(0, {str(ROOT)!r})
for name in {names!r}:
    importlib.import_module(name)
loaded = {{name.partition(".")[0] for name in sys.modules}} - {{"scheduler", "__main__"}}
print(*sorted(loaded - sys.stdlib_module_names))
"""
    assert run_python(script, "-S", "-I").split() == []
    assert len(names) > 10


@pytest.mark.parametrize("part", ABSENT)
def test_a_part_of_the_server_is_imported_where_what_it_may_not_know_is_absent(part: str) -> None:
    names = [dotted(path) for path in modules(part)]
    run_python(without(ABSENT[part]) + f"for name in {names!r}: importlib.import_module(name)")


def test_the_server_runs_its_tests_where_jax_is_absent() -> None:
    """A few of them: `make test-fast` runs all so."""
    files = ["tests/serve/server/test_health.py", *(f"tests/serve/client/test_{name}.py" for name in CLIENT)]
    options = ["--without-jax", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    run_python(f"import pytest, sys; sys.exit(pytest.main({[*files, *options]!r}))")


def test_absence_is_noticed() -> None:
    with pytest.raises(AssertionError, match="kept away from this test"):
        run_python(without(("fractions",)) + "import fractions")


def test_the_check_finds_imports() -> None:
    assert {"scheduler", "threading"} <= imports(ROOT / "serve" / "engine" / "engine.py")
