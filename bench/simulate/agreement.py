"""Simulates what bench.load.goodput measured on a real server, and says how near the simulator comes.

    python -m bench.simulate.agreement RESULT.json FOLDER --json OUT

Each row of the results is simulated with the same requests, times, targets and policy, several times with
other noise; what is compared is the mean. Steps are as late as the row says that those of its run were
(bench.simulate.lateness), or else as the profile says. The simulator is to be within 5 % of the goodput where
attainment is above 95 % or below 5 %, and within 5 points of attainment elsewhere, both by the stage measure,
for nine of ten rows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from bench.command import Command
from bench.load.measures import COLUMNS, Window, titles
from bench.load.runs import Run, reserved
from bench.load.workload import named
from bench.result import head, keep, ran_on, say, write
from bench.simulate.lateness import Lateness
from bench.simulate.profile import Profile, late_as
from bench.simulate.simulation import Setting, in_processes, simulate
from scheduler.request import Slo

FIGURES = ("goodput_stage", "attainment_stage", "goodput_mean", "raw_tokens_s", "mean_width", "e2e_p50_s")
NEAR = 0.05  # of goodput, or of all requests
SURE = 0.05  # distance of an attainment from 0 or 1 from which on goodput is what is compared
ENOUGH = 0.9  # of all rows


def settings(result: Mapping[str, Any], profile: Profile) -> list[tuple[Setting, str]]:
    """The setting and the policy of each row. Raises ValueError for requests that are not the result's."""
    window = Window(result["warmup_s"], result["warmup_s"] + result["window_s"], result["drain_s"])
    digests = {(point["load"], point["seed"]): point["sha256"] for point in result["points"]}
    found: list[tuple[Setting, str]] = []
    for row in result["rows"]:
        (workload, amount, closed, fork, reject), seed, policy = Run.of(result, row)
        load: dict[str, Any] = {"clients": int(amount)} if closed else {"rate": amount}
        requests = named(workload, seed, window.end + result["cooldown_s"], **load).scaled(result["scale"])
        if requests.digest != digests[amount, seed]:
            raise ValueError(f"{workload}, seed {seed}, is not what it was then")
        late = row.get("lateness")
        setting = Setting(
            profile=Lateness.of_json(late).on(profile) if late else profile,
            workload=requests,
            slo=Slo(tpot=result["tpot_slo_ms"] / 1e3, ttft=result["ttft_slo_s"], reject=reject),
            window=window,
            seed=seed,
            reserve=reserved(result),
            fork=fork,
        )
        found.append((setting, policy))
    return found


def compare(real: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the server and the simulator, on average, say of one policy at one point; whether they agree."""
    known = {name: [run[name] for run in runs if run[name] is not None] for name in FIGURES}
    simulated = {name: mean(values) if values else None for name, values in known.items()}
    attained, goodput = real["attainment_stage"], real["goodput_stage"]
    sure = attained is None or not SURE <= attained <= 1.0 - SURE
    off_goodput = simulated["goodput_stage"] / goodput - 1.0 if goodput else None
    off_attained = simulated["attainment_stage"] - attained if attained is not None else None
    off = off_goodput if sure else off_attained
    return {
        **{name: {"real": real[name], "simulated": simulated[name]} for name in FIGURES},
        "simulated_attainment": [end(known["attainment_stage"], default=None) for end in (min, max)],
        "goodput_off": off_goodput,
        "attainment_off": off_attained,
        "agrees": simulated["goodput_stage"] == 0.0 if off is None else abs(off) <= NEAR,
    }


WIDTH = 18


def line(row: Mapping[str, Any]) -> str:
    def pair(name: str) -> str:
        real, simulated = (COLUMNS[name].cell(row[name][which]) for which in ("real", "simulated"))
        return f"{real} / {simulated}"

    pairs = "".join(f"{pair(name):>{WIDTH}}" for name in FIGURES)
    says = "agrees" if row["agrees"] else "DIFFERS"
    return f"{row['run']:<52}{pairs}  {says}"


TITLES = f"{'run':<52}{titles(FIGURES, WIDTH)}   (real / simulated)"


def verdict(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The share of rows that agree, whether that is enough, and the others by name."""
    outside = [row["run"] for row in rows if not row["agrees"]]
    share = 1.0 - len(outside) / len(rows) if rows else 0.0
    return {"share": share, "enough": share >= ENOUGH, "outside": outside}


def text(found: Mapping[str, Any]) -> str:
    enough = "enough" if found["enough"] else "not enough"
    outside = "; outside: " + "; ".join(found["outside"]) if found["outside"] else ""
    return f"{found['share']:.0%} of {len(found['rows'])} rows agree, which is {enough}{outside}"


def files(paths: Sequence[Path]) -> list[Path]:
    """Of each path that is a folder, its results."""
    return [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]


def main(arguments: Sequence[str]) -> dict[str, Any]:
    parser = Command("bench.simulate.agreement", "Simulator against server.")
    parser.add_argument(
        "results", type=Path, nargs="+", help="files that bench.load.goodput wrote, or folders"
    )
    parser.add_argument("--profile", default="h200-qwen3-32b", help="a shipped profile's name, or a file")
    parser.add_argument("--step-log", type=Path, help="replay its lateness in place of the profile's noise")
    parser.add_argument("--runs", type=int, default=5, help="simulations of each row, with other noise")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    profile = late_as(Profile.load(options.profile), options.step_log)
    sources = files(options.results)
    names = [path.name for path in sources]
    found = {**head(parser.typed(arguments)), "profile": profile.name, "results": names, "rows": []}
    say(f"{ran_on(found)}\n{TITLES}", options.json)
    with in_processes(options.processes) as pool:
        for path in sources:
            result = json.loads(path.read_text())
            for real, (setting, policy) in zip(result["rows"], settings(result, profile), strict=True):
                noisy = [replace(setting, seed=number) for number in range(options.runs)]
                runs = [simulated for simulated, _ in pool.map(simulate, noisy, [policy] * options.runs)]
                of = {
                    "run": str(Run.of(result, real)),
                    **{key: real[key] for key in ("load", "seed", "policy")},
                }
                found["rows"].append(of | compare(real, runs))
                say(line(found["rows"][-1]), options.json)
                keep(found, options.json)
    found |= verdict(found["rows"])
    write(found, options.json)
    say(text(found), options.json)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
