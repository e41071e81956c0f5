"""Times the host's share of a step: planning what its rows read, and making all of its arrays.

    python -m bench.host.packing [--json OUT]

The steps are decode steps of Qwen3-32B, planned for the GPU kernels and for XLA; no device is needed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import attention
from attention import Reads
from bench import hardware
from bench.device.shapes import WIDE_HEADS, Shape
from scheduler.step import Entry, SegmentRead, Step
from serve.engine.packing import step_inputs

# groups, width, prefix and tail tokens: the last two are 295k tokens by row, and as many different ones.
CASES = ((64, 1, 0, 4096), (8, 8, 2048, 192), (32, 16, 512, 64), (32, 16, 4096, 320))


def step_of(shape: Shape, seed: int = 0) -> Step:
    """A step in which every branch of the shape decodes; pages lie in random order."""
    free = np.random.default_rng(seed).permutation(shape.pages).tolist()

    def segment(length: int) -> SegmentRead:
        return SegmentRead(array("i", [free.pop() for _ in range(-(-length // shape.page))]), length)

    def entry(branch: int, context: tuple[SegmentRead, ...]) -> Entry:
        return Entry(
            request_id=str(branch // shape.width),
            branch=branch,
            segment=branch,
            slot=branch,
            start=shape.prefix + shape.tail - 1,
            ordinal=shape.tail - 1,
            rows=1,
            tokens=None,
            context=context,
            own=segment(shape.tail),
            samples=True,
            path=((0, 0), (1, branch % shape.width)),
        )

    entries: list[Entry] = []
    for group in range(shape.groups):
        context = (segment(shape.prefix),) if shape.prefix else ()
        entries += [entry(group * shape.width + branch, context) for branch in range(shape.width)]
    return Step(0, tuple(entries), (), shape.rows)


def microseconds(call: Callable[[], Any], repeats: int) -> float:
    """Median time of a call, after a few that warm up."""
    seconds: list[float] = []
    for _ in range(repeats + 5):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1e6 * statistics.median(seconds[5:])


def measure(shape: Shape, backend: str, repeats: int) -> dict[str, Any]:
    step = step_of(shape)
    capacity = attention.capacity(
        backend,
        shape.rows,
        shape.pages,
        heads=shape.q_heads,
        kv_heads=shape.kv_heads,
        page_size=shape.page,
        pages_per_read=shape.longest,
    )
    entries = step.entries
    reads = Reads(*zip(*((e.context, e.own, e.rows, e.ordinal) for e in entries), strict=True))
    return {
        **{name: getattr(shape, name) for name in ("groups", "width", "prefix", "tail", "page", "rows")},
        "backend": backend,
        "plan_us": microseconds(lambda: attention.plan(reads, capacity, shape.page), repeats),
        "step_inputs_us": microseconds(lambda: step_inputs(step, capacity, shape.page), repeats),
    }


def main(arguments: Sequence[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        prog="python -m bench.host.packing", description="Times the planning of a step on the host."
    )
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    result = {**hardware.describe("python -m bench.host.packing"), "cases": []}
    for lengths in CASES:
        for page in (64, 16):
            for backend in ("gpu", "xla"):
                shape = Shape("decode", *lengths, page, *WIDE_HEADS)
                case = measure(shape, backend, options.repeats)
                result["cases"].append(case)
                print(
                    f"{shape.label:<30}{backend:<5} plan {case['plan_us']:6.0f} us, "
                    f"step_inputs {case['step_inputs_us']:6.0f} us",
                    flush=True,
                )
    hardware.save(result, options.json)
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
