"""Compares policies in simulation: one row for each, with the requests, times and targets the same.

    python -m bench.simulate --profile h200-qwen3-32b --workload headline \\
        --policies off,cap:2,cap:4,cap:6,cap:8,eager,taper --json -

Requests that arrive within the window are measured, all of them, and served to their end; those before it
warm the server up, those after it keep up the load. Targets follow by rule: TTFT 5 s; TPOT twice what one
request alone gets under the same profile. With --step-log, steps are late as those of a server were that
wrote the log: what a policy attains on that server's host. Measures are those of bench.load.measures.
"""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.command import Command, names
from bench.load.measures import COLUMNS, Window, cells, titles
from bench.load.workload import TTFT_SLO, named
from bench.progress import tracked
from bench.result import conclude, head, keep
from bench.simulate.profile import Profile, late_as
from bench.simulate.simulation import Setting, in_processes, simulate, targets
from scheduler.config import RESERVE
from scheduler.controller import ControllerConfig
from scheduler.request import Slo
from serve.lateness import CAUSES

WARMUP, WINDOW, COOLDOWN = 45.0, 45.0, 15.0  # seconds
OF_A_SERVER = {"gap_p99_ms", *(f"late_{cause}" for cause in CAUSES)}
FIGURES = [figure for figure in COLUMNS if figure not in {"e2e_p99_s", *OF_A_SERVER}]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"{'policy':<24}{titles(FIGURES)}"]
    return "\n".join([*lines, *(f"{each['policy']:<24}{cells(each, FIGURES)}" for each in rows)])


def command() -> Command:
    parser = Command("bench.simulate", "Compares policies.")
    add = parser.add_argument
    add("--profile", default="h200-qwen3-32b", help="a shipped profile's name, or a file")
    add("--workload", default="headline", help="headline, headline-closed, or a file")
    add("--policies", type=names, default="off,cap:2,cap:4,cap:6,cap:8,eager,taper")
    add("--seed", type=int, default=1)
    parser.add_window(warmup=WARMUP, window=WINDOW, cooldown=COOLDOWN, drain=math.inf)
    add("--rate", type=float, help="requests per second, instead of the workload's own")
    add("--clients", type=int, help="clients of a closed loop, instead of arrivals")
    add("--tpot-slo", type=float, help="seconds, instead of twice the unloaded TPOT")
    add("--fork", choices=["server", "client"], default="server", help="who branches and joins answers")
    add("--reserve", type=float, default=RESERVE, help="as of taper-serve")
    add("--reject-late", action="store_true", help="requests would rather be refused than late")
    add("--controller", default="{}", help="fields of ControllerConfig, as JSON")
    add("--max-chunk", type=int, default=512)
    add("--prompt-floor", type=int, default=32)
    add("--exact", action="store_true", help="without the profile's noise")
    add("--step-log", type=Path, help="replay the lateness of a server's steps in place of the noise")
    add("--page", type=int, help="tokens of a KV page, instead of the profile's")
    add("--processes", type=int, default=2)
    return parser


def setting_of(options: Namespace) -> Setting:
    """What all policies have in common. Raises ValueError, OSError for a profile or workload that is none."""
    profile = Profile.load(options.profile)
    profile = late_as(profile.exact() if options.exact else profile, options.step_log)
    if options.page is not None:
        tokens = profile.num_pages * profile.page_size
        profile = replace(profile, page_size=options.page, num_pages=tokens // options.page)
    window = Window(options.warmup, options.warmup + options.window, options.drain)
    seconds, asked = window.end + options.cooldown, {"rate": options.rate, "clients": options.clients}
    slo = Slo(tpot=options.tpot_slo, ttft=TTFT_SLO) if options.tpot_slo else targets(profile)
    return Setting(
        profile=profile,
        workload=named(options.workload, options.seed, seconds, **asked),
        slo=replace(slo, reject=options.reject_late),
        window=window,
        seed=options.seed,
        fork=options.fork,
        reserve=options.reserve,
        controller=replace(
            ControllerConfig(**json.loads(options.controller)),
            max_chunk=options.max_chunk,
            prompt_floor=options.prompt_floor,
        ),
    )


def main(arguments: Sequence[str]) -> dict[str, Any]:
    options = command().parse_args(arguments)
    setting = setting_of(options)
    policies = options.policies
    result: dict[str, Any] = {
        **head(command().typed(arguments)),
        "profile": setting.profile.name,
        "step_log": options.step_log and options.step_log.name,
        "workload": options.workload,
        "fork": options.fork,
        "reserve": options.reserve,
        "seed": options.seed,
        "tpot_slo_ms": 1e3 * setting.slo.tpot,
        "ttft_slo_s": setting.slo.ttft,
        "page_size": setting.profile.page_size,
        "warmup_s": options.warmup,
        "window_s": options.window,
        "drain_s": options.drain if math.isfinite(options.drain) else None,
        "statistics": setting.workload.statistics(),
        "rows": [],
    }
    costs: list[str] = []
    with in_processes(min(options.processes, len(policies))) as pool:
        simulated = pool.map(partial(simulate, setting), policies)
        for policy, (row, cost) in zip(policies, tracked(simulated, "policies", len(policies)), strict=True):
            result["rows"].append(row)
            costs.append(f"{policy:<10}" + ", ".join(f"{key} {value:.4g}" for key, value in cost.items()))
            keep(result, options.json)
    return conclude(result, "\n".join([table(result["rows"]), *costs]), options.json)
