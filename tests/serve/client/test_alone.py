"""The client is shipped alone: it needs nothing of the server's, and little else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from types import FunctionType

import pytest

import taper_client
from tests.serve.fakes import FakeEngine, listening
from tests.serve.server.own_loop import answer

PROJECT = Path(__file__).parents[3] / "serve" / "client"
MB = 1_000_000
WHERE = "import sysconfig; print(sysconfig.get_path('purelib'))"
WITHOUT_A_SERVER = """
import sys
from taper_client import AsyncClient, Client, Completion, branch, generate_request, parallel, serial

request = generate_request("Tea or coffee?", plan=[parallel([branch("Tea:")], max_tokens=4), serial("So:")])
assert request.plan.stages[0].parallel.branches[0].prefix.text == "Tea:"
strangers = {"serve", "scheduler", "model", "attention", "bench", "jax", "numpy", "rich", "tyro", "structlog"}
print(sorted(strangers & sys.modules.keys()))
"""
WITH_A_SERVER = """
import json, sys
import taper_client
from taper_client import Client, UnavailableError

with Client(sys.argv[1]) as client:
    answer = client.complete("go")
try:
    Client("127.0.0.1:1").complete("go")
    code = ""
except UnavailableError as error:
    code = error.code.name
print(json.dumps({"tokens": answer.usage.completion_tokens, "at": taper_client.__file__, "code": code}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    ran = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_the_client_needs_nothing_else_of_the_project(tmp_path: Path) -> None:
    shutil.copytree(PROJECT / "taper_client", tmp_path / "taper_client")
    assert run(sys.executable, "-c", WITHOUT_A_SERVER, cwd=tmp_path).strip() == "[]"


def test_every_public_name_can_be_imported_and_says_what_it_is() -> None:
    for name in taper_client.__all__:
        assert name in dir(taper_client)
        found = getattr(taper_client, name)
        assert not isinstance(found, type | FunctionType) or found.__doc__, name
        for method, value in vars(found).items() if isinstance(found, type) else ():
            assert method[0] == "_" or not isinstance(value, FunctionType) or value.__doc__, (name, method)
    with pytest.raises(AttributeError, match="nothing"):
        _ = taper_client.nothing


@pytest.mark.outside
def test_its_wheel_in_an_empty_environment_talks_to_a_server(tmp_path: Path) -> None:
    project = shutil.copytree(PROJECT, tmp_path / "project")  # a build leaves folders there
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, project, cwd=tmp_path)
    [wheel] = tmp_path.glob("taper_client-*.whl")
    venv.create(tmp_path / "empty", with_pip=False)
    python = tmp_path / "empty" / "bin" / "python"
    site = Path(run(python, "-c", WHERE, cwd=tmp_path).strip())
    run(sys.executable, "-m", "pip", "install", "-q", "--no-compile", "--target", site, wheel, cwd=tmp_path)
    assert {found.name for found in site.iterdir() if not found.name.endswith(".dist-info")} == {
        "google",
        "grpc",
        "taper_client",
        "typing_extensions.py",
        "bin",
    }
    assert sum(file.stat().st_size for file in site.rglob("*")) < 30 * MB
    assert (site / "taper_client" / "py.typed").exists()
    with listening(FakeEngine(answer)) as address:
        told = json.loads(run(python, "-I", "-c", WITH_A_SERVER, address, cwd=tmp_path))
    assert (told["tokens"], told["code"]) == (2, "UNAVAILABLE")
    assert Path(told["at"]).is_relative_to(site)
    ran = subprocess.run(
        [python, "-I", "-m", "taper_client", "go"], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, "pip install rich tyro" in ran.stderr) == (1, True)
