"""FlashInfer on the same pages as ours: what a kernel of this project has to be measured against.

Ways of serving a forest with it (https://docs.flashinfer.ai):
  flat          tensor-core decode over each branch's whole page list: reads a prefix once per branch
  composed_fa2  prefill over the prefixes (not causal) + tensor-core decode over the tails + merge_state
  composed_fa3  the same with the FlashAttention 3 prefill
  cascade       its own MultiLevelCascadeAttentionWrapper
  prefill_fa2   paged prefill of the new rows on their context, causal
  prefill_fa3   the same with FlashAttention 3

It is optional (`pip install torch flashinfer-python`), needs a GPU, and compiles its kernels at first use;
`python -m bench.device.peers` does that ahead of time.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import jax
import numpy as np

from bench.device.shapes import PageTables, Shape

# Strongest first; those after "flat" are measured only while the time budget lasts.
VARIANTS = {
    "decode": ("flat",),
    "shared": ("composed_fa3", "composed_fa2", "flat", "cascade"),
    "random": ("composed_fa3", "composed_fa2", "flat", "cascade"),
    "prefill": ("prefill_fa3", "prefill_fa2"),
}
WEAK = ("cascade",)
WORKSPACE = 2**30  # bytes for FlashInfer's partial results

Run = Callable[[Any, Any], Any]


class FlashInfer:
    """Plans and times FlashInfer's kernels; wrappers and workspace are made once."""

    def __init__(self) -> None:
        self.torch: Any = importlib.import_module("torch")
        self.flashinfer: Any = importlib.import_module("flashinfer")
        self.workspace = self.torch.zeros(WORKSPACE, dtype=self.torch.uint8, device="cuda")
        self.stream = self.torch.cuda.Stream()
        self._wrappers: dict[str, Any] = {}

    @property
    def version(self) -> str:
        return self.flashinfer.__version__

    def tensor(self, array: jax.Array) -> Any:
        """A JAX array of the same device as a torch tensor: the same memory."""
        return self.torch.from_dlpack(array)

    def plan(self, variant: str, tables: PageTables, q: Any, scale: float) -> Run:
        """Prepares a variant for queries [rows, q_heads, head_dim]; the result runs it on (k, v) pages."""
        shape = tables.shape
        heads = {"num_qo_heads": shape.q_heads, "num_kv_heads": shape.kv_heads, "page_size": shape.page}
        common = heads | {"sm_scale": scale, "q_data_type": q.dtype, "kv_data_type": q.dtype}
        all_pages = self._pages(tables.branch_pages, tables.last_valid)
        tails = self._pages(tables.tails, tables.last_valid)
        prefixes = self._pages(list(tables.prefix), np.full(shape.groups, shape.page, np.int32))
        by_group = self._int32(np.arange(shape.groups + 1) * shape.width)
        by_branch = self._int32(np.arange(shape.branches + 1) * shape.rows_per_branch)

        name, _, backend = variant.partition("_")
        if name == "flat":
            decode = self._decode()
            decode.plan(*all_pages, head_dim=shape.head_dim, **common)
            return lambda k, v: decode.run(q, (k, v))
        if name == "prefill":
            prefill = self._prefill(backend)
            prefill.plan(by_branch, *all_pages, head_dim_qk=shape.head_dim, causal=True, **common)
            return lambda k, v: prefill.run(q, (k, v))
        if name == "composed":
            prefill, decode = self._prefill(backend), self._decode()
            prefill.plan(by_group, *prefixes, head_dim_qk=shape.head_dim, causal=False, **common)
            decode.plan(*tails, head_dim=shape.head_dim, **common)

            def composed(k: Any, v: Any) -> Any:
                of_prefix = prefill.run(q, (k, v), return_lse=True)
                of_tail = decode.run(q, (k, v), return_lse=True)
                return self.flashinfer.merge_state(*of_prefix, *of_tail)[0]

            return composed
        if name == "cascade":
            cascade = self._wrapper(
                "cascade", lambda: self.flashinfer.MultiLevelCascadeAttentionWrapper(2, self.workspace, "HND")
            )
            levels = zip(prefixes, tails, strict=True)
            cascade.plan(
                [by_group, by_branch], *map(list, levels), head_dim=shape.head_dim, causal=False, **common
            )
            return lambda k, v: cascade.run(q, (k, v))
        raise ValueError(f"no FlashInfer variant {variant!r}")

    def graph_seconds(self, run: Run, pages: Sequence[tuple[Any, Any]], expected: float) -> float:
        """Seconds of one run: replays of a CUDA graph that takes the page sets in turn, between events.

        `expected` seconds of a run decide how many of them fill the graph. The median of nine.
        """
        torch = self.torch
        graph = torch.cuda.CUDAGraph()
        runs = len(pages) * max(1, min(8, int(1e-3 / (len(pages) * expected))))
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            run(*pages[0])
            self.stream.synchronize()
            # Not `torch.cuda.graph`, which collects garbage each time.
            graph.capture_begin(capture_error_mode="thread_local")
            for index in range(runs):
                run(*pages[index % len(pages)])
            graph.capture_end()
            graph.replay()
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(10)]
            marks[0].record()
            for mark in marks[1:]:
                graph.replay()
                mark.record()
            self.stream.synchronize()
        times = [start.elapsed_time(stop) for start, stop in pairwise(marks)]
        return float(np.median(times)) / 1e3 / runs

    def _int32(self, values: Any) -> Any:
        return self.torch.tensor(np.asarray(values, np.int32))

    def _pages(self, lists: Sequence[np.ndarray], last_valid: np.ndarray) -> tuple[Any, Any, Any]:
        """(indptr, page ids, filled positions of the last page), as FlashInfer's plans take them."""
        indptr = np.cumsum([0, *(len(pages) for pages in lists)])
        return self._int32(indptr), self._int32(np.concatenate(lists)), self._int32(last_valid)

    def _wrapper(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._wrappers:
            self._wrappers[name] = make()
        return self._wrappers[name]

    def _decode(self) -> Any:
        make = self.flashinfer.BatchDecodeWithPagedKVCacheWrapper
        return self._wrapper("decode", lambda: make(self.workspace, "HND", use_tensor_cores=True))

    def _prefill(self, backend: str) -> Any:
        make = self.flashinfer.BatchPrefillWithPagedKVCacheWrapper
        return self._wrapper(backend, lambda: make(self.workspace, "HND", backend=backend))


def peer_names(shape: Shape, *, weak: bool) -> tuple[str, ...]:
    """The variants to measure on a shape: the strong ones, or those that lose everywhere."""
    return tuple(name for name in VARIANTS[shape.suite] if (name in WEAK) == weak)


def build() -> None:
    """Compiles the modules that the variants need (several minutes of CPU time, in parallel)."""
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    torch: Any = importlib.import_module("torch")
    jit: Any = importlib.import_module("flashinfer.jit")
    cascade: Any = importlib.import_module("flashinfer.jit.cascade")
    types = (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.int32)
    modules = [
        jit.gen_batch_prefill_module(backend, *types, 128, 128, 0, False, False, False)
        for backend in ("fa2", "fa3")
    ]
    missing = [module for module in (*modules, cascade.gen_cascade_module()) if not module.is_aot]
    jit.build_jit_specs(missing, verbose=False)


if __name__ == "__main__":
    started = time.perf_counter()
    build()
    print(f"FlashInfer's kernels are built ({time.perf_counter() - started:.0f} s)")
