"""What the cases of bench.backends would take on TPUs that are not here.

    python -m bench.tpu.cases --topology v5e:2x4 --model qwen3-32b --json -

`estimated` runs it in a process of its own: as a compiler alone, libtpu hides the devices that are here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bench.tpu.topology import ENVIRONMENT, TopologyError, devices

if __name__ == "__main__":
    os.environ.update({**ENVIRONMENT, **os.environ})

from bench import hardware
from bench.command import Command
from bench.device.cases import CASES, PAGE, STEP, Row, lengths_of, shape_of, table, when_and_with
from bench.device.floor import floor_seconds
from bench.progress import tracked
from bench.result import conclude, head
from bench.tpu.kernels import cycles
from bench.tpu_aot import DTYPE, Target, attention_seconds, measure
from model.config import PRESETS, ModelConfig

POOL_TOKENS = 200_000  # positions that the pool has room for


def estimated(topology: str, model: str, layers: int | None) -> dict[str, Any]:
    """The result of another process. Raises TopologyError, with its last words, if there is none."""
    command = [sys.executable, "-m", "bench.tpu.cases", f"--topology={topology}", f"--model={model}"]
    command += ["--json=-"] + ([f"--layers={layers}"] if layers else [])
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    if done.returncode:
        raise TopologyError(f"no estimate for {topology}: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def target_of(topology: str, config: ModelConfig, rows: int) -> Target:
    """A step of so many rows on all chips of a topology."""
    pool = {"kv_tokens": POOL_TOKENS, "page_size": PAGE}
    return Target.over(topology, config, rows, **pool, chips=devices(topology))


def attention(target: Target, case: str) -> dict[str, Any]:
    """Of a row: one layer's attention on a chip, which has its share of the heads."""
    chip, shape = target.backend.chip, shape_of(case, target.config, target.placement)
    attend, _ = cycles(target.kernels, target.backend)
    return {
        "layers": 1,
        "seconds": attention_seconds(target, shape, attend, shape.rows_bytes),
        "floor_seconds": shape.unique_bytes / chip.hbm,
        "arithmetic_seconds": shape.flops / target.figures.flops,
    }


def step(target: Target, case: str) -> dict[str, Any]:
    """Of a row: the model's whole step."""
    config, shape = target.config, shape_of(case, target.config)
    rate = target.backend.chip.hbm / 1e12
    found = measure(target, shape)
    return {
        "layers": config.num_layers,
        "seconds": found["estimate_seconds"] if found["fits"] else None,
        "floor_seconds": floor_seconds(config, DTYPE, shape.kv_tokens, rate, target.placement),
        "error": None if found["fits"] else "does not fit",
    }


def rows_of(topology: str, config: ModelConfig, ran_on: str) -> list[Row]:
    """Of all cases, estimated."""
    rows: list[Row] = []
    for case in tracked(CASES, f"cases for {topology}", len(CASES)):
        target = target_of(topology, config, shape_of(case, config).rows)
        chip = target.backend.chip
        rows.append(
            Row(
                case=case,
                shape=lengths_of(case),
                backend=target.backend.name,
                device=target.placement.devices[0].device_kind,
                devices=target.placement.count,
                model=config.name,
                how="estimated",
                tb_s=chip.hbm / 1e12,
                ran_on=ran_on,
                **(step if case == STEP else attention)(target, case),
            )
        )
    return rows


def main(arguments: Sequence[str]) -> dict[str, Any]:
    parser = Command("bench.tpu.cases", "Estimates bench.backends' cases for TPUs that are not here.")
    parser.add_argument("--topology", required=True, help="as libtpu calls it: v5e:2x4, v6e:2x4, v5p:2x2x1")
    parser.add_argument("--model", choices=sorted(PRESETS), default="qwen3-32b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for a quick look")
    options = parser.parse_args(arguments)
    config = PRESETS[options.model]
    config = replace(config, num_layers=options.layers or config.num_layers)
    described = head(parser.typed(arguments), hardware.describe())
    rows = rows_of(options.topology, config, when_and_with(described))
    result = {**described, "rows": [row.as_json() for row in rows]}
    return conclude(result, table(rows), options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
