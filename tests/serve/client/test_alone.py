"""The wire and the client can be shipped alone, under any name."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

SERVE = Path(__file__).parents[3] / "serve"
PROGRAM = """
import sys
from shipped.client import branch, generate_request, parallel, serial
from shipped.client import command

request = generate_request("Tea or coffee?", plan=[parallel([branch("Tea:")], max_tokens=4), serial("So:")])
assert request.plan.stages[0].parallel.branches[0].prefix.text == "Tea:"
strangers = {"serve", "scheduler", "model", "attention", "bench", "jax", "numpy"}
print(sorted(strangers & sys.modules.keys()))
"""


def test_the_wire_and_the_client_need_nothing_else_of_the_project(tmp_path: Path) -> None:
    (tmp_path / "shipped").mkdir()
    for part in ("api", "client"):
        shutil.copytree(SERVE / part, tmp_path / "shipped" / part)
    command = [sys.executable, "-c", PROGRAM]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout.strip()) == (0, "[]"), ran.stderr
