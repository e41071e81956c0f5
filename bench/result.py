"""The result of a benchmark: its head, what a server says of itself, and how it is written."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import re
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taper_client import AsyncClient

PACKAGES = ("grpcio", "protobuf", "numpy")


def head(command: str, device: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`command`, when it ran, and what on: a device as bench.hardware describes it, or this host alone."""
    ran_on = device or {"client": {"host": processor(), **versions(PACKAGES)}}
    return {"command": command, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **ran_on}


def ran_on(result: Mapping[str, Any]) -> str:
    """One line of what a result's head says it ran on."""
    client = {**result.get("client", {})}
    name = client.pop("host", None) or device_of(result["hardware"])
    packages = ", ".join(f"{package} {each}" for package, each in (client or result["versions"]).items())
    server = f", against {device_of(result['server'])}" if "server" in result else ""
    return f"Ran on {name} ({packages}){server}."


def processor() -> str:
    """The name of this host's processor, where Linux tells it; hosts with one device differ much in it."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return f"{platform.machine()}, {found[1].strip()}" if found else platform.machine()


def device_of(described: Mapping[str, Any]) -> str:
    """The device of a result's hardware or server, and how many of it if several. Older results had one."""
    count = described.get("devices", 1)
    return described["device"] if count == 1 else f"{count} x {described['device']}"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of Python, and of those that are installed."""
    found = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


async def describe_server(client: AsyncClient) -> dict[str, Any]:
    """What a server says of itself and its model."""
    info, model = await client.server_info(), await client.model_info()
    return {
        "version": info.version,
        "device": info.device,
        "devices": info.device_count,
        "model": model.model,
        "vocab_size": model.vocab_size,
        "max_context_tokens": model.max_context_tokens,
        "kv_capacity_tokens": info.kv_capacity_tokens,
        "max_step_branches": info.max_step_branches,
        "policy": info.policy,
    }


def write(result: Mapping[str, Any], target: str | Path | None) -> None:
    """To a file, if one is wanted, or to standard output ("-"). What is there already is replaced, at once:
    nobody ever reads half a file.

    JSON has no NaN and no infinity: they are written as null.
    """
    if target is None:
        return
    text = json.dumps(_finite(result), indent=1, allow_nan=False)
    if target == "-":
        print(text)
    else:
        path = Path(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # a device, which is not to be replaced
            path.write_text(text + "\n")
            return
        begun = path.with_name(f"{path.name}.part")
        begun.write_text(text + "\n")
        begun.replace(path)


def conclude(result: dict[str, Any], text: str, target: str | Path | None) -> dict[str, Any]:
    """Write a whole result, and say it to a reader, with what it ran on."""
    write(result, target)
    say(f"{text}\n{ran_on(result)}", target)
    return result


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {key: _finite(each) for key, each in value.items()}
        case list() | tuple():
            return [_finite(each) for each in value]
        case _:
            return value


def keep(result: Mapping[str, Any], target: str | Path | None) -> None:
    """Write what there is so far of a result that is still measured; standard output gets it whole alone."""
    if target != "-":
        write(result, target)


def say(text: str, target: str | Path | None, *, end: str = "\n") -> None:
    """Text for a reader, kept out of standard output where the result goes there."""
    print(text, end=end, file=sys.stderr if target == "-" else sys.stdout, flush=True)
