"""Loads a running server, and reports what `vllm bench serve` would: the same names, the same definitions.

    python -m bench.load.serve --address HOST:PORT --num-prompts 64 --random-input-len 512
    python -m bench.load.serve --address HOST:PORT --workload fanout --request-rate 1.6 --goodput tpot:50

On the client's clock, of each request that was answered in full: TTFT is the time from sending to the first
token; E2EL, to the last; TPOT = (E2EL - TTFT) / (tokens - 1), where there are two tokens or more; ITL is each
gap between two messages of its stream (a message brings a token of every branch that advanced). Rates are per
second of `duration`, which ends with the last answer; request_goodput counts the requests whose metrics were
within all milliseconds of `--goodput`. Percentiles interpolate linearly. Of requests with branches also
`stage_tpot` and `critical_tpot`, as bench.load.measures defines them.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import shlex
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import result
from bench.load.driver import Answer, Reply, clock, connected, message, no_collections, play
from bench.load.workload import FAMILIES, Item, Workload, closed_loop, gamma
from serve.api.errors import ServiceError
from serve.client.client import AsyncClient

METRICS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
    "stage_tpot": "TPOT of the slowest stage",
    "critical_tpot": "TPOT of the slowest critical path",
}
GOODPUT = ("ttft", "tpot", "e2el")
TRIAL = Item(0.0, 8, ((2,),))


# --- figures -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Request:
    """A request that was answered in full; times in seconds."""

    parallel: bool
    prompt_tokens: int
    tokens: int
    ttft: float
    e2el: float
    itls: list[float]
    stage_tpot: float
    critical_tpot: float

    @classmethod
    def of(cls, item: Item, reply: Reply) -> Request | None:
        """None for one that failed, or ended before its time."""
        answer = Answer.of(reply)
        record = answer.record(item, arrival=reply.sent)
        if reply.error or not record.finished:
            return None
        return cls(
            item.parallel,
            answer.prompt_tokens,
            record.tokens,
            record.ttft,
            record.last - record.arrival,
            answer.gaps,
            record.stage_tpot,
            record.critical_tpot,
        )

    @property
    def tpot(self) -> float:
        """0 for a single token."""
        return (self.e2el - self.ttft) / (self.tokens - 1) if self.tokens > 1 else 0.0


def values(requests: Sequence[Request]) -> dict[str, list[float]]:
    """By metric, in seconds."""
    found = {
        "ttft": [request.ttft for request in requests],
        "tpot": [request.tpot for request in requests if request.tokens > 1],
        "itl": [gap for request in requests for gap in request.itls],
        "e2el": [request.e2el for request in requests],
    }
    parallel = [request for request in requests if request.parallel]
    if parallel:
        found["stage_tpot"] = [request.stage_tpot for request in parallel]
        found["critical_tpot"] = [request.critical_tpot for request in parallel]
    return found


def figures(
    requests: Sequence[Request],
    *,
    failed: int,
    duration: float,
    goodput: Mapping[str, float],
    percentiles: Sequence[float],
) -> dict[str, Any]:
    """The figures by name; None where there is nothing to take one of. `goodput` in milliseconds."""
    inputs = sum(request.prompt_tokens for request in requests)
    outputs = sum(request.tokens for request in requests)
    good = sum(all(1e3 * getattr(each, name) <= most for name, most in goodput.items()) for each in requests)
    found: dict[str, Any] = {
        "duration": duration,
        "completed": len(requests),
        "failed": failed,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(requests) / duration,
        "request_goodput": good / duration if goodput else None,
        "output_throughput": outputs / duration,
        "total_token_throughput": (inputs + outputs) / duration,
    }
    for name, seconds in values(requests).items():
        statistics = {"mean": np.mean, "median": np.median, "std": np.std}
        for kind, statistic in statistics.items():
            found[f"{kind}_{name}_ms"] = 1e3 * float(statistic(seconds)) if seconds else None
        for p in percentiles:
            found[f"p{p:g}_{name}_ms"] = 1e3 * float(np.percentile(seconds, p)) if seconds else None
    return found


def table(figures: Mapping[str, Any], percentiles: Sequence[float]) -> str:
    """Laid out as `vllm bench serve` does."""

    def line(title: str, value: float | None) -> str:
        shown = "-" if value is None else str(value) if isinstance(value, int) else f"{value:.2f}"
        return f"{title:<40} {shown}"

    lines = [
        f"{' Serving Benchmark Result ':=^50}",
        line("Successful requests:", figures["completed"]),
        line("Failed requests:", figures["failed"]),
        line("Benchmark duration (s):", figures["duration"]),
        line("Total input tokens:", figures["total_input_tokens"]),
        line("Total generated tokens:", figures["total_output_tokens"]),
        line("Request throughput (req/s):", figures["request_throughput"]),
        line("Request goodput (req/s):", figures["request_goodput"]),
        line("Output token throughput (tok/s):", figures["output_throughput"]),
        line("Total token throughput (tok/s):", figures["total_token_throughput"]),
    ]
    for name, title in METRICS.items():
        if f"mean_{name}_ms" in figures:
            lines.append(f"{title:-^50}")
            for kind in ("mean", "median", *(f"p{p:g}" for p in percentiles)):
                title = f"{kind.capitalize()} {name.upper().replace('_', ' ')} (ms):"
                lines.append(line(title, figures[f"{kind}_{name}_ms"]))
    return "\n".join([*lines, "=" * 50])


# --- the load ----------------------------------------------------------------------------------------------


def random_items(count: int, prompt: int, output: int, ratio: float, seed: int) -> list[Item]:
    """Serial requests with lengths drawn evenly from (1 - ratio) to (1 + ratio) times those given."""
    rng = np.random.default_rng(seed)

    def lengths(mean: int) -> list[int]:
        low, high = max(1, math.floor(mean * (1 - ratio))), math.ceil(mean * (1 + ratio))
        return rng.integers(low, high, size=count, endpoint=True).tolist()

    pairs = zip(lengths(prompt), lengths(output), strict=True)
    return [Item(0.0, prompt_tokens, ((tokens,),)) for prompt_tokens, tokens in pairs]


def gamma_arrivals(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds from the start, stretched so that the last of `count` requests arrives at count / rate."""
    if math.isinf(rate):
        return [0.0] * count
    gaps = gamma(np.random.default_rng([seed, 1]), rate, burstiness)
    times = [next(gaps) for _ in range(count)]
    return [at * count / rate / times[-1] for at in times]


def load(options: argparse.Namespace) -> tuple[list[Item], list[float]]:
    """The requests, and when each is due in seconds: a file's own times unless a rate is asked for."""
    count, rate = options.num_prompts, options.request_rate
    if options.workload is None:
        lengths = options.random_input_len, options.random_output_len, options.random_range_ratio
        items = random_items(count, *lengths, options.seed)
    elif options.workload in FAMILIES:
        items = [*closed_loop(options.workload, 1, count, options.seed).items]
    else:
        items = [*Workload.load(Path(options.workload)).items[:count]]
        if rate is None:
            return items, [item.arrival for item in items]
    return items, gamma_arrivals(len(items), rate or math.inf, options.burstiness, options.seed)


# --- the run -----------------------------------------------------------------------------------------------


async def run(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """The whole result. Raises ServiceError where the server does not answer, or refuses a trial request."""
    items, arrivals = load(options)
    items = [item.scaled(options.scale) for item in items]
    async with AsyncClient(options.address) as client, connected(options.address) as driver:
        server = await result.describe_server(client)
        salt = uuid.uuid4().hex

        def spell(item: Item, seed: int) -> bytes:
            return message(item, f"{salt}-{seed}", seed, server["vocab_size"], salt=salt)

        trial = Reply(clock())
        await driver.ask(spell(TRIAL, len(items)), trial)
        if trial.error:
            raise ServiceError(f"a trial request failed: {trial.error}")
        requests = [spell(item, seed) for seed, item in enumerate(items)]
        with progress(len(items)) as advance, no_collections():
            began, cpu = clock(), time.process_time()
            replies = await play(
                driver, requests, arrivals, max_concurrency=options.max_concurrency, on_reply=advance
            )
            duration, cpu = clock() - began, time.process_time() - cpu
    answered = [Request.of(item, reply) for item, reply in zip(items, replies, strict=True)]
    complete = [request for request in answered if request is not None]
    errors = Counter(
        reply.error or "ended before its time"
        for reply, request in zip(replies, answered, strict=True)
        if request is None
    )
    found = figures(
        complete,
        failed=len(items) - len(complete),
        duration=duration,
        goodput=dict(options.goodput),
        percentiles=options.metric_percentiles,
    )
    if options.save_detailed:
        found |= {
            "input_lens": [request.prompt_tokens for request in complete],
            "output_lens": [request.tokens for request in complete],
            "ttfts": [request.ttft for request in complete],
            "itls": [request.itls for request in complete],
        }
    asked = {key: value for key, value in vars(options).items() if key not in ("json", "save_detailed")}
    if options.request_rate == math.inf:
        asked["request_rate"] = "inf"  # as vLLM writes it: JSON has no infinity
    return {
        **result.head(command),
        "server": server,
        "options": asked,
        "client_cpu_share": cpu / duration,
        "errors": errors,
        **found,
    }


@contextmanager
def progress(total: int) -> Iterator[Callable[[Reply], None]]:
    """A bar of answered requests on a terminal, and what moves it."""
    columns = TextColumn("requests"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, refresh_per_second=4) as bar:
        task = bar.add_task("", total=total)
        yield lambda reply: bar.advance(task)


def target(text: str) -> tuple[str, float]:
    """`tpot:50` and the like."""
    name, _, milliseconds = text.partition(":")
    if name not in GOODPUT:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not one of {', '.join(GOODPUT)}, a colon and milliseconds"
        )
    return name, float(milliseconds)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.load.serve", description="Loads a running server.")
    add = parser.add_argument
    add("--address", default="127.0.0.1:50051", help="HOST:PORT")
    add("--num-prompts", type=int, default=1000, help="requests, at most those of a file")
    add("--random-input-len", type=int, default=1024, help="prompt tokens")
    add("--random-output-len", type=int, default=128, help="tokens of an answer")
    add("--random-range-ratio", type=float, default=0.0, help="how far lengths may lie from these, in [0, 1)")
    add("--workload", help=f"requests with branches instead: {', '.join(FAMILIES)}, or a workload file")
    add("--scale", type=float, default=1.0, help="factor of all lengths")
    add("--request-rate", type=float, help="per second; inf, unless set, or a file has times of its own")
    add("--burstiness", type=float, default=1.0, help="shape of the gamma-distributed gaps; 1 is Poisson")
    add("--max-concurrency", type=int, help="most requests at a time; none unless set")
    add("--goodput", type=target, nargs="*", default=[], metavar="NAME:MS", help="of ttft, tpot, e2el")
    add("--metric-percentiles", type=percentiles, default=[50.0, 90.0, 99.0], metavar="P,P,...")
    add("--seed", type=int, default=0)
    add("--save-detailed", action="store_true", help="also each request's own figures, in seconds")
    add("--json", help="a file, or - for standard output")
    return parser


def percentiles(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main(arguments: Sequence[str]) -> dict[str, Any]:
    options = parser().parse_args(arguments)
    try:
        found = asyncio.run(run(options, f"python -m bench.load.serve {shlex.join(arguments)}"))
    except (ServiceError, OSError, ValueError) as error:
        sys.exit(f"bench.load.serve: {error}")
    result.write(found, options.json)
    out = sys.stderr if options.json == "-" else sys.stdout
    print(table(found, options.metric_percentiles), file=out)
    print(f"The client took {found['client_cpu_share']:.0%} of a core.", file=out)
    for error, count in found["errors"].items():
        print(f"{count} failed: {error}", file=out)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
