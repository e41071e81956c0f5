"""What a benchmark ran on, and the two ceilings of that device: copied bytes and multiplied matrices.

JAX is imported where a device is asked for, so that benchmarks without one can import this.
"""

from __future__ import annotations

import platform
import subprocess
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.result import versions
from bench.timing import seconds_per_call

if TYPE_CHECKING:
    from model.config import ModelConfig
    from model.sharding import Placement

PACKAGES = ("jax", "jaxlib", "libtpu", "numpy", "torch", "flashinfer-python")


def describe(devices: int = 1) -> dict[str, Any]:
    """`hardware` and `versions`, for the head of a result; `devices` of the hardware were used."""
    import jax

    device = jax.devices()[0]
    found = versions(PACKAGES)
    if device.platform == "gpu":
        found["driver"] = driver()
    return {
        "hardware": {
            "device": device.device_kind,
            "devices": devices,
            "platform": device.platform,
            "host": platform.machine(),
        },
        "versions": found,
    }


def placement(config: ModelConfig, devices: int, *, peer_memory: bool = False) -> Placement:
    """A model over so many devices, which a CPU makes of itself. Call it before anything asks for a device.

    Raises PlacementError if they are not there or cannot share the model.
    """
    from model.sharding import Placement, ask_for_devices

    ask_for_devices(devices)
    return Placement.over(config, devices, peer_memory=peer_memory)


def driver() -> str:
    """Of all devices: they have one."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.split()
        return ", ".join(dict.fromkeys(found))
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def copy_tb_s(size: int = 2**31) -> float:
    """Terabytes per second, read plus written, of one device's large elementwise copy."""
    import jax
    import jax.numpy as jnp

    step = jax.jit(lambda x: x + np.uint32(1))
    x = step(jnp.arange(size // 4, dtype=jnp.uint32))
    seconds, _ = seconds_per_call(step, x, calls=10, repeats=5)
    return 2 * size / seconds / 1e12


def matmul_tflop_s(size: int = 8192) -> float:
    """TFLOP/s of a bfloat16 matrix product [size, size] x [size, size], on random data."""
    import jax
    import jax.numpy as jnp

    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    b = b * size**-0.5
    step = jax.jit(lambda x: x @ b)
    seconds, _ = seconds_per_call(step, step(a), calls=10, repeats=5)
    return 2 * size**3 / seconds / 1e12
