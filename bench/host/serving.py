"""Times what a server and its engine do for a step, over a device that is none: `python -m bench.host`.

    python -m bench.host --device-ms 6 --streams 64 --json OUT      # a step of Qwen3-8B, 168 rows
    python -m bench.host --device-ms 6 --in-process                 # the engine in the server's process

The server is the real one, with the real scheduler, packing and messages, for the sizes of Qwen3-32B. All
requests decode together; only steps in which all of them take part count. Beside them, a process that does
nothing but sleep for as long says what this machine adds by itself.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bench import result
from bench.command import Command, asked_for, ints
from bench.host.processes import Setting
from bench.load.driver import Reply, connected, message, play
from bench.load.workload import Item
from bench.server import started
from bench.timing import no_collections, python_ms, spread
from serve.door import StepRecord
from serve.engine.step_log import read_steps
from serve.lateness import CAUSES, cause_of_lateness

PROGRAM = "import sys; from bench.host.processes import serve; serve(sys.argv[1:])"
MODEL, VOCABULARY = "qwen3-32b", 250
WIDTHS = (1, 1, 2, 2, 3, 3, 4, 5)  # of the streams in turn: 64 have 168 branches
SLEEPER = """
import sys, time
seconds = float(sys.argv[1]); last = time.perf_counter()
while True:
    time.sleep(max(0.0, last + seconds - time.perf_counter()))
    now = time.perf_counter(); print(now - last, flush=True); last = now
"""


def items(streams: int, widths: Sequence[int], prompt: int, tokens: int) -> list[Item]:
    """Requests of one parallel stage each."""
    return [
        Item(arrival=0.0, prompt=prompt, stages=((1,), (tokens,) * width), join="none")
        for width, _ in zip(itertools.cycle(widths), range(streams), strict=False)
    ]


async def load(address: str, asked: Sequence[Item]) -> list[Reply]:
    requests = [message(item, str(n), n, VOCABULARY, salt=str(n)) for n, item in enumerate(asked)]
    async with connected(address) as driver:
        with no_collections():
            return await play(driver, requests, [0.0] * len(requests))


@contextmanager
def sleeping(seconds: float) -> Iterator[list[float]]:
    """How long each sleep of `seconds` took in a process beside this one; filled at the end."""
    taken: list[float] = []
    command = [sys.executable, "-c", SLEEPER, str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield taken
        finally:
            process.terminate()
            assert process.stdout is not None
            taken += [float(line) for line in process.stdout if line.endswith("\n")]


def unevenness(seconds: Sequence[float]) -> dict[str, float]:
    """Their spread, and the 99th percentile over the median."""
    found = spread(seconds)
    return {**found, "p99_over_median": found["p99_ms"] / found["median_ms"]}


def steps_of(records: Sequence[StepRecord], requests: int) -> dict[str, Any]:
    """Of those in which all requests take part and that follow another such step."""
    whole = [(a, b) for a, b in pairwise(records) if a.requests == b.requests == requests]
    after = dict(pairwise(records))
    late = Counter(cause_of_lateness(step, after.get(step)) for _, step in whole)
    return {
        "steps": len(whole),
        "rows": int(statistics.median(step.load.rows for _, step in whole)),
        "step": unevenness([step.ended - before.ended for before, step in whole]),
        "idle_ms": 1e3 * statistics.mean(step.idle for _, step in whole),
        "late": {cause: late[cause] / len(whole) for cause in CAUSES},
    }


def measure(options: Any) -> dict[str, Any]:
    asked = items(options.streams, options.widths, options.prompt_tokens, options.steps)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(
            device_ms=options.device_ms,
            launch_ms=options.launch_ms,
            folder=folder,
            requests=options.streams,
        )
        arguments = ["--model", MODEL, "--policy", "eager", "--num-pages", str(options.pages)]
        arguments += ["--max-queue", str(options.streams)]
        arguments += ["--engine-in-process"] * options.in_process
        with (
            patch.dict(os.environ, setting.environment),
            started(arguments, program=PROGRAM) as server,
            sleeping(options.device_ms / 1e3) as slept,
        ):
            cpu, began = time.process_time(), time.perf_counter()
            replies = asyncio.run(load(server.address, asked))
            client = (time.process_time() - cpu) / (time.perf_counter() - began)
        counted = [path for path in sorted(Path(folder).iterdir()) if path.name != "steps"]
        processes = {path.name: json.loads(path.read_text()) for path in counted}
        records = [*read_steps((Path(folder) / "steps").read_text().splitlines(keepends=True))]
    failed = [reply.error for reply in replies if reply.error]
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed, first: {failed[0]}")
    return {
        **steps_of(records, options.streams),
        "machine": unevenness(slept),
        "python_ms": python_ms(),
        "client_cpu_share": client,
        "processes": processes,
    }


def text(found: dict[str, Any]) -> str:
    step, machine = found["step"], found["machine"]
    lines = [
        f"{found['steps']} steps of {found['rows']} rows: median {step['median_ms']:.2f} ms, p99 "
        f"{step['p99_over_median']:.2f} times as much (a process that sleeps beside them: "
        f"{machine['p99_over_median']:.2f}); device idle {found['idle_ms']:.2f} ms a step",
        "late: " + ", ".join(f"{cause} {share:.1%}" for cause, share in found["late"].items()),
    ]
    for process, counts in found["processes"].items():
        lines.append(f"{process}'s process: {counts['cpu_ms']:.2f} ms of CPU a step")
        for name, part in counts["parts"].items():
            lines.append(f"  {name:<10}{part['cpu_ms']:>7.2f} ms, waits {part['wait_ms']:.2f}")
    return "\n".join([*lines, f"A fixed loop of Python took {found['python_ms']:.1f} ms."])


def command() -> Command:
    parser = Command("bench.host", "Times what the host does for a step.")
    add = parser.add_argument
    add("--device-ms", type=float, default=6.0, help="a step of the device")
    add("--launch-ms", type=float, default=1.0, help="a call of a program, without the interpreter's lock")
    add("--streams", type=int, default=64, help="requests that decode together")
    add("--widths", type=ints, default=WIDTHS, metavar="N,N,...", help="branches of the requests, in turn")
    add("--prompt-tokens", type=int, default=256)
    add("--steps", type=int, default=600, help="tokens of each branch")
    add("--pages", type=int, default=4250, help="KV pages in the pool")
    add("--in-process", action="store_true", help="the engine in the server's process")
    return parser


def main(arguments: Sequence[str]) -> dict[str, Any]:
    options = command().parse_args(arguments)
    found = {**result.head(command().typed(arguments)), "options": asked_for(options), **measure(options)}
    return result.conclude(found, text(found), options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
