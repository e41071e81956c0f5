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
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from bench import result
from bench.command import Command, floats
from bench.load.driver import Answer, Reply, connected, message, play
from bench.load.measures import Record, milliseconds, quantile
from bench.load.workload import FAMILIES, Item, Workload, closed_loop, gamma
from bench.progress import progress
from bench.timing import clock, no_collections
from taper_client import AsyncClient
from taper_client.errors import ServiceError

METRICS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
    "stage_tpot": "TPOT of the slowest stage",
    "critical_tpot": "TPOT of the slowest critical path",
}
TRIAL = Item(0.0, 8, ((2,),))


# --- figures -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answered:
    """A request that was answered in full: as its client saw it, and seconds between its messages."""

    record: Record
    prompt_tokens: int
    gaps: list[float]

    @classmethod
    def of(cls, item: Item, reply: Reply) -> Answered | None:
        """None for one that failed, or ended before its time."""
        answer = Answer.of(reply)
        record = answer.record(item, arrival=reply.sent)
        whole = record.finished and not reply.error
        return cls(record, answer.prompt_tokens, answer.gaps) if whole else None


TARGETS: dict[str, Callable[[Record], float]] = {  # what --goodput may ask for, in seconds
    "ttft": attrgetter("ttft"),
    "tpot": attrgetter("mean_tpot"),
    "e2el": attrgetter("latency"),
}


def values(requests: Sequence[Answered]) -> dict[str, list[float]]:
    """By metric, in seconds."""
    records = [request.record for request in requests]
    found = {
        "ttft": [record.ttft for record in records],
        "tpot": [record.mean_tpot for record in records if record.tokens > 1],
        "itl": [gap for request in requests for gap in request.gaps],
        "e2el": [record.latency for record in records],
    }
    parallel = [record for record in records if record.item.parallel]
    if parallel:
        found["stage_tpot"] = [record.stage_tpot for record in parallel]
        found["critical_tpot"] = [record.critical_tpot for record in parallel]
    return found


def figures(
    requests: Sequence[Answered],
    *,
    failed: int,
    duration: float,
    goodput: Mapping[str, float],
    percentiles: Sequence[float],
) -> dict[str, Any]:
    """The figures by name; None where there is nothing to take one of. `goodput` in milliseconds."""
    inputs = sum(request.prompt_tokens for request in requests)
    outputs = sum(request.record.tokens for request in requests)
    good = sum(
        all(1e3 * TARGETS[name](each.record) <= most for name, most in goodput.items()) for each in requests
    )
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
            found[f"p{p:g}_{name}_ms"] = milliseconds(quantile(seconds, p / 100))
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What was sent and what came back. `seconds`: to the last answer; `cpu_share`: of the client's core."""

    server: dict[str, Any]
    items: Sequence[Item]
    replies: Sequence[Reply]
    seconds: float
    cpu_share: float


async def played(options: argparse.Namespace) -> Played:
    """Send everything. Raises ServiceError where the server does not answer, or refuses a trial request."""
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
        with progress("requests", len(items)) as advance, no_collections():
            began, cpu = clock(), time.process_time()
            replies = await play(
                driver,
                requests,
                arrivals,
                max_concurrency=options.max_concurrency,
                on_reply=lambda reply: advance(),
            )
            seconds, cpu = clock() - began, time.process_time() - cpu
    return Played(server=server, items=items, replies=replies, seconds=seconds, cpu_share=cpu / seconds)


def report(options: argparse.Namespace, run: Played, typed: str) -> dict[str, Any]:
    """The whole result."""
    answered = [Answered.of(item, reply) for item, reply in zip(run.items, run.replies, strict=True)]
    complete = [request for request in answered if request is not None]
    errors = Counter(
        reply.error or "ended before its time"
        for reply, request in zip(run.replies, answered, strict=True)
        if request is None
    )
    found = figures(
        complete,
        failed=len(run.items) - len(complete),
        duration=run.seconds,
        goodput=dict(options.goodput),
        percentiles=options.metric_percentiles,
    )
    if options.save_detailed:
        found |= {
            "input_lens": [request.prompt_tokens for request in complete],
            "output_lens": [request.record.tokens for request in complete],
            "ttfts": [request.record.ttft for request in complete],
            "itls": [request.gaps for request in complete],
        }
    asked = {key: value for key, value in vars(options).items() if key not in ("json", "save_detailed")}
    if options.request_rate == math.inf:
        asked["request_rate"] = "inf"  # as vLLM writes it: JSON has no infinity
    return {
        **result.head(typed),
        "server": run.server,
        "options": asked,
        "client_cpu_share": run.cpu_share,
        "errors": errors,
        **found,
    }


def target(text: str) -> tuple[str, float]:
    """`tpot:50` and the like."""
    name, _, milliseconds = text.partition(":")
    if name not in TARGETS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not one of {', '.join(TARGETS)}, a colon and milliseconds"
        )
    return name, float(milliseconds)


def command() -> Command:
    parser = Command("bench.load.serve", "Loads a running server.")
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
    add("--metric-percentiles", type=floats, default=[50.0, 90.0, 99.0], metavar="P,P,...")
    add("--seed", type=int, default=0)
    add("--save-detailed", action="store_true", help="also each request's own figures, in seconds")
    return parser


def main(arguments: Sequence[str]) -> dict[str, Any]:
    options = command().parse_args(arguments)
    try:
        found = report(options, asyncio.run(played(options)), command().typed(arguments))
    except (ServiceError, OSError, ValueError) as error:
        sys.exit(f"bench.load.serve: {error}")
    lines = [table(found, options.metric_percentiles)]
    lines.append(f"The client took {found['client_cpu_share']:.0%} of a core.")
    lines += [f"{count} failed: {error}" for error, count in found["errors"].items()]
    return result.conclude(found, "\n".join(lines), options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
