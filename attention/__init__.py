"""Attention of ragged query rows over shared, paged KV: see `attention.backend`.

Here a name becomes a Backend, for what users type and for the device at hand; nobody else knows the names.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax

from attention.backend import Backend, Capacity, PageArray, Pages, Sizes, Work
from attention.gpu import Gpu
from attention.heads import HeadNorms, Places
from attention.reads import PageRun, Read, Reads
from attention.reference import Reference
from attention.tpu import Tpu
from attention.tpu_chips import CHIPS, chip_of
from attention.xla import Xla

__all__ = [
    "BACKENDS",
    "Backend",
    "Capacity",
    "HeadNorms",
    "PageArray",
    "PageRun",
    "Pages",
    "Places",
    "Read",
    "Reads",
    "Sizes",
    "Work",
    "backend_named",
    "default_backend",
]

BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {
        backend.name: backend
        for backend in (
            Reference(),
            Xla(),
            Gpu(),
            Gpu(alone=True),
            Gpu(interpret=True),
            *(Tpu(chip) for chip in CHIPS.values()),
            Tpu(interpret=True),
        )
    }
)


def backend_named(name: str) -> Backend:
    """The backend that users call so. Raises ValueError, with the names there are."""
    if name not in BACKENDS:
        raise ValueError(f"no attention backend {name!r}; there are {', '.join(BACKENDS)}")
    return BACKENDS[name]


def default_backend(head_dim: int, dtype: Any) -> Backend:
    """The backend for the devices that JAX runs on, a model's head size and its type."""
    own: Backend | None = None
    if jax.default_backend() == "gpu":
        own = Gpu()
    elif jax.default_backend() == "tpu" and (chip := chip_of(jax.devices()[0].device_kind)):
        own = Tpu(chip)
    return own if own and own.supports(head_dim, dtype) else Xla()
