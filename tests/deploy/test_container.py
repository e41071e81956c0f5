"""The container's files, as far as they can be checked without a container engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from serve.config.command_line import configured
from tests.deploy.dockerfile import instructions, the
from tests.deploy.live import ROOT

LOCK = (ROOT / "requirements.lock").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHON = "3.12"


def locked() -> dict[str, tuple[str, list[str]]]:
    """The version and the hashes of each package."""
    entries = re.split(r"\n(?=[a-z])", LOCK)[1:]
    found = {}
    for entry in entries:
        name, version = re.match(r"([a-z\d.-]+)==([\w.]+) \\\n", entry).groups()  # type: ignore[union-attr]
        found[name] = (version, re.findall(r"--hash=sha256:([\da-f]{64})\b", entry))
    return found


# --- the lock ----------------------------------------------------------------------------------------------


def test_each_package_is_locked_with_hashes_whichever_index_has_it() -> None:
    packages = locked()
    assert len(packages) > 50
    assert [name for name, (_, hashes) in packages.items() if not hashes] == []
    options = re.findall(r"^\s*(--?[a-z-]+)", LOCK, flags=re.MULTILINE)
    assert set(options) == {"--hash"}
    assert not re.search(r"https?:|@ ", LOCK)


def test_the_lock_has_what_the_project_needs_in_versions_that_it_takes() -> None:
    packages, project = locked(), PROJECT["project"]
    optional = project["optional-dependencies"]
    wanted = [*project["dependencies"], *optional["gpu"], *optional["gateway"]]
    wanted += PROJECT["build-system"]["requires"]  # as the image builds without an index
    for each in map(Requirement, wanted):
        if each.marker is None or each.marker.evaluate({"python_version": PYTHON}):
            assert Version(packages[each.name][0]) in each.specifier, f"{each}: run make lock"


# --- the image ---------------------------------------------------------------------------------------------


def test_the_image_is_python_alone_in_the_version_that_the_lock_is_for() -> None:
    assert the("FROM") == f"python:{PYTHON}-slim"
    assert f"--python-version {PYTHON} " in (ROOT / "Makefile").read_text()
    installs = [rest for word, rest in instructions() if word == "RUN" and "pip install" in rest]
    assert [("--no-deps" in each, "http" in each) for each in installs] == [(True, False)] * 2
    assert "--require-hashes" in installs[0]
    assert "--no-build-isolation" in installs[1], "which would ask an index for setuptools, without a hash"


def test_the_server_is_not_root_and_keeps_programs_in_a_volume_of_its_own() -> None:
    words = [word for word, _ in instructions()]
    assert words.index("USER") < words.index("ENTRYPOINT")
    uid, _, gid = the("USER").partition(":")
    assert uid == gid == "10001"
    assert "RUN" not in words[words.index("USER") :], "nothing is installed for the user to change"
    volume = configured([]).compilation_cache
    assert volume is not None
    assert the("VOLUME") == volume.replace("~", the("WORKDIR"))
    (made,) = (rest for word, rest in instructions() if "useradd" in rest)
    assert f"--uid {uid} " in made
    assert made.endswith(f" {the('VOLUME')}"), "it belongs to the user"


def test_it_drains_when_it_is_stopped_and_says_whether_it_serves() -> None:
    assert the("STOPSIGNAL") == "SIGTERM"
    scripts = PROJECT["project"]["scripts"]
    (entry, *options), probe = json.loads(the("ENTRYPOINT")), the("HEALTHCHECK").partition("CMD ")[2]
    assert json.loads(probe)[0] in scripts
    assert entry in scripts
    assert f"deploy/server.toml {options[1]}" in [rest for word, rest in instructions() if word == "COPY"]


def test_its_options_are_options() -> None:
    config = configured(["--config", str(ROOT / "deploy/server.toml")])
    assert {config.host, config.metrics_host} == {"0.0.0.0"}
    assert the("EXPOSE").split() == [str(config.port), str(config.metrics_port)]


def context() -> list[str]:
    """The files that `docker build` sees: of those that are tracked, what .dockerignore lets through."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = [line[1:] for line in lines if line.startswith("!")]
    assert lines[1] == "*"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    return [file for file in files if any(file == each or fnmatch(file, f"{each}/*") for each in kept)]


def test_what_it_is_made_of_is_there_and_nothing_else() -> None:
    files = context()
    copied = [rest.split()[0] for word, rest in instructions() if word == "COPY"]
    assert copied[1:2] == ["."]
    assert {"requirements.lock", "deploy/server.toml", "pyproject.toml", "README.md", "LICENSE"} <= set(files)
    found = PROJECT["tool"]["setuptools"]["packages"]["find"]
    rooms = {each.rstrip("*") for each in found["include"]} - {"taper_client"}
    assert (ROOT / found["where"][1] / "taper_client").is_relative_to(ROOT / "serve"), "which is copied"
    assert {file.partition("/")[0] for file in files if "/" in file} == rooms | {"deploy"}


@pytest.mark.outside
def test_what_the_image_installs_serves_says_so_and_drains(tmp_path: Path) -> None:
    """Its steps in a virtual environment: all of the lock but CUDA, then the project, then a server."""
    python = shutil.which(f"python{PYTHON}") or (
        sys.executable if sys.version.startswith(f"{PYTHON}.") else None
    )
    if python is None or subprocess.run([python, "-V"], capture_output=True).returncode:
        pytest.skip(f"there is no Python {PYTHON}")
    source, cpu, bin_folder = tmp_path / "taper", tmp_path / "cpu.lock", tmp_path / "venv/bin"
    for file in context():
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, source / file)
    entries = re.split(r"\n(?=[a-z])", LOCK)
    cpu.write_text("\n".join(each for each in entries if not re.match(r"nvidia-|jax-cuda", each)) + "\n")
    subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True)
    pip = [bin_folder / "pip", "install", "--quiet", "--no-deps"]
    locked = ["--only-binary", ":all:", "--require-hashes", "--requirement", cpu]
    subprocess.run([*pip, *locked], check=True)
    subprocess.run([*pip, "--no-build-isolation", source], check=True)

    home = tmp_path / "home"
    home.mkdir()
    here = [
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--metrics-host",
        "127.0.0.1",
        "--metrics-port",
        "0",
        "--buckets",
        "8",
    ]
    entry, *_ = json.loads(the("ENTRYPOINT"))
    with subprocess.Popen(
        [bin_folder / entry, "--config", source / "deploy/server.toml", *here],
        stdout=subprocess.PIPE,
        text=True,
        cwd=home,
        env={"HOME": str(home), "PATH": os.environ["PATH"]},
    ) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split()[-1]
            subprocess.run([bin_folder / "taper-health", "--address", address], check=True, cwd=home)
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
        finally:
            server.kill()
    assert [*(home / ".cache/taper").iterdir()], "where the volume is"
