"""Packages that a part must do without cannot be imported: `pytest --without-jax`, tests/test_rooms.py."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
DEVICE = ("jax", "jaxlib", "flax", "orbax", "attention")


class Absent:
    """Stands before all other finders, and knows of no module in some packages."""

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        del path, target
        if name.partition(".")[0] in self.packages:
            raise ModuleNotFoundError(f"No module named {name!r}: it is kept away from this test", name=name)


def keep_away(*packages: str) -> None:
    """From now on no module in `packages` can be imported."""
    loaded = sorted({name.partition(".")[0] for name in sys.modules} & set(packages))
    assert not loaded, f"too late: {', '.join(loaded)} are there already"
    sys.meta_path.insert(0, Absent(packages))  # type: ignore[arg-type]


def run_python(script: str, *flags: str) -> str:
    """What a script prints in an interpreter of its own."""
    command = [sys.executable, *flags, "-c", script]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def without(packages: Sequence[str]) -> str:
    """The beginning of a script that can import nothing from some packages."""
    return f"import importlib; from tests.absent import keep_away; keep_away(*{packages!r})\n"
