"""Times the host's share of a step: planning what its rows read, making all of its arrays, and packing them.

    python -m bench.host.packing [--json OUT]

The steps are decode steps of Qwen3-32B, planned for the GPU kernels and for XLA; no device is needed.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from attention import Backend, Reads, Sizes, backend_named
from bench import hardware
from bench.command import Command
from bench.device.shapes import WIDE_HEADS, Shape
from bench.result import conclude, head, say
from bench.timing import median_seconds
from model.step import StepBuffer, StepLayout
from scheduler.step import Entry, SegmentRead, Step
from serve.engine.packing import step_inputs

# groups, width, prefix and tail tokens: the last two are 295k tokens by row, and as many different ones.
CASES = ((64, 1, 0, 4096), (8, 8, 2048, 192), (32, 16, 512, 64), (32, 16, 4096, 320))
PARTS = ("plan", "step_inputs", "pack")


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


def measure(shape: Shape, backend: Backend, repeats: int) -> dict[str, Any]:
    step = step_of(shape)
    sizes = Sizes(num_pages=shape.pages, page_size=shape.page, heads=shape.q_heads, kv_heads=shape.kv_heads)
    capacity = backend.capacity(shape.rows, sizes, pages_per_read=shape.longest)
    layout = StepLayout(backend, capacity, shape.page, samples=shape.rows)
    entries = step.entries
    reads = Reads(*zip(*((e.context, e.own, e.rows, e.ordinal) for e in entries), strict=True))
    buffer, inputs = StepBuffer(layout), step_inputs(step, layout)
    return {
        **{name: getattr(shape, name) for name in ("groups", "width", "prefix", "tail", "page", "rows")},
        "backend": backend.name,
        "plan_us": 1e6 * median_seconds(lambda: backend.lay_out_unpadded(reads, capacity), repeats),
        "step_inputs_us": 1e6 * median_seconds(lambda: step_inputs(step, layout), repeats),
        "pack_us": 1e6 * median_seconds(lambda: buffer.pack(inputs), repeats),
    }


def main(arguments: Sequence[str]) -> dict[str, Any]:
    parser = Command("bench.host.packing", "Times the planning of a step on the host.")
    parser.add_argument("--repeats", type=int, default=300)
    options = parser.parse_args(arguments)
    result = {**head(parser.typed(arguments), hardware.describe()), "cases": []}
    for lengths in CASES:
        for page in (64, 16):
            for backend in ("gpu", "xla"):
                shape = Shape("decode", *lengths, page, *WIDE_HEADS)
                case = measure(shape, backend_named(backend), options.repeats)
                result["cases"].append(case)
                times = ", ".join(f"{part} {case[f'{part}_us']:6.0f} us" for part in PARTS)
                say(f"{shape.label:<30}{backend:<5} {times}", options.json)
    return conclude(result, f"Medians of {options.repeats} calls.", options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
