"""The load of the invariance tests: every kind of program and of sampling, in one batch."""

from __future__ import annotations

from scheduler.program import BranchSpec, ParallelStage, Plan, SerialStage
from scheduler.request import Request, Slo
from scheduler.sampling import SamplingParams
from scheduler.stopping import Stopping

SMALL_POOL = 40  # pages: hardly more than the largest request needs
SYSTEM = tuple(range(40, 61))  # five full pages that several prompts begin with

SAMPLINGS = {
    "greedy": SamplingParams(),
    "seeded": SamplingParams(temperature=1.0, seed=11),
    "nucleus": SamplingParams(temperature=0.9, top_p=0.8, top_k=40, min_p=0.01, seed=2**40 + 5),
    "penalized": SamplingParams(
        temperature=0.7, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2, seed=3
    ),
    "biased": SamplingParams(logit_bias=((17, 1.5), (90, -100.0)), frequency_penalty=0.5),
}


def stopping(max_tokens: int, **more: object) -> Stopping:
    return Stopping(max_tokens=max_tokens, **more)  # type: ignore[arg-type]


def serial(tokens: int, prefix: tuple[int, ...] = (), **more: object) -> SerialStage:
    return SerialStage(prefix=prefix, stopping=stopping(tokens, **more))


def parallel(join: str, *lengths: int, seeds: bool = True, stages: tuple = ()) -> ParallelStage:
    """Branches of the given lengths; the first goes through `stages` afterwards."""
    return ParallelStage(
        join=join,
        branches=tuple(
            BranchSpec(
                label=str(index),
                prefix=(20 + index, 30 + index) if seeds else (),
                stopping=stopping(length),
                stages=stages if index == 0 else (),
            )
            for index, length in enumerate(lengths)
        ),
    )


PLANS = {
    "serial": (serial(18),),
    "stops": (serial(30, stop_ids=frozenset(range(0, 131, 9))), serial(6, (33, 34))),
    "kv": (serial(5), parallel("kv", 7, 4, 12, 5), serial(8, (35, 36))),
    "reprefill": (serial(4), parallel("reprefill", 6, 9, 3), serial(7)),
    "best_of": (parallel("none", 8, 8, 8, 8, 8, seeds=False),),
    "nested": (
        serial(3),
        parallel("kv", 4, 6, 5, stages=(parallel("kv", 3, 5), serial(3, (37,)))),
        serial(5, (38,)),
        parallel("reprefill", 4, 4, seeds=False),
        serial(4),
    ),
    "two_rounds": (parallel("kv", 5, 3), parallel("reprefill", 4, 2), serial(5)),
}


def load(slo: Slo) -> list[Request]:
    """One request for each plan, under changing samplings; half of the prompts begin alike."""
    requests = []
    names = list(SAMPLINGS)
    for index, (name, stages) in enumerate(PLANS.items()):
        for turn in range(2):
            own = tuple(60 + (7 * index + 5 * turn + i) % 60 for i in range(3 + 4 * index))
            requests.append(
                Request(
                    id=f"{name}-{turn}",
                    prompt=(SYSTEM if turn else ()) + own,
                    program=Plan(stages=stages),
                    sampling=SAMPLINGS[names[(index + 2 * turn) % len(names)]],
                    slo=slo,
                )
            )
    return requests
