"""Private members stay private: benchmarks and tests know a class by what it shows to everybody.

A name with one underscore belongs to its module and to the tests of that module alone
(`tests/<room>/test_<module>.py` for `<room>/<module>.py`). Elsewhere in `bench/` and `tests/` nothing may
read it, set it, import it, name it in a string for `setattr` and its like, or define it in a class that
inherits from the one whose member it is.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("attention", "bench", "model", "scheduler", "serve")
PUBLIC = {"_replace", "_asdict", "_fields", "_make"}  # of every NamedTuple
BY_NAME = {"setattr", "getattr", "delattr", "hasattr", "attrgetter", "patch", "object"}


def is_private(name: str) -> bool:
    return bool(re.fullmatch(r"_[A-Za-z]\w*", name)) and not name.endswith("__") and name not in PUBLIC


def defined(body: list[ast.stmt]) -> Iterator[str]:
    """Names that the statements of a class or module bind, whether or not under a condition."""
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield statement.name
        elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for target in targets:
                yield from (node.id for node in ast.walk(target) if isinstance(node, ast.Name))
        elif isinstance(statement, ast.If | ast.Try):
            yield from defined([*statement.body, *statement.orelse])


def own_members(node: ast.ClassDef) -> set[str]:
    """Private names that a class has: in its body, in its slots, or assigned to `self`."""
    names = set(defined(node.body))
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store) and is_self(inner.value):
            names.add(inner.attr)
    for statement in node.body:
        if isinstance(statement, ast.Assign) and "__slots__" in defined([statement]):
            names |= {c.value for c in ast.walk(statement.value) if isinstance(c, ast.Constant)}
    return {name for name in names if isinstance(name, str) and is_private(name)}


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def last_name(node: ast.expr) -> str:
    """`Scheduler` of `Scheduler`, `scheduler.Scheduler` and `Scheduler[int]`."""
    if isinstance(node, ast.Subscript):
        return last_name(node.value)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


@dataclass(slots=True)
class Members:
    """Every private name, the modules that it is at home in, and which classes have it."""

    homes: dict[str, set[Path]] = field(default_factory=lambda: defaultdict(set))
    classes: dict[str, dict[Path, set[str]]] = field(default_factory=lambda: defaultdict(dict))
    bases: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def read(self, module: Path, source: str) -> None:
        """Adds what a module defines."""
        tree = ast.parse(source)
        found = {name for name in defined(tree.body) if is_private(name)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                self.classes[node.name][module] = own_members(node)
                self.bases[node.name] |= {last_name(base) for base in node.bases}
                found |= own_members(node)
        for name in found:
            self.homes[name].add(module)

    def inherited(self, name: str, reader: Path) -> set[str]:
        """Private names of a class, and of those above it, that stand in modules private to others."""
        own = (members for home, members in self.classes.get(name, {}).items() if not may_enter(reader, home))
        above = (self.inherited(base, reader) for base in self.bases.get(name, ()) if base != name)
        return set[str]().union(*own, *above)

    def foreign(self, name: str, reader: Path) -> bool:
        homes = self.homes.get(name, set())
        return bool(homes) and not any(may_enter(reader, home) for home in homes)


def may_enter(reader: Path, home: Path) -> bool:
    """Whether what is private to a module is the reader's own: it is that module, or its tests."""
    name = "init" if home.stem == "__init__" else home.stem
    folder = home.parent if home.parts[0] == "tests" else "tests" / home.parent
    return reader in (home, folder / f"test_{name}.py")


def intrusions(reader: Path, source: str, members: Members) -> Iterator[tuple[int, str]]:
    """Line and text of everything in a file of `bench/` or `tests/` that is private to others."""
    tree = ast.parse(source)
    class_of: dict[ast.AST, ast.ClassDef] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            class_of |= dict.fromkeys(ast.walk(node), node)
            inherited = set[str]().union(*(members.inherited(last_name(b), reader) for b in node.bases))
            for name in sorted(own_members(node) & inherited):
                yield node.lineno, f"{node.name} defines {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and members.foreign(node.attr, reader):
            home = class_of.get(node)
            if home is None or not is_self(node.value) or node.attr not in own_members(home):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in (*ROOMS, "tests"):
            for alias in node.names:
                if members.foreign(alias.name, reader):
                    yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Call) and last_name(node.func) in BY_NAME:
            strings = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if any(members.foreign(string.rpartition(".")[2], reader) for string in strings):
                yield node.lineno, ast.unparse(node)


def test_nothing_private_is_used_outside_its_modules_own_tests() -> None:
    members = Members()
    sources = {
        path.relative_to(ROOT): path.read_text()
        for folder in (*ROOMS, "tests")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "_pb2" not in path.stem
    }
    for path, source in sources.items():
        if not path.stem.startswith(("test_", "conftest")):
            members.read(path, source)
    assert len(members.homes) > 100
    found = [
        f"{path}:{line}: {what}"
        for path, source in sources.items()
        if path.parts[0] in ("bench", "tests")
        for line, what in intrusions(path, source, members)
    ]
    assert found == []


PRODUCT = """
_limit = 3
class Pages:
    __slots__ = ("_free",)
    def _take(self): self._taken = 1
class Pool(Pages): ...
"""


def test_the_check_finds_every_way_in() -> None:
    members = Members()
    members.read(Path("scheduler/pages.py"), PRODUCT)

    def found(source: str, reader: str = "tests/scheduler/test_draft.py") -> list[str]:
        return [what for _, what in intrusions(Path(reader), source, members)]

    assert found("pool._free") == ["pool._free"]
    assert found("pool._taken = 2") == ["pool._taken"]
    assert found("pages._limit") == ["pages._limit"]
    assert found("from scheduler.pages import _limit") == ["scheduler.pages._limit"]
    assert found("class Mine(Pool):\n    def _take(self): ...") == ["Mine defines _take"]
    assert found("class Mine(Pool):\n    def go(self): self._free") == ["self._free"]
    assert found("monkeypatch.setattr(pages, '_limit', 1)") == ["monkeypatch.setattr(pages, '_limit', 1)"]
    assert found("patch('scheduler.pages._limit')") == ["patch('scheduler.pages._limit')"]
    assert found("setattr(pool, '_free', 1)", "bench/simulate/ablations.py") == ["setattr(pool, '_free', 1)"]
    # The module's own tests, a class that has the same name for something of its own, a NamedTuple.
    assert found("pool._free", "tests/scheduler/test_pages.py") == []
    assert found("class Other:\n    def go(self): self._take()\n    def _take(self): ...") == []
    assert found("sample._replace(token=1)") == []
