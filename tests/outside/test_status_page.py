"""The status page in a browser, headless Chromium, while a real server answers branching questions.

With `--pictures docs` it also takes the picture of the docs.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.server import started
from taper_client import Client, model_driven

pytestmark = pytest.mark.outside
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip
WORDS = ("cat", "lemon", "tree", "stone", "river", "mouse", "apple", "bread")
READERS = 5


@contextmanager
def questions(address: str) -> Iterator[None]:
    """A few readers that ask one question after the other."""
    over = threading.Event()

    def ask(reader: int) -> None:
        with Client(address) as client:
            for turn in range(10_000):
                count = (1, 2, 3, 5, 6)[(reader + turn) % 5]
                words = [WORDS[(reader + turn + n) % len(WORDS)] for n in range(count)]
                question = f"Reverse each word: {', '.join(words)}. Then say which result is longest."
                for _ in client.generate([{"role": "user", "content": question}], plan=model_driven()):
                    if over.is_set():
                        return

    readers = [threading.Thread(target=ask, args=(reader,)) for reader in range(READERS)]
    for reader in readers:
        reader.start()
    try:
        yield
    finally:
        over.set()
        for reader in readers:
            reader.join()


def browse(url: str, folder: Path, *options: str) -> str:
    profile = f"--user-data-dir={folder / 'profile'}"
    command = ["chromium", *QUIET, profile, "--timeout=6000", *options, url]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return ran.stdout


def test_it_shows_branches_that_advance_and_requests_with_their_branches(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if shutil.which("chromium") is None:
        pytest.skip("there is no chromium (Debian's package)")
    with (tmp_path / "log").open("w") as log, started([], log) as server, questions(server.address):
        url = server.metrics_url.removesuffix("metrics")
        page = browse(url, tmp_path, "--dump-dom")
        picture = tmp_path / "status.png"
        browse(url, tmp_path, "--window-size=1120,1060", f"--screenshot={picture}")
    assert ">serving<" in page
    assert "taper-tiny on cpu, policy taper" in page
    assert len(re.findall(r"<rect", page)) > 20, "a bar for each step"
    assert len(re.findall(r"<path", page)) == 4
    assert re.search(r"\d+ of \d+</b><span>branches advance", page)
    rows = re.findall(r"<tr>(.+?)</tr>", page)[1:]
    assert 0 < len(rows) <= READERS
    assert any("<i" in row for row in rows)
    assert picture.stat().st_size > 50_000
    if pictures := request.config.getoption("--pictures"):
        shutil.copy(picture, Path(pictures) / "status.png")
