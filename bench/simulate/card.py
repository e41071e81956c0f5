"""What policies do on a card, told in a quarter of a minute of simulation: the end of `make demo`.

The load is that of docs/results.md, with the seed that comes first there: its first half minute, which finds
an idle server and is served to its end. In so short a time no queue builds up, so that under `off` answers
are slow, but not late as they are there.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

from rich.table import Table

from bench.load.measures import Window
from bench.load.workload import named
from bench.simulate.profile import Profile
from bench.simulate.simulation import Setting, Simulation, targets
from bench.timing import no_collections

POLICIES = {"off": "one branch", "eager": "all branches", "taper": "what fits"}  # of an answer in a step
PROFILE = "h200-qwen3-32b"
RATE, SEED, SECONDS = 1.4, 1, 30.0
NEARLY = 1.05  # times as long is as fast


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a policy came to. Times are of the virtual clock.

    kept, asked     answers within their targets by the stage measure, of all
    answer_seconds  median time of an answer
    slowest_ms      the slowest stage TPOT of all answers
    width           branches of an answer that advance in a step, on average
    """

    policy: str
    kept: int
    asked: int
    answer_seconds: float
    slowest_ms: float
    width: float


def setting() -> Setting:
    """The load, the card and the targets."""
    profile = Profile.load(PROFILE)
    workload = named("headline", SEED, SECONDS, rate=RATE)
    return Setting(
        profile=profile, workload=workload, slo=targets(profile), window=Window(0.0, SECONDS), seed=SEED
    )


def outcome(setting: Setting, policy: str, on_answer: Callable[[], None] = lambda: None) -> Outcome:
    """Serves the load under one policy."""
    simulation = Simulation(setting, policy, on_answer=on_answer)
    with no_collections():
        simulation.serve()
    run = simulation.run()
    row = run.row()
    return Outcome(
        policy=policy,
        kept=sum(run.good("stage")),
        asked=len(run.records),
        answer_seconds=row["e2e_p50_s"],
        slowest_ms=1e3 * max(each.stage_tpot for each in run.records),
        width=row["mean_width"],
    )


def outcomes(setting: Setting, on_answer: Callable[[], None]) -> dict[str, Outcome]:
    """Of every policy, each in a process of its own. Raises EOFError if one of them dies."""
    spawn = multiprocessing.get_context("spawn")
    found: dict[str, Outcome] = {}
    told: list[Connection] = []
    for policy in POLICIES:
        here, there = spawn.Pipe(duplex=False)
        spawn.Process(target=_tell, args=(setting, policy, there), daemon=True).start()
        there.close()
        told.append(here)
    while len(found) < len(POLICIES):
        for each in wait(told):
            assert isinstance(each, Connection)
            said: Outcome | None = each.recv()
            if said is None:
                on_answer()
            else:
                found[said.policy] = said
                told.remove(each)
    return {policy: found[policy] for policy in POLICIES}


def _tell(setting: Setting, policy: str, there: Connection) -> None:
    there.send(outcome(setting, policy, on_answer=lambda: there.send(None)))


# --- words -------------------------------------------------------------------------------------------------


def described(setting: Setting) -> str:
    parallel = sum(item.parallel for item in setting.workload.items)
    return (
        "The scheduler is the real one, and its clock is virtual: a step takes what it took on the card"
        f" (profile {setting.profile.name}). In {setting.window.end:.0f} s come {len(setting.workload.items)}"
        f" requests (seed {setting.seed}), {parallel} of them with 8 to 32 branches. Each is promised a token"
        f" every {1e3 * setting.slo.tpot:.1f} ms in each part of its answer, and the first within"
        f" {setting.slo.ttft:.0f} s."
    )


def table(found: Sequence[Outcome]) -> Table:
    drawn = Table(title="Simulated: Qwen3-32B on one H200", title_style="bold", title_justify="left")
    drawn.add_column("policy")
    for title in TITLES:
        drawn.add_column(title, justify="right")
    for each in found:
        drawn.add_row(
            f"{each.policy}: {POLICIES[each.policy]}",
            f"{each.kept} of {each.asked}",
            f"{each.answer_seconds:.1f} s",
            f"{each.slowest_ms:.1f} ms",
            f"{each.width:.1f}",
            style="bold" if each.policy == "taper" else "",
        )
    return drawn


TITLES = ("promises\nkept", "an answer\ntakes, median", "a token of the\nslowest part", "branches\nat once")


def verdict(found: Mapping[str, Outcome]) -> str:
    """What the table says, whatever that is."""
    off, eager, taper = (found[policy] for policy in POLICIES)
    fast = taper.answer_seconds <= NEARLY * eager.answer_seconds
    punctual = taper.kept >= off.kept
    return (
        f"taper {'answers as fast as' if fast else 'is slower than'} eager ({taper.answer_seconds:.0f} s and"
        f" {eager.answer_seconds:.0f} s, where off takes {off.answer_seconds:.0f} s),"
        f" {'and' if fast == punctual else 'but'} keeps {'as many' if punctual else 'fewer'} promises"
        f" {'as' if punctual else 'than'} off ({taper.kept} and {off.kept} of {off.asked}, where eager keeps"
        f" {eager.kept})."
    )
