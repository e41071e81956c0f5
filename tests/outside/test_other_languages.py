"""Clients that nobody here wrote, in other languages: `buf curl`, and Node with gRPC's own library."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from serve.server.tls import Certificates
from taper_client.certificates import Paths
from tests.serve.authorities import Authority
from tests.serve.fakes import FakeEngine, listening
from tests.serve.server.own_loop import answer
from tests.serve.server.token_files import entry

HERE = Path(__file__).parent
PROTOS = HERE.parent.parent / "serve/client/protos"
TOKEN = "a-token-that-may-do-everything"
ASKED = {
    "InferenceService/Generate": {"prompt": {"text": "go"}},
    "InferenceService/Tokenize": {"prompt": {"text": "go"}},
    "InferenceService/Detokenize": {"token_ids": [103, 111]},
    "ControlService/GetModelInfo": {},
    "ControlService/GetServerInfo": {},
    "ControlService/GetLoad": {},
    "ControlService/Abort": {"request_ids": ["unknown"]},
    "ControlService/SetPolicy": {"policy": "eager"},
}


class Secured(NamedTuple):
    """A server that asks for client certificates and tokens, and what a client of it needs."""

    address: str
    own: Paths


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[Secured]:
    tokens, authority = tmp_path / "tokens.toml", Authority(tmp_path)
    tokens.write_text(entry(roles='["generate", "control"]', token=TOKEN))
    certificates = Certificates(authority.issue())
    with listening(FakeEngine(answer), tokens=str(tokens), certificates=certificates) as address:
        yield Secured(address, authority.issue("client"))


def buf_curl(server: Secured, method: str, message: Any, *options: str) -> subprocess.CompletedProcess[str]:
    cert, key, authorities = map(str, server.own)
    with_certificate = ("--cacert", authorities, "--cert", cert, "--key", key)
    command = [Path(sys.executable).parent / "buf", "curl", "--protocol", "grpc", *with_certificate]
    return subprocess.run(
        [*command, *options, "--data", json.dumps(message), f"https://{server.address}/{method}"],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_buf_curl_calls_every_method_with_a_certificate_and_a_token(secured: Secured) -> None:
    """It finds them by reflection."""
    token = ("--header", f"authorization: Bearer {TOKEN}", "--reflect-header", "*")
    for method, message in ASKED.items():
        called = buf_curl(secured, f"taper.v1.{method}", message, *token)
        assert called.returncode == 0, called.stderr
        assert "Generate" not in method or "finished" in called.stdout
    refused = buf_curl(secured, "taper.v1.ControlService/GetLoad", {}, "--schema", str(PROTOS))
    assert json.loads(refused.stderr)["code"] == "unauthenticated"
    checked = buf_curl(secured, "grpc.health.v1.Health/Check", {}, *token)
    assert json.loads(checked.stdout) == {"status": "SERVING"}


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script and what it needs."""
    folder = tmp_path_factory.mktemp("node")
    for name in ("package.json", "methods.mjs"):
        shutil.copy(HERE / name, folder)
    subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", "--silent"], cwd=folder, check=True, timeout=300
    )
    return folder


def call_all(folder: Path, **where: str) -> dict[str, Any]:
    options = json.dumps({"protos": str(PROTOS), **where})
    ran = subprocess.run(
        ["node", "methods.mjs", options], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.outside
def test_node_calls_every_method_with_a_certificate_and_a_token(node: Path, secured: Secured) -> None:
    cert, key, authorities = map(str, secured.own)
    certified = {"address": secured.address, "cert": cert, "key": key, "ca": authorities}
    answered, refused = call_all(node, **certified, token=TOKEN), call_all(node, **certified)
    unknown = call_all(node, address=secured.address, ca=authorities)
    assert {method.rpartition("/")[2] for method in ASKED} | {"Check"} == answered.keys()
    assert [name for name, value in answered.items() if "error" in value] == []
    assert answered["Generate"]["events"][-1] == "finished"
    assert answered["Detokenize"] == {"text": "go"}
    assert {value.get("error") for name, value in refused.items() if name != "Check"} == {"UNAUTHENTICATED"}
    assert answered["Check"] == refused["Check"] == {"status": 1}
    assert {value.get("error") for value in unknown.values()} == {"UNAVAILABLE"}, "not even health"
