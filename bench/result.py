"""The head of a result file, for benchmarks that need no device, and how results are written."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serve.client.client import AsyncClient

PACKAGES = ("grpcio", "protobuf", "numpy")


def head(command: str) -> dict[str, Any]:
    """`command`, when it ran, and what the client ran on."""
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {
        "command": command,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "client": {"host": platform.machine(), "python": sys.version.split()[0], **versions},
    }


async def describe_server(client: AsyncClient) -> dict[str, Any]:
    """What a server says of itself and its model."""
    info, model = await client.server_info(), await client.model_info()
    return {
        "version": info.version,
        "device": info.device,
        "model": model.model,
        "vocab_size": model.vocab_size,
        "max_context_tokens": model.max_context_tokens,
        "kv_capacity_tokens": info.kv_capacity_tokens,
        "max_step_branches": info.max_step_branches,
        "policy": info.policy,
    }


def write(result: Mapping[str, Any], target: str | Path | None) -> None:
    """To a file, if one is wanted, or to standard output ("-"). Strict JSON: raises ValueError for a NaN."""
    if target is None:
        return
    text = json.dumps(result, indent=1, allow_nan=False)
    if target == "-":
        print(text)
    else:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_text(text + "\n")
