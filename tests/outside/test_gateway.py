"""OpenAI's own client and a load generator, through SMG in front of two real servers of the default model.

Their packages go into an environment of their own: SMG is the gateway, `openai` and `aiperf` are its clients.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bench.host.gateways import smg
from bench.server import Server, free_port, started
from model.find import tokenizer_folder
from tests.serve.waiting import until

pytestmark = pytest.mark.outside
PACKAGES = ("smg==1.13.0", "openai==3.57.0", "aiperf==0.13.0")
CHAT = Path(__file__).parent / "chat.py"
PATIENCE = 180.0  # seconds, for two servers and a gateway to start on busy cores


@pytest.fixture(scope="session")
def bin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gateway") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [folder / "bin/pip", "install", "--quiet", *PACKAGES]
    subprocess.run(install, check=True, timeout=900)
    return folder / "bin"


class Fleet(NamedTuple):
    """Two servers behind a gateway, which is at `url`."""

    url: str
    servers: tuple[Server, Server]
    bin_folder: Path

    def chat(self, *what: str) -> subprocess.Popen[str]:
        command = [self.bin_folder / "python", CHAT, self.url, *what]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def served(self, which: int) -> int:
        """Requests that one of the servers has ended."""
        with urllib.request.urlopen(self.servers[which].metrics_url) as page:
            text = page.read().decode()
        return sum(
            int(float(n)) for n in re.findall(r"^taper_requests_total\{.*\} (\S+)", text, re.MULTILINE)
        )


@pytest.fixture(scope="module")
def fleet(bin_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    ports, folder = (free_port(), free_port()), tmp_path_factory.mktemp("fleet")
    with contextlib.ExitStack() as running:
        log = running.enter_context((folder / "servers.log").open("w"))
        first, second = (running.enter_context(started(["--gateway-port", str(port)], log)) for port in ports)
        engines = [f"127.0.0.1:{port}" for port in ports]
        options = ("--policy", "round_robin", "--health-check-interval-secs", "1")
        gateway = running.enter_context(smg(bin_folder / "smg", engines, folder / "gateway.log", *options))
        url = f"http://127.0.0.1:{gateway}"
        until(lambda: workers(url) == 2, PATIENCE)
        yield Fleet(url, (first, second), bin_folder)


def workers(url: str) -> int:
    """Those that the gateway finds healthy."""
    with contextlib.suppress(OSError, ValueError), urllib.request.urlopen(f"{url}/workers") as answer:
        return sum(worker["is_healthy"] for worker in json.load(answer)["workers"])
    return 0


def outcome(process: subprocess.Popen[str]) -> Any:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out)


def test_openais_client_gets_what_the_gateway_passes(fleet: Fleet) -> None:
    told = outcome(fleet.chat("calls"))
    assert told["models"] == ["taper-tiny"]
    assert re.fullmatch(r"(?s)<Parallel>.*(\n<Path>.*</Path>){3}\n<Conclusion>\n.*</Parallel>", told["text"])
    assert "".join(told["pieces"]) == told["text"]
    assert len(told["pieces"]) > 20, "it comes as it grows"
    prompt, completion = told["usage"]
    assert told["streamed_usage"] == [prompt]
    assert completion < len(told["text"]), "what the server forced is not counted"
    assert (told["finish"], told["length"]) == ("stop", "length")
    assert told["choices"] == [0, 1, 2]
    assert told["stopped"].endswith("</Outline>")
    assert told["logprobs"] == [2, 2]
    assert "answers of a given form are not possible" in told["refused"]


def test_aiperf_measures_it(fleet: Fleet, tmp_path: Path) -> None:
    options = {
        "model": "taper-tiny",
        "url": fleet.url,
        "endpoint-type": "chat",
        "tokenizer": str(tokenizer_folder("default")),
        "request-count": "8",
        "concurrency": "2",
        "synthetic-input-tokens-mean": "50",
        "output-tokens-mean": "20",
        "ui-type": "none",
        "artifact-dir": str(tmp_path / "perf"),
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    command = [fleet.bin_folder / "aiperf", "profile", "--streaming", *flags]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    measured = json.loads((tmp_path / "perf/profile_export_aiperf.json").read_text())
    assert measured["request_count"]["avg"] == 8
    assert measured["time_to_first_token"]["avg"] > 0


def test_killing_a_server_loses_no_request_that_had_not_started(fleet: Fleet) -> None:
    asking = fleet.chat("many", "60")
    assert asking.stderr is not None
    next(line for line in asking.stderr if int(line) >= 10)
    assert min(fleet.served(0), fleet.served(1)) > 0, "both are asked"
    os.kill(fleet.servers[0].process, signal.SIGKILL)
    answers = outcome(asking)
    assert len(answers) == 60
    lost = [answer for answer in answers if answer["error"]]
    assert [answer for answer in lost if not answer["text"]] == []
    assert len(lost) <= 8, "of those that ran at the moment"
    assert len({answer["text"] for answer in answers if not answer["error"]}) == 1
