"""More than a server can serve, over a device that is none: `python -m bench.host.overload`.

    python -m bench.host.overload --factors 1,3,10 --json OUT

Requests come at a multiple of the rate that the server sustains, and would rather be refused than late. A row
for each factor: what was refused and how fast, whether those that were let in were in time, and the tokens of
these per second. Then a crowd of patient requests comes at once, and one that is not asks until it is let in:
did its first refusal say how long that would take?
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np

from bench import result
from bench.command import Command, asked_for, floats
from bench.host.processes import Setting
from bench.host.serving import MODEL, PROGRAM, VOCABULARY
from bench.load.driver import sleep_until
from bench.load.measures import quantile, share
from bench.server import started
from bench.timing import clock, python_ms
from taper_client import AsyncClient, Options
from taper_client.errors import OverloadedError
from taper_client.options import OnMiss

PROBE_SECONDS = 0.02  # between two questions whether there is room again


@dataclass(slots=True)
class Seen:
    """What became of the requests of one load.

    in_time   of each that was let in, whether it met its targets
    tokens    of those that did
    refusals  seconds until each refusal; named, the wait that each of them named
    """

    in_time: list[bool] = field(default_factory=list)
    tokens: int = 0
    refusals: list[float] = field(default_factory=list)
    named: list[float] = field(default_factory=list)


class Load:
    """Requests like one another to one server."""

    def __init__(self, client: AsyncClient, options: Any) -> None:
        self._client, self._options = client, options
        self._rng = np.random.default_rng(options.seed)

    @property
    def sustainable(self) -> float:
        """Requests a second that keep all rows of a step taken."""
        return self._options.rows / (1e-3 * self._options.device_ms * (self._options.tokens + 1))

    async def offer(self, factor: float) -> dict[str, Any]:
        """Poisson arrivals for so many seconds, and what became of them."""
        seconds, rate, start = self._options.seconds, factor * self.sustainable, clock()
        gaps = self._rng.exponential(1 / rate, int(2 * rate * seconds) + 10)
        due = [float(at) for at in np.cumsum(gaps) if at < seconds]
        seen = Seen()
        async with asyncio.TaskGroup() as calls:
            for at in due:
                await sleep_until(start + at)
                calls.create_task(self._ask(seen))
        return {
            "factor": factor,
            "offered_per_s": len(due) / seconds,
            "refused": len(seen.refusals) / len(due),
            "in_time": share(seen.in_time),
            "goodput": seen.tokens / seconds,
            "refusal_p50_ms": quantile([1e3 * each for each in seen.refusals], 0.5),
            "refusal_p99_ms": quantile([1e3 * each for each in seen.refusals], 0.99),
        }

    async def wait(self) -> dict[str, float]:
        """Seconds until one is let in behind a crowd, and as its first refusal named them."""
        seen = Seen()
        async with asyncio.TaskGroup() as calls:
            for _ in range(self._options.crowd):
                calls.create_task(self._ask(Seen(), on_miss="best_effort"))
            await asyncio.sleep(5 * PROBE_SECONDS)
            began = asked = clock()
            while not seen.in_time:
                asked = clock()
                await self._ask(seen)
                await asyncio.sleep(PROBE_SECONDS)
        return {"named_s": seen.named[0], "waited_s": asked - began}

    def _request(self, on_miss: OnMiss) -> tuple[list[int], Options]:
        options = self._options
        return self._rng.integers(0, VOCABULARY, options.prompt_tokens).tolist(), Options(
            max_tokens=options.tokens,
            ignore_eos=True,
            on_miss=on_miss,
            ttft_slo_ms=1e3 * options.ttft,
            tpot_slo_ms=options.device_ms * options.tpot,
        )

    async def _ask(self, seen: Seen, on_miss: OnMiss = "reject") -> None:
        prompt, wanted = self._request(on_miss)
        began = clock()
        try:
            answer = await self._client.complete(prompt, **wanted)
        except OverloadedError as error:
            seen.refusals.append(clock() - began)
            seen.named.append(error.retry_after or 0.0)
            return
        assert answer.timing is not None
        seen.in_time.append(answer.timing.ttft_slo_met and answer.timing.tpot_slo_met)
        seen.tokens += self._options.tokens * seen.in_time[-1]


async def measure(address: str, options: Any) -> dict[str, Any]:
    async with AsyncClient(address) as client:
        load = Load(client, options)
        await load.offer(min(options.factors))  # so that the server knows its pace
        return {"rows": [await load.offer(factor) for factor in options.factors], "wait": await load.wait()}


def text(rows: Sequence[dict[str, Any]], wait: dict[str, float]) -> str:
    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = ["load   offered/s  refused  in time  goodput, tok/s  refusal p50, p99 ms"]
    for row in rows:
        refusal = [cell(row[f"refusal_{each}_ms"], ".1f") for each in ("p50", "p99")]
        lines.append(
            f"x {row['factor']:<5g}{row['offered_per_s']:>9.1f}{row['refused']:>9.1%}"
            f"{cell(row['in_time'], '.1%'):>9}{row['goodput']:>16.0f}{', '.join(refusal):>21}"
        )
    named, waited = wait["named_s"], wait["waited_s"]
    return "\n".join(
        [*lines, f"Behind a crowd, a wait of {named:.2f} s was named, and it took {waited:.2f} s."]
    )


def command() -> Command:
    parser = Command("bench.host.overload", "More than a server can serve.")
    add = parser.add_argument
    add("--factors", type=floats, default=[1.0, 3.0, 10.0], help="times the rate that it sustains")
    add("--seconds", type=float, default=20.0, help="of each load")
    add("--device-ms", type=float, default=20.0, help="a step of the device")
    add("--rows", type=int, default=16, help="of a step: so many requests run at once")
    add("--crowd", type=int, default=64, help="requests that come at once and wait")
    add("--prompt-tokens", type=int, default=16)
    add("--tokens", type=int, default=48)
    add("--ttft", type=float, default=1.0, help="seconds to the first token, at most")
    add("--tpot", type=float, default=3.0, help="steps between two tokens, at most")
    add("--seed", type=int, default=1)
    return parser


def main(arguments: Sequence[str]) -> dict[str, Any]:
    options = command().parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(device_ms=options.device_ms, launch_ms=1.0, folder=folder, requests=options.rows)
        serving = ["--model", MODEL, "--num-pages", "2000", "--max-queue", "64"]
        serving += ["--buckets", str(options.rows)]
        with (
            patch.dict(os.environ, setting.environment),
            started(serving, program=PROGRAM) as server,
        ):
            measured = asyncio.run(measure(server.address, options))
    head = result.head(command().typed(arguments))
    found = {**head, "python_ms": python_ms(), "options": asked_for(options), **measured}
    return result.conclude(found, text(**measured), options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
