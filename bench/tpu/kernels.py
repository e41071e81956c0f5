"""Compiles the project's two kernels of a step, alone, for a TPU that is not here.

    python -m bench.tpu.kernels --topology v5e:2x2 --heads 8 --kv-heads 1

`cycles` runs it in a process of its own, as libtpu asks once for all where it should write schedules to.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from bench.tpu.topology import ENVIRONMENT, devices

if __name__ == "__main__":
    os.environ.update({**ENVIRONMENT, **os.environ})

import jax
import jax.numpy as jnp

from attention import HeadNorms, Places, Sizes
from attention.tpu import Tpu
from attention.tpu_chips import chip_of
from bench.command import Command
from bench.tpu.cycles import ATTEND, WRITE, AttentionCycles, WriteCycles
from bench.tpu.schedule import Schedule, ScheduleError, dumped_to
from model.sharding import Placement

DTYPE = jnp.bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """What one device's kernels are compiled for: the first of a topology, rows of a bucket, and sizes."""

    topology: str
    rows: int = 64
    num_pages: int = 3125
    page_size: int = 64
    heads: int = 8
    kv_heads: int = 1
    head_dim: int = 128

    @property
    def sizes(self) -> Sizes:
        return Sizes(
            num_pages=self.num_pages, page_size=self.page_size, heads=self.heads, kv_heads=self.kv_heads
        )

    def arguments(self) -> list[str]:
        return [f"--{field.name.replace('_', '-')}={getattr(self, field.name)}" for field in fields(self)]

    def compile(self) -> jax.stages.Compiled:
        """A layer's write and attention, its pages donated. Raises ValueError as these do."""
        device = devices(self.topology)[0]
        backend, placement = tpu_for(device), Placement(device=device)
        scale = self.head_dim**-0.5

        def kernels(pages: Any, qkv: Any, scales: Any, angles: Any, places: Places, work: Any) -> Any:
            norms = HeadNorms(*scales, eps=1e-6)
            q, pages = backend.write(qkv, norms, angles, pages, places)
            return pages, *backend.attend(q, pages, work, scale=scale)

        def array(*shape: int, dtype: Any = DTYPE) -> jax.ShapeDtypeStruct:
            return placement.abstract(shape, dtype, [None] * len(shape))

        rows, heads, head_dim = self.rows, self.heads + 2 * self.kv_heads, self.head_dim
        pages = tuple(array(*each.shape) for each in backend.pages(self.sizes, head_dim, DTYPE))
        angle, place = array(rows, head_dim // 2, dtype=jnp.float32), array(rows, dtype=jnp.int32)
        empty = backend.capacity(rows, self.sizes).empty()
        work = jax.tree.map(lambda each: array(*each.shape, dtype=each.dtype), empty)
        scales = (array(head_dim), array(head_dim))
        arguments = pages, array(rows, heads, head_dim), scales, (angle, angle), Places(place, place), work
        return placement.compile(kernels, arguments, None, donate=[0])


def tpu_for(device: Any) -> Tpu:
    """The backend for a device. Raises ValueError for a kind that its kernels do not know."""
    chip = chip_of(device.device_kind)
    if chip is None:
        raise ValueError(f"the TPU kernels do not know a {device.device_kind}")
    return Tpu(chip)


@cache
def cycles(kernels: Kernels, backend: Tpu) -> tuple[AttentionCycles, WriteCycles]:
    """Of both, by the schedules that libtpu makes in another process, once. Raises ScheduleError."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bench.tpu.kernels", *kernels.arguments()]
        environment = {**ENVIRONMENT, **os.environ, **dumped_to(folder)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise ScheduleError(f"the kernels do not compile alone: {done.stderr[-2000:]}")
        attend, write = (Schedule.of_kernel(Path(folder), name) for name in (ATTEND, WRITE))
    plan = backend.plan(kernels.rows, kernels.sizes, kernels.head_dim, DTYPE)
    return AttentionCycles.of(attend, plan.variants, plan.block_tokens), WriteCycles.of(write)


def main(arguments: Sequence[str]) -> None:
    parser = Command("bench.tpu.kernels", "Compiles the kernels of a step for a TPU that is not here.")
    for field in fields(Kernels):
        name, kind = f"--{field.name.replace('_', '-')}", int if field.name != "topology" else str
        parser.add_argument(
            name, type=kind, required=kind is str, default=None if kind is str else field.default
        )
    options = parser.parse_args(arguments)
    Kernels(**{field.name: getattr(options, field.name) for field in fields(Kernels)}).compile()


if __name__ == "__main__":
    main(sys.argv[1:])
