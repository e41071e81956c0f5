"""The index of source files: each with the first paragraph of its docstring."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

INTRODUCTION = """\
# Files

This page is for somebody who looks for the file that does something. It is made by `make pages` from the \
first lines of the files themselves. [life-of-a-request.md](life-of-a-request.md) says how they work \
together, [CONTRIBUTING.md](../CONTRIBUTING.md) which room may know which, and [glossary.md](glossary.md) \
what the words mean.
"""

ROOMS = ("scheduler", "attention", "model", "serve", "bench")
STUBS = "taper_client/v1"  # which protoc makes


def page(root: Path) -> str:
    """Raises ValueError for a file without a docstring."""
    parts = [INTRODUCTION]
    for room in ROOMS:
        for folder in sorted({path.parent for path in sources(root / room)}):
            parts.append(_folder(folder, root))
    return "\n".join(parts)


def sources(room: Path) -> Iterator[Path]:
    """Files of a room that somebody wrote and that hold something."""
    for path in sorted(room.rglob("*.py")):
        is_empty = path.name == "__init__.py" and not path.read_text().strip()
        if STUBS not in path.as_posix() and not is_empty:
            yield path


def _folder(folder: Path, root: Path) -> str:
    files = [path for path in sources(folder) if path.parent == folder]
    rows = [
        f"| [{path.name}](../{path.relative_to(root)}) | {_about(path)} |"
        for path in files
        if path.name != "__init__.py"
    ]
    about = "".join(f"\n{_about(path)}\n" for path in files if path.name == "__init__.py")
    table = "\n".join(["", "| file | what it is |", "|---|---|", *rows, ""]) if rows else ""
    return f"## {folder.relative_to(root)}/\n{about}{table}"


def _about(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    if not docstring:
        raise ValueError(f"{path} has no docstring: its first line is what the index says of it")
    return " ".join(docstring.partition("\n\n")[0].split())
