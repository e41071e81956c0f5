"""Workloads: which requests arrive when, and how their answers branch; saved as files that can be replayed.

    python -m bench.load.workload --family fanout --rate 1.6 --arrivals bursty --seconds 600 --json OUT
    python -m bench.load.workload --family fanout --clients 40 --requests 600 --seed 1 --json OUT
    python -m bench.load.workload --family headline --seconds 105 --seed 1   # as the benchmarks name them

Lengths are part of the workload, so that every policy, and a model with random weights too, serves the same
tokens: a request's plan ends each stage by its limit alone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bench.command import Command
from bench.result import say
from scheduler.program import BranchSpec, ParallelStage, Plan, SerialStage, Stage
from scheduler.request import Request, Slo
from scheduler.sampling import SamplingParams
from scheduler.stopping import Stopping

FORMAT = 1
BURST_PERIOD, BURST_SECONDS, BURST, LULL = 45.0, 15.0, 1.6, 0.7
BRANCH_SEED = 5  # tokens forced at the head of a branch, as of "\n<Path>\n1:"
JOIN_SEED = 3  # and of what follows a join, as of "\n<Conclusion>\n"
END = 1  # the token that ends a branch whose limit does not
HEADLINE_RATE, HEADLINE_CLIENTS = 1.6, 40
REQUESTS_PER_SECOND = 10  # of a closed loop, at most: so many are prepared

Lengths = tuple[tuple[int, ...], ...]
Fork = Literal["server", "client"]  # who divides an answer into branches, and joins them


@dataclass(frozen=True, slots=True)
class Item:
    """One request.

    arrival  seconds from the start; 0 in a closed loop, where items are sent in order
    prompt   tokens
    stages   sampled tokens of each stage of the trunk, in order: one number is a serial stage, more are the
             branches of a parallel one
    join     how a parallel stage is joined; `none` only where it is the last
    """

    arrival: float
    prompt: int
    stages: Lengths
    join: str = "kv"

    @property
    def parallel(self) -> bool:
        return any(len(stage) > 1 for stage in self.stages)

    @property
    def tokens(self) -> int:
        return sum(map(sum, self.stages))

    @property
    def critical_path(self) -> int:
        return sum(map(max, self.stages))

    def scaled(self, factor: float) -> Item:
        """With every length times `factor`, at least 1."""

        def length(tokens: int) -> int:
            return max(1, round(factor * tokens))

        stages = tuple(tuple(map(length, stage)) for stage in self.stages)
        return replace(self, prompt=length(self.prompt), stages=stages)

    def request(
        self, id: str, slo: Slo, seed: int, vocab_size: int = 32_000, *, limits: float = 1.0
    ) -> Request:
        """The request, with a random prompt and random seeds of branches drawn from `seed`.

        Branches end by their limit, which is their length; with larger `limits`, in times their length, END
        must be sampled after their last token.
        """
        rng = np.random.default_rng(seed)
        ends = frozenset({END}) if limits > 1.0 else frozenset()

        def stopping(length: int) -> Stopping:
            return Stopping(max_tokens=math.ceil(limits * length), eos_ids=ends)

        def ids(count: int) -> tuple[int, ...]:
            return tuple(rng.integers(vocab_size, size=count).tolist())

        stages: list[Stage] = []
        joined = False
        for lengths in self.stages:
            first, *others = lengths
            if others:
                specs = [BranchSpec(stopping=stopping(length), prefix=ids(BRANCH_SEED)) for length in lengths]
                stages.append(ParallelStage(branches=tuple(specs), join=self.join))
            else:
                prefix = ids(JOIN_SEED) if joined else ()
                stages.append(SerialStage(stopping=stopping(first), prefix=prefix))
            joined = bool(others)
        return Request(
            id=id,
            prompt=ids(self.prompt),
            program=Plan(stages=tuple(stages)),
            sampling=SamplingParams(seed=seed),
            slo=slo,
        )


ALONE = Item(0.0, 800, ((400,),))  # one serial request: what it gets by itself is what targets follow from
TPOT_SLO_MULTIPLE = 2.0  # of its TPOT
TTFT_SLO = 5.0  # seconds

# --- families ----------------------------------------------------------------------------------------------


def lognormal(rng: np.random.Generator, mean: float, sigma: float, most: int | None = None) -> int:
    """A length of at least one token, from the lognormal distribution with that mean; `most` cuts it off."""
    length = max(1, round(rng.lognormal(math.log(mean) - sigma**2 / 2, sigma)))
    return length if most is None else min(length, most)


Draw = Callable[[np.random.Generator], tuple[int, Lengths]]


def _branches(
    rng: np.random.Generator, counts: Sequence[int], mean: float, sigma: float, **cut: int
) -> tuple[int, ...]:
    return tuple(lognormal(rng, mean, sigma, **cut) for _ in range(int(rng.choice(counts))))


def fanout(rng: np.random.Generator) -> tuple[int, Lengths]:
    """80 % parallel, once and widely."""
    prompt = lognormal(rng, 800, 0.6)
    if rng.random() >= 0.8:
        return prompt, ((lognormal(rng, 400, 0.6),),)
    head = lognormal(rng, 80, 0.4)
    branches = _branches(rng, (8, 12, 16, 24, 32), 200, 0.5)
    return prompt, ((head,), branches, (lognormal(rng, 120, 0.4),))


def mixed(rng: np.random.Generator) -> tuple[int, Lengths]:
    """50 % parallel, one to three times; the others as in `fanout`."""
    prompt = lognormal(rng, 500, 0.6)
    if rng.random() >= 0.5:
        return prompt, ((lognormal(rng, 400, 0.6),),)
    stages: list[tuple[int, ...]] = []
    for _ in range(int(rng.choice((1, 1, 2, 3)))):
        stages += [
            (lognormal(rng, 100, 0.5),),
            _branches(rng, (2, 3, 4, 5, 6, 8, 10, 12), 200, 0.5),
        ]
    return prompt, (*stages, (lognormal(rng, 80, 0.5),))


def reasoning(rng: np.random.Generator) -> tuple[int, Lengths]:
    """70 % parallel, two to four times, with long stages of at most 1500 tokens."""
    prompt = lognormal(rng, 300, 0.5)

    def serial(mean: float = 250.0) -> tuple[int, ...]:
        return (lognormal(rng, mean, 0.5, 1500),)

    if rng.random() >= 0.7:
        return prompt, (serial(1000.0),)
    stages: list[tuple[int, ...]] = [serial()]
    for _ in range(int(rng.choice((2, 3, 4)))):
        stages += [_branches(rng, (3, 4, 6, 8), 300, 0.5, most=1500), serial()]
    return prompt, tuple(stages)


def light(rng: np.random.Generator) -> tuple[int, Lengths]:
    """The duty of real Multiverse outputs: few short branches between long serial stages."""
    prompt = lognormal(rng, 300, 0.5)
    branches = _branches(rng, (2, 3, 4), 100, 0.5)
    return prompt, ((lognormal(rng, 600, 0.5),), branches, (lognormal(rng, 400, 0.5),))


def best_of_n(rng: np.random.Generator) -> tuple[int, Lengths]:
    """50 % want several answers to one prompt, the others one."""
    prompt = lognormal(rng, 500, 0.6)
    count = int(rng.choice((4, 8, 16))) if rng.random() < 0.5 else 1
    return prompt, (tuple(lognormal(rng, 300, 0.5) for _ in range(count)),)


def azure_conv(rng: np.random.Generator) -> tuple[int, Lengths]:
    """Serial requests like those of the Azure LLM inference trace 2023, conversation (19,366 in 3,502 s).

    Published: medians of 1020 prompt and 129 output tokens (Patel et al., Splitwise, ISCA 2024, section III);
    5.47 prompt tokens for each output token over the whole trace (github.com/Azure/AzurePublicDataset).
    Assumed: lognormal and independent lengths, sigma 1 for outputs (mean 213); then the ratio asks for 0.513
    for prompts (mean 1163). The trace's own modes, and how its lengths hang together, are lost.
    """
    return lognormal(rng, 1163, 0.513), ((lognormal(rng, 213, 1.0),),)


FAMILIES: dict[str, Draw] = {
    "fanout": fanout,
    "mixed": mixed,
    "reasoning": reasoning,
    "light": light,
    "best-of-n": best_of_n,
    "azure-conv": azure_conv,
}

# --- arrivals ----------------------------------------------------------------------------------------------


def poisson(rng: np.random.Generator, rate: float) -> Iterator[float]:
    """Arrival times in seconds, `rate` a second."""
    now = 0.0
    while True:
        now += rng.exponential(1.0 / rate)
        yield now


def bursty(rng: np.random.Generator, rate: float) -> Iterator[float]:
    """Poisson arrivals at 1.6 times the rate in the first 15 of each 45 seconds, at 0.7 times after them."""
    in_burst = BURST * BURST_SECONDS
    in_period = in_burst + LULL * (BURST_PERIOD - BURST_SECONDS)
    for expected in poisson(rng, 1.0):  # arrivals expected until then
        periods, rest = divmod(expected / rate, in_period)
        within = rest / BURST if rest <= in_burst else BURST_SECONDS + (rest - in_burst) / LULL
        yield periods * BURST_PERIOD + within


def gamma(rng: np.random.Generator, rate: float, burstiness: float) -> Iterator[float]:
    """Gamma-distributed gaps: the variance of a gap is its squared mean over `burstiness`; 1 is Poisson."""
    now = 0.0
    while True:
        now += rng.gamma(burstiness, 1.0 / (rate * burstiness))
        yield now


def azure_arrivals(rng: np.random.Generator, rate: float) -> Iterator[float]:
    """Gaps as uneven as those of the trace's time stamps: their squared coefficient of variation is 1.20.

    The trace's own rate is 5.53 a second; its slow drift is left out.
    """
    return gamma(rng, rate, burstiness=1 / 1.20)


ARRIVALS = {"poisson": poisson, "bursty": bursty, "azure-conv": azure_arrivals}

# --- workloads ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Workload:
    """Items in order of arrival. `clients`: a closed loop of so many, each with one request at a time."""

    family: str
    arrivals: str
    seed: int
    items: tuple[Item, ...]
    rate: float | None = None
    seconds: float | None = None
    clients: int | None = None

    def statistics(self) -> dict[str, float | None]:
        """Means over requests; `branches` is the mean over parallel stages (None where there are none)."""
        parallel = [len(stage) for item in self.items for stage in item.stages if len(stage) > 1]
        count = len(self.items)
        means = {
            "prompt_tokens": sum(item.prompt for item in self.items),
            "output_tokens": sum(item.tokens for item in self.items),
            "critical_path": sum(item.critical_path for item in self.items),
            "share_parallel": sum(item.parallel for item in self.items),
        }
        offered = sum(item.tokens for item in self.items) / self.seconds if self.seconds else None
        return {
            "requests": count,
            **{name: total / count if count else None for name, total in means.items()},
            "branches": sum(parallel) / len(parallel) if parallel else None,
            "output_tokens_s": offered,
        }

    def scaled(self, factor: float) -> Workload:
        """The same shape for a smaller model."""
        return replace(self, items=tuple(item.scaled(factor) for item in self.items))

    @property
    def text(self) -> str:
        """What is in its file."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, allow_nan=False)
        return text.replace('{"arrival"', '\n{"arrival"') + "\n"

    @property
    def digest(self) -> str:
        """SHA-256 of its file: results of equal digests are of the same requests at the same times."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def save(self, path: Path) -> None:
        path.write_text(self.text)

    @classmethod
    def load(cls, path: Path) -> Workload:
        """Raises ValueError for a file that is no workload."""
        record: dict[str, Any] = json.loads(path.read_text())
        if record.pop("format", None) != FORMAT:
            raise ValueError(f"{path} is not a workload file of format {FORMAT}")
        items = [
            Item(item["arrival"], item["prompt"], tuple(map(tuple, item["stages"])), item["join"])
            for item in record.pop("items")
        ]
        return cls(**record, items=tuple(items))


def open_loop(family: str, arrivals: str, rate: float, seconds: float, seed: int) -> Workload:
    """Requests that arrive within `seconds`, `rate` a second on average."""
    at, lengths = (np.random.default_rng([seed, stream]) for stream in range(2))
    times = itertools.takewhile(lambda now: now < seconds, ARRIVALS[arrivals](at, rate))
    items = tuple(_item(family, lengths, round(now, 6)) for now in times)
    return Workload(family, arrivals, seed, items, rate=rate, seconds=seconds)


def closed_loop(family: str, clients: int, requests: int, seed: int) -> Workload:
    """Clients that send their next request when they have read the answer to the one before."""
    lengths = np.random.default_rng([seed, 1])
    items = tuple(_item(family, lengths, 0.0) for _ in range(requests))
    return Workload(family, "closed", seed, items, clients=clients)


def named(
    name: str,
    seed: int,
    seconds: float,
    *,
    arrivals: str | None = None,
    rate: float | None = None,
    clients: int | None = None,
) -> Workload:
    """The workload that lasts for `seconds`, by the name that the benchmarks know it by.

    headline         fanout, bursty arrivals, 1.6 a second
    headline-closed  fanout, a closed loop of 40 clients
    a family         with these arrivals (bursty, or its own), or clients in a closed loop
    a path           of a file, which has a seed, arrivals and clients of its own

    Raises ValueError for a file that is asked to be different, OSError for one that is not there.
    """
    if name == "headline-closed":
        name, clients = "fanout", clients or HEADLINE_CLIENTS
    elif name == "headline":
        name = "fanout"
    if name not in FAMILIES:
        if rate or clients or arrivals:
            raise ValueError(f"{name} has arrivals of its own")
        return Workload.load(Path(name))
    if clients is not None:
        return closed_loop(name, clients, math.ceil(REQUESTS_PER_SECOND * seconds), seed)
    own = name if name in ARRIVALS else "bursty"
    return open_loop(name, arrivals or own, rate or HEADLINE_RATE, seconds, seed)


def _item(family: str, rng: np.random.Generator, arrival: float) -> Item:
    prompt, stages = FAMILIES[family](rng)
    return Item(arrival, prompt, stages, "none" if len(stages[-1]) > 1 else "kv")


def table(workload: Workload) -> str:
    lines = [f"{workload.family}, {workload.arrivals} arrivals, seed {workload.seed}"]
    for name, value in workload.statistics().items():
        lines.append(f"{name.replace('_', ' '):<16}{'-' if value is None else f'{value:.6g}':>10}")
    lines.append(f"SHA-256 {workload.digest}")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> Workload:
    parser = Command("bench.load.workload", "Makes a workload file.")
    parser.add_argument("--family", choices=("headline", "headline-closed", *FAMILIES), default="fanout")
    parser.add_argument("--arrivals", choices=ARRIVALS, help="bursty, or the family's own")
    parser.add_argument("--rate", type=float, help="requests per second, 1.6 unless set")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, help="a closed loop of so many clients instead of arrivals")
    parser.add_argument("--requests", type=int, help="of a closed loop, instead of 10 a second")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all lengths, for a smaller model")
    options = parser.parse_args(arguments)
    seconds = options.requests / REQUESTS_PER_SECOND if options.requests else options.seconds
    asked = {"arrivals": options.arrivals, "rate": options.rate, "clients": options.clients}
    workload = named(options.family, options.seed, seconds, **asked).scaled(options.scale)
    if options.json == "-":
        print(workload.text, end="")
    elif options.json is not None:
        workload.save(Path(options.json))
    say(table(workload), options.json)
    return workload


if __name__ == "__main__":
    main(sys.argv[1:])
