"""The blocks of the pages, typed and run, by somebody who has nothing but the pages."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.blocks import BLOCKS, ROOT, blocks
from tests.docs.reader import Reader, reading
from tests.model.folders import Folder

OF_THEIR_OWN = {
    "docs/client.md": "tests/serve/client/test_page.py, with certificates and tokens",
    "docs/replicas.md": "tests/serve/client/test_replicas.py, with several servers",
    "docs/life-of-a-request.md": "docs/make/request.py, which prints what comes of it",
    "docs/openai.md": "the gateway, below",
    "docs/quick-start.md": "as its page says, below",
}
WIDTHS = re.compile(r"  \d of \d branches advance\n")
DELTAS = re.compile(r"  (branch \d): (.*)\n")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, compiled: str) -> Iterator[Reader]:
    with reading(tmp_path_factory.mktemp("reader"), compiled) as reader:
        yield reader


@pytest.mark.full
def test_the_demo_runs(compiled: str) -> None:
    """As make has it: the folder that it installs into is the one that runs this. It judges itself."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": compiled}
    command = ["make", "demo", f"VENV={Path(sys.executable).parents[1]}"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.full
def test_python_of_the_pages_runs(reader: Reader) -> None:
    reader.serve()
    for page in sorted({block.page for block in BLOCKS if block.language == "python"} - OF_THEIR_OWN.keys()):
        code = "".join(block.text for block in blocks(page) if block.language == "python")
        ran = subprocess.run(
            [sys.executable, "-W", "error", "-c", reader.translated(code)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (ran.returncode, ran.stderr) == (0, ""), page
        if page == "docs/streaming.md":
            (printed,) = (block.text for block in blocks(page) if block.language == "text")
            assert told(ran.stdout) == told(printed)


def told(stream: str) -> tuple[dict[str, str], list[str]]:
    """What is in a stream whatever the server's load: the text of each branch, and what else happened."""
    texts: dict[str, str] = {}
    for branch, text in DELTAS.findall(stream):
        texts[branch] = texts.get(branch, "") + ast.literal_eval(text)
    return texts, sorted(WIDTHS.sub("", DELTAS.sub("", stream)).split("\n"))


@pytest.mark.full
def test_the_commands_of_the_client_run(reader: Reader) -> None:
    reader.serve()
    for block in blocks("docs/client.md"):
        if block.language == "sh":
            reader.type(block)
    assert '"choices": [' in reader.said


@pytest.mark.full
def test_the_commands_of_the_readme_run(reader: Reader) -> None:
    folder = reader.folder / "PATH/TO/Qwen3-0.6B"
    folder.parent.mkdir(parents=True)
    Folder.make(folder)
    reader.serve()
    reader.follow("README.md")


@pytest.mark.full
def test_the_commands_for_certificates_tokens_and_operators_run(reader: Reader) -> None:
    """In this order, as a server that others reach needs the files of the first two pages."""
    reader.follow("docs/tls.md")
    assert "taper_requests_total" in reader.said
    reader.follow("docs/tenants.md")
    reader.follow("docs/operating.md")


@pytest.mark.outside
def test_the_quick_start_can_be_followed(reader: Reader) -> None:
    reader.follow("docs/quick-start.md")
    assert 'taper_tokens_total{kind="completion"' in reader.said


@pytest.mark.outside
def test_the_page_about_openais_api_can_be_followed(reader: Reader) -> None:
    reader.follow("docs/openai.md")
    assert "</Conclusion>" in reader.said
