"""Times `taper-decode`: a sequence (or a few) in one jitted loop on the device, against the byte floor.

    python -m bench.device.decode --model qwen3-32b --json OUT

A step's time is the difference between a long and a short generation, over the difference in tokens: the
prompt's pass cancels out, and compiling comes before. The floor is every weight once at the copy rate, of
one device's part where several share the model (`--tensor-parallel`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import jax.numpy as jnp

from bench import hardware
from bench.command import Command
from bench.device.floor import floor_seconds
from bench.result import conclude, head
from model.checkpoint import ModelSource
from model.config import PRESETS
from model.decode import STRIDE, generate

PROMPT = (1, 2, 3, 4, 5, 6, 7)


def main(arguments: Sequence[str]) -> dict[str, Any]:
    parser = Command("bench.device.decode", "Times the jitted decode loop.")
    parser.add_argument("--model", choices=["default", *sorted(PRESETS)], default="qwen3-32b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=256, help="by which the long generation is longer")
    parser.add_argument("--branches", type=int, default=1)
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_tensor_parallel()
    options = parser.parse_args(arguments)
    source = ModelSource.find(options.model, "random")
    config = source.config
    placement = hardware.placement(config, options.tensor_parallel, peer_memory=options.peer_memory)
    copy = hardware.copy_tb_s(2**28 if options.model == "default" else 2**31)
    model = source.load(jnp.dtype(options.dtype), placement)

    def seconds(tokens: int) -> float:
        how = {"branches": options.branches, "page_size": options.page_size, "placement": placement}
        runs = [generate(model, [PROMPT], max_tokens=tokens, **how) for _ in range(options.repeats)]
        return sorted(run.seconds for run in runs)[len(runs) // 2]

    per_step = (seconds(STRIDE + options.tokens) - seconds(STRIDE)) / options.tokens
    floor = floor_seconds(config, options.dtype, 0, copy, placement)
    result = {
        **head(parser.typed(arguments), hardware.describe(placement.count)),
        "model": config.name,
        "branches": options.branches,
        "copy_tb_s": copy,
        "step_ms": 1e3 * per_step,
        "floor_ms": 1e3 * floor,
        "over_floor": per_step / floor,
        "tokens_per_second": options.branches / per_step,
    }
    text = (
        f"{config.name}, {options.branches} sequences: {result['tokens_per_second']:.1f} tokens/s, "
        f"{result['step_ms']:.2f} ms a step, {result['over_floor']:.3f} x the floor, {result['floor_ms']:.2f}"
    )
    return conclude(result, text, options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
