"""TPUs that are not here: `libtpu` compiles for them, as for real ones, on any x86 host.

Their devices take the place of `jax.devices()` in a `Placement`; nothing can run on them. Put ENVIRONMENT
into the environment before JAX is imported: libtpu reads it once, when it is first asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# As a compiler alone: arrays live on the host, whatever else is here; other processes may compile, too;
# nobody is asked what this machine is; no log is written.
ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": "disabled",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }
)


class TopologyError(ValueError):
    """There is no such topology, or nothing here to compile for it."""


def installed() -> bool:
    """Whether there is a libtpu to compile with."""
    return importlib.util.find_spec("libtpu") is not None


def devices(topology: str, count: int | None = None) -> list[Any]:
    """The devices of a topology such as `v5e:2x4` or `v5p:2x2x1`: all of them, or the first `count`.

    A single chip is the first of `v5e:2x2`, the smallest that libtpu knows. Raises TopologyError.
    """
    if not installed():
        raise TopologyError("compiling for a TPU needs libtpu: pip install -e '.[tpu]'")
    import jax
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except jax.errors.JaxRuntimeError as error:
        raise TopologyError(
            f"libtpu knows no topology {topology!r}; it knows v5e:2x4, v6e:2x4, v5p:2x2x1 and more: {error}"
        ) from error
    if count is not None and not 1 <= count <= len(found):
        raise TopologyError(f"{topology} has {len(found)} devices, not {count}")
    return [*found[:count]]
