"""docs/life-of-a-request.md is a map: it names every source file once, and no file that is not there."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("attention", "model", "scheduler", "serve")


def source_files() -> set[str]:
    tracked = subprocess.run(
        ["git", "ls-files", *ROOMS], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return {
        file
        for file in tracked.stdout.split()
        if file.endswith(".py")
        and not file.startswith("serve/api/protos/taper/")
        and (not file.endswith("__init__.py") or (ROOT / file).read_text().count("\n") > 1)
    }


def test_the_map_names_every_source_file_once() -> None:
    page = (ROOT / "docs/life-of-a-request.md").read_text()
    named = Counter(re.findall(rf"`((?:{'|'.join(ROOMS)})/[\w/]+\.py)`", page))
    assert set(named) == source_files()
    assert {file for file, times in named.items() if times > 1} == set()
