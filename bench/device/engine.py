"""Starts the server's engine in this process and times it: getting ready, and its steps against the device's.

    python -m bench.device.engine --json OUT -- --model qwen3-32b --load-format random  # taper-serve's

Requests of equal length are decoded together. A *steady* step is one in which all of them advance and nothing
else happens. Its wall time, from the end of one step to the end of the next, is compared with the time of the
same executable on the same arrays launched back to back, and with the byte floor: every weight and every
different KV position read once, at the copy rate of this run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench import hardware, inside
from bench.arguments import split
from bench.load.workload import Item
from model.kv_cache import bytes_per_page
from scheduler.events import Event, Finished
from scheduler.request import Slo
from scheduler.step import FinishedStep
from serve.engine.engine import Engine
from serve.engine.runner import Runner

PATIENT = Slo(tpot=10.0, ttft=3600.0)


class Compilations:
    """Counts the programs that JAX compiles, or fetches from its cache, from now on."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        del duration_secs
        self.count += event.endswith("backend_compile_duration")


class HostTimes:
    """Seconds that the engine's thread spends in each of its parts, call by call."""

    def __init__(self, engine: Engine, runner: Runner) -> None:
        self.calls: defaultdict[str, list[float]] = defaultdict(list)
        self._time(engine.scheduler, "schedule")
        self._time(engine.scheduler, "update")
        self._time(runner, "launch")

    def _time(self, owner: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments)
            self.calls[name].append(time.perf_counter() - started)
            if name == "launch":
                self._time(result, "samples")
            return result

        setattr(owner, name, timed)

    def summary(self) -> dict[str, dict[str, float]]:
        return {name: _spread(seconds) for name, seconds in self.calls.items()}


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    return {
        "median_ms": 1e3 * statistics.median(seconds),
        "p99_ms": 1e3 * float(np.quantile(seconds, 0.99)),
    }


def serve_all(engine: Engine, items: Sequence[Item]) -> float:
    """Seconds from handing all of them in to the end of the last one."""
    done = threading.Semaphore(0)

    def sink(events: Sequence[Event | Any]) -> None:
        if isinstance(events[-1], Finished):
            done.release()

    started = time.perf_counter()
    for number, item in enumerate(items):
        engine.submit(item.request(f"{time.monotonic_ns()}-{number}", PATIENT, number), sink)
    for _ in items:
        done.acquire()
    return time.perf_counter() - started


def steady(results: Sequence[FinishedStep], count: int) -> list[FinishedStep]:
    """Steps in which `count` requests advance by one token each, after another such step."""
    full = [len(result.step.entries) == result.step.rows == count for result in results]
    return [results[i] for i in range(1, len(results)) if full[i] and full[i - 1]]


def print_result(result: dict[str, Any]) -> None:
    wall = result["wall"]
    print(
        f"{result['output_tokens_s']:.0f} tokens/s; {result['steady_steps']} steady steps: wall "
        f"{wall['median_ms']:.2f} ms (p99 {wall['p99_ms']:.2f}), device {result['device_ms']:.2f}, "
        f"floor {result['floor_ms']:.2f}"
    )
    for name, spread in result["host"].items():
        print(f"  {name:<10} {spread['median_ms']:>8.2f} ms  p99 {spread['p99_ms']:.2f}")
    for row in result["buckets"]:
        print(
            f"  bucket {row['bucket']:>4}, {row['kv_tokens']:>8} KV tokens: {row['step_ms']:>7.2f} ms, "
            f"{row['floor_share']:.0%} of the floor's rate"
        )
    print(f"  programs compiled while serving: {result['compilations']}")


def main(arguments: Sequence[str]) -> dict[str, Any]:
    own, server = split(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m bench.device.engine", description="Times the server's engine."
    )
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=768)
    parser.add_argument(
        "--kv-levels", type=int, nargs="*", default=[64, 1024, 4096], help="tokens of each row"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(own)
    copy = hardware.copy_tb_s(2**28 if jax.default_backend() == "cpu" else 2**31)
    started = time.perf_counter()
    results: list[FinishedStep] = []
    engine, runner, summary = inside.start(server, results.append)
    ready = time.perf_counter() - started
    print(summary, flush=True)
    compilations = Compilations()
    times = HostTimes(engine, runner)
    items = [Item(0.0, options.prompt_tokens, ((options.new_tokens,),))] * options.requests
    wall = serve_all(engine, items)
    engine.stop(drain=True, timeout=10.0)

    full = steady(results, options.requests)
    if not full:
        raise SystemExit("no steady steps: give more new tokens")
    typical = full[len(full) // 2]
    device = runner.seconds(typical.step, repeats=100)
    weights = runner.weight_bytes
    kv_token = bytes_per_page(runner.model_config, 1, runner.dtype)

    def floor_ms(kv_tokens: int) -> float:
        return (weights + kv_token * kv_tokens) / copy / 1e9

    buckets = []
    for bucket in runner.buckets:
        for tokens in options.kv_levels:
            pages = -(-tokens // runner.config.page_size)
            if bucket * pages <= runner.config.num_pages:
                step = 1e3 * runner.seconds(runner.probe(bucket, pages), repeats=30)
                kv_tokens = runner.probe_load(bucket, pages).kv_tokens
                floor = floor_ms(kv_tokens)
                row = {
                    "bucket": bucket,
                    "kv_tokens": kv_tokens,
                    "step_ms": step,
                    "floor_ms": floor,
                }
                buckets.append(row | {"floor_share": floor / step})
    result = {
        **hardware.describe("python -m bench.device.engine " + " ".join(arguments)),
        "model": runner.model_config.name,
        "copy_tb_s": copy,
        "ready_s": ready,
        "summary": summary,
        "requests": options.requests,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "output_tokens_s": options.requests * options.new_tokens / wall,
        "steady_steps": len(full),
        "wall": _spread([step.seconds for step in full]),
        "device_ms": 1e3 * device,
        "wall_over_device": statistics.median(step.seconds for step in full) / device,
        "floor_ms": floor_ms(typical.forecast.load.kv_tokens),
        "host": times.summary(),
        "compilations": compilations.count,
        "buckets": buckets,
    }
    hardware.save(result, options.json)
    print_result(result)
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
