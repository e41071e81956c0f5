"""Somebody who types what a page says, in a folder of their own: with other ports, and less to compile."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.server import READY, free_port
from tests.docs.blocks import ROOT, SERVES, Block, blocks
from tests.docs.ways import WAYS, Run

PATIENCE = 600.0  # seconds, for what is fetched, or compiled on busy cores
SAVED = re.compile(r"Save this as `(\S+)`")
PORTS = ("50051", "50052", "9090", "30000")


@dataclass(slots=True)
class Reader:
    """`folder` is where they are; `compiled`, where servers keep programs; `said`, what was printed last."""

    folder: Path
    compiled: str
    ports: dict[str, str] = field(default_factory=lambda: {port: str(free_port()) for port in PORTS})
    said: str = ""
    _server: subprocess.Popen[bytes] | None = None
    _gateway: subprocess.Popen[bytes] | None = None

    def follow(self, page: str) -> None:
        """Type its blocks, in their order, and run its Python; not what another test runs, or nobody can."""
        ways = iter(WAYS[page])
        for block in blocks(page):
            if block.language == "sh" and isinstance(next(ways), Run):
                self.type(block)
            elif block.language == "python":
                self.run(block)

    def type(self, block: Block) -> None:
        """All lines into one shell, but a last one that starts a server into a terminal of its own."""
        lines = [line for line in block.lines if "pip install -e" not in line]  # what runs this has it
        last = lines[-1]
        serves, leads = SERVES.search(last), "smg launch" in last
        script = "\n".join(lines[:-1] if serves or leads else lines)
        if script:
            self.said = self._ran(["bash", "-euo", "pipefail", "-c", self.translated(script)])
        if serves:
            self.serve(last)
        elif leads:
            end(self._gateway)
            options = f"--prometheus-port {free_port()}"
            self._gateway = self._in_background(f"{self.translated(last)} {options}", "gateway.log")
            self._until(self._gateway_answers, self._gateway)

    def serve(self, line: str = ".venv/bin/taper-serve") -> None:
        """In place of the server before."""
        self.end_server()
        self._server = self._in_background(self.translated(line), "server.log")
        self._until(lambda: bool(READY.search((self.folder / "server.log").read_text())), self._server)

    def run(self, block: Block) -> None:
        """Save it, if that is what the page says, or run it where its packages are."""
        code = self.translated(block.text)
        if saved := SAVED.search(block.before):
            (self.folder / saved[1]).write_text(code)
        elif "from openai" in code:
            self.said = self._ran([".venv-openai/bin/python", "-c", code])
        else:
            self.said = self._ran([sys.executable, "-c", code])

    def translated(self, text: str) -> str:
        """The same, with programs, ports and folders that are here."""
        text = text.replace(".venv/bin/", f"{Path(sys.executable).parent}/").replace("0.0.0.0", "127.0.0.1")
        for port, own in self.ports.items():
            text = re.sub(rf"\b{port}\b", own, text)
        address = f"--address 127.0.0.1:{self.ports['50051']}"
        few = "" if "--buckets" in text else "--buckets 16"
        options = f"--port {self.ports['50051']} --compilation-cache {self.compiled} {few}"
        text = re.sub(r"taper-client(?= )", f"taper-client {address}", text)
        return re.sub(r"taper-serve(?= |$)", f"taper-serve {options}", text, flags=re.MULTILINE)

    def end_server(self) -> None:
        if self._server is not None:
            self._server.send_signal(signal.SIGINT)  # Ctrl-C
            assert self._server.wait(PATIENCE) == 0
            self._server = None

    def end(self) -> None:
        end(self._server)
        end(self._gateway)

    def _ran(self, command: list[str]) -> str:
        ran = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=PATIENCE)
        assert ran.returncode == 0, f"{command}\n{ran.stdout}\n{ran.stderr}"
        return ran.stdout

    def _in_background(self, typed: str, log: str) -> subprocess.Popen[bytes]:
        with (self.folder / log).open("wb") as out:
            return subprocess.Popen(
                ["bash", "-c", f"exec {typed.strip().removesuffix('&')}"],
                cwd=self.folder,
                stdout=out,
                stderr=out,
            )

    def _until(self, ready: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
        began = time.monotonic()
        while not ready():
            logs = "\n".join(log.read_text()[-2000:] for log in self.folder.glob("*.log"))
            assert process.poll() is None, logs
            assert time.monotonic() - began < PATIENCE, logs
            time.sleep(0.2)

    def _gateway_answers(self) -> bool:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{self.ports['30000']}/v1/models") as answer,
        ):
            return answer.status == 200
        return False


def end(process: subprocess.Popen[bytes] | None) -> None:
    if process is not None and process.poll() is None:
        process.kill()
        process.wait()


@contextlib.contextmanager
def reading(folder: Path, compiled: str) -> Iterator[Reader]:
    """A reader in `folder`, which looks like a clone as far as the pages need it."""
    for name in ("examples", "docs"):
        os.symlink(ROOT / name, folder / name)
    reader = Reader(folder, compiled)
    try:
        yield reader
    finally:
        reader.end()
