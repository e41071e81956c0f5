"""Starts the server's engine in this process and times it: getting ready, and its steps against the device's.

    python -m bench.device.engine --json OUT -- --model qwen3-32b --load-format random  # taper-serve's

Requests of equal length are decoded together. A *steady* step is one in which all of them advance and nothing
else happens. Its wall time, from the end of one step to the end of the next, is compared with the time of the
same executable on the same arrays launched back to back, and with the byte floor: every weight and every
different KV position read once, at the copy rate of this run; of one device's parts, if several share them.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from typing import Any

import jax

from bench import hardware, inside
from bench.command import Command, split
from bench.device.floor import floor_seconds
from bench.device.probe import Shape, probe
from bench.inside import Inside
from bench.load.workload import Item
from bench.progress import waiting
from bench.result import conclude, head, say
from bench.timing import Stopwatch, clock, spread
from scheduler.predictor import StepLoad
from scheduler.request import Slo
from scheduler.step import FinishedStep, Step
from serve.engine.runner import Runner, StepHandle

PATIENT = Slo(tpot=10.0, ttft=3600.0)


class Compilations:
    """Counts the programs that JAX compiles, or fetches from its cache, from now on."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        del duration_secs
        self.count += event.endswith("backend_compile_duration")


def host_times(here: Inside) -> Stopwatch:
    """Times, from now on, what the engine does in each of a step's parts. Launches have their own thread."""
    watch = Stopwatch()
    watch.on(here.engine.scheduler, "schedule", "update")
    launch = watch.timed("launch", here.runner.launch)

    def launch_timed(step: Step) -> StepHandle:
        handle: StepHandle = launch(step)
        watch.on(handle, "samples")
        return handle

    here.runner.launch = launch_timed  # type: ignore[method-assign]
    return watch


def serve_all(here: Inside, items: Sequence[Item]) -> float:
    """Seconds from handing all of them in to the end of the last one."""
    started = clock()
    asked = [here.ask(item.request(f"{started}-{n}", PATIENT, n)) for n, item in enumerate(items)]
    for answered in asked:
        answered.result()
    return clock() - started


def steady(results: Sequence[FinishedStep], count: int) -> list[FinishedStep]:
    """Steps in which `count` requests advance by one token each, after another such step."""
    full = [len(result.step.entries) == result.step.rows == count for result in results]
    return [results[i] for i in range(1, len(results)) if full[i] and full[i - 1]]


def bucket_rows(runner: Runner, kv_levels: Sequence[int], copy_tb_s: float) -> list[dict[str, Any]]:
    """A full step of every bucket, with as many tokens of KV in each row as the pool holds of these."""
    rows: list[dict[str, Any]] = []
    for bucket in runner.buckets:
        for tokens in kv_levels:
            pages = bucket * -(-tokens // runner.config.page_size)
            if pages <= runner.config.num_pages:
                step, load = probe(Shape(bucket, bucket, 1, pages), runner.config.page_size)
                took, floor = runner.seconds(step, repeats=30), floor_of(runner, load, copy_tb_s)
                rows.append(
                    {
                        "bucket": bucket,
                        "kv_tokens": load.kv_tokens,
                        "step_ms": 1e3 * took,
                        "floor_ms": 1e3 * floor,
                        "floor_share": floor / took,
                    }
                )
    return rows


def floor_of(runner: Runner, load: StepLoad, copy_tb_s: float) -> float:
    placement = runner.config.placement
    return floor_seconds(runner.model_config, runner.dtype, load.kv_tokens, copy_tb_s, placement)


def text(result: dict[str, Any]) -> str:
    wall = result["wall"]
    lines = [
        f"{result['output_tokens_s']:.0f} tokens/s; {result['steady_steps']} steady steps: wall "
        f"{wall['median_ms']:.2f} ms (p99 {wall['p99_ms']:.2f}), device {result['device_ms']:.2f}, "
        f"floor {result['floor_ms']:.2f}"
    ]
    for name, each in result["host"].items():
        lines.append(f"  {name:<10} {each['median_ms']:>8.2f} ms  p99 {each['p99_ms']:.2f}")
    for row in result["buckets"]:
        lines.append(
            f"  bucket {row['bucket']:>4}, {row['kv_tokens']:>8} KV tokens: {row['step_ms']:>7.2f} ms, "
            f"{row['floor_share']:.0%} of the floor's rate"
        )
    return "\n".join([*lines, f"  programs compiled while serving: {result['compilations']}"])


def command() -> Command:
    parser = Command("bench.device.engine", "Times the server's engine.")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=768)
    parser.add_argument(
        "--kv-levels", type=int, nargs="*", default=[64, 1024, 4096], help="tokens of each row"
    )
    return parser


def main(arguments: Sequence[str]) -> dict[str, Any]:
    own, server = split(arguments)
    options = command().parse_args(own)
    config = inside.configured(server)
    copy = hardware.copy_tb_s(2**28 if jax.default_backend() == "cpu" else 2**31)
    started, results = clock(), list[FinishedStep]()
    here = inside.start(config, results.append)
    ready, runner = clock() - started, here.runner
    say(here.summary, options.json)
    compilations, times = Compilations(), host_times(here)
    items = [Item(0.0, options.prompt_tokens, ((options.new_tokens,),))] * options.requests
    with waiting(f"serving {options.requests} requests"):
        wall = serve_all(here, items)
    here.engine.stop(drain=True, timeout=10.0)

    full = steady(results, options.requests)
    if not full:
        raise SystemExit("no steady steps: give more new tokens")
    typical, steps = full[len(full) // 2], [step.seconds for step in full]
    device = runner.seconds(typical.step, repeats=100)
    result = {
        **head(command().typed(arguments), hardware.describe(runner.config.placement.count)),
        "model": runner.model_config.name,
        "copy_tb_s": copy,
        "ready_s": ready,
        "summary": here.summary,
        "requests": options.requests,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "output_tokens_s": options.requests * options.new_tokens / wall,
        "steady_steps": len(full),
        "wall": spread(steps),
        "device_ms": 1e3 * device,
        "wall_over_device": statistics.median(steps) / device,
        "floor_ms": 1e3 * floor_of(runner, typical.forecast.load, copy),
        "host": times.spreads(),
        "compilations": compilations.count,
        "buckets": bucket_rows(runner, options.kv_levels, copy),
    }
    return conclude(result, text(result), options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
