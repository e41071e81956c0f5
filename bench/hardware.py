"""What a benchmark ran on, and the two ceilings of that device: copied bytes and multiplied matrices."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PACKAGES = ("jax", "jaxlib", "numpy", "torch", "flashinfer-python")


def describe(command: str) -> dict[str, Any]:
    """`hardware`, `versions`, and the command, for the head of a result file."""
    device = jax.devices()[0]
    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    hardware = {"device": device.device_kind, "platform": device.platform, "host": platform.machine()}
    if device.platform == "gpu":
        versions["driver"] = _driver()
    return {
        "command": command,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "hardware": hardware,
        "versions": versions,
    }


def save(result: Mapping[str, Any], path: Path | None) -> None:
    """Write a result file, if one is wanted; what is there already is replaced."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def seconds_per_call(call: Callable[[Any], Any], carry: Any, calls: int, repeats: int) -> tuple[float, Any]:
    """Median over `repeats` of the wall time of a chain of calls, per call; and the last carry.

    Each call takes the result of the one before it; the chain is queued at once and then waited for.
    """
    times = []
    for _ in range(repeats):
        jax.block_until_ready(carry)
        start = time.perf_counter()
        for _ in range(calls):
            carry = call(carry)
        jax.block_until_ready(carry)
        times.append((time.perf_counter() - start) / calls)
    return float(np.median(times)), carry


def copy_tb_s(size: int = 2**31) -> float:
    """Terabytes per second, read plus written, of a large elementwise copy."""
    step = jax.jit(lambda x: x + np.uint32(1))
    x = step(jnp.arange(size // 4, dtype=jnp.uint32))
    seconds, _ = seconds_per_call(step, x, calls=10, repeats=5)
    return 2 * size / seconds / 1e12


def matmul_tflop_s(size: int = 8192) -> float:
    """TFLOP/s of a bfloat16 matrix product [size, size] x [size, size], on random data."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    b = b * size**-0.5
    step = jax.jit(lambda x: x @ b)
    seconds, _ = seconds_per_call(step, step(a), calls=10, repeats=5)
    return 2 * size**3 / seconds / 1e12
