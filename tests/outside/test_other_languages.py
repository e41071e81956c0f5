"""Clients that nobody here wrote, in other languages: `buf curl`, and Node with gRPC's own library."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serve.config import ServerConfig
from tests.serve.fakes import FakeEngine, listening
from tests.serve.server.test_server import answer
from tests.serve.server.test_tokens import entry

HERE = Path(__file__).parent
PROTOS = HERE.parent.parent / "serve/api/protos"
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


@pytest.fixture
def config(tmp_path: Path) -> ServerConfig:
    file = tmp_path / "tokens.toml"
    file.write_text(entry(roles='["generate", "control"]', token=TOKEN))
    return ServerConfig(port=0, tokens=str(file))


def buf_curl(address: str, method: str, message: Any, *options: str) -> subprocess.CompletedProcess[str]:
    url = f"http://{address}/{method}"
    command = [Path(sys.executable).parent / "buf", "curl", "--protocol", "grpc", "--http2-prior-knowledge"]
    return subprocess.run(
        [*command, *options, "--data", json.dumps(message), url], capture_output=True, text=True, timeout=60
    )


def test_buf_curl_calls_every_method_by_reflection_with_a_token_and_none_without(
    config: ServerConfig,
) -> None:
    token = ("--header", f"authorization: Bearer {TOKEN}", "--reflect-header", "*")
    with listening(FakeEngine(answer), config=config) as address:
        for method, message in ASKED.items():
            called = buf_curl(address, f"taper.v1.{method}", message, *token)
            assert called.returncode == 0, called.stderr
            assert "Generate" not in method or "finished" in called.stdout
        refused = buf_curl(address, "taper.v1.ControlService/GetLoad", {}, "--schema", str(PROTOS))
        assert json.loads(refused.stderr)["code"] == "unauthenticated"
        checked = buf_curl(address, "grpc.health.v1.Health/Check", {}, *token)
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
def test_node_calls_every_method_with_a_token_and_none_without(node: Path, config: ServerConfig) -> None:
    with listening(FakeEngine(answer), config=config) as address:
        answered = call_all(node, address=address, token=TOKEN)
        refused = call_all(node, address=address)
    assert {method.rpartition("/")[2] for method in ASKED} | {"Check"} == answered.keys()
    assert [name for name, value in answered.items() if "error" in value] == []
    assert answered["Generate"]["events"][-1] == "finished"
    assert answered["Detokenize"] == {"text": "go"}
    assert {value.get("error") for name, value in refused.items() if name != "Check"} == {"UNAUTHENTICATED"}
    assert answered["Check"] == refused["Check"] == {"status": 1}
