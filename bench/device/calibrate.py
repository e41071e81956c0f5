"""Measures what steps take on this device with a model, and fits the forms of the step-time predictor to it.

    python -m bench.device.calibrate --json OUT --profile PROFILE -- --model qwen3-32b --load-format random

The programs are those of a taper-serve with the options after "--".

Steps are made up: every bucket, just begun and full; KV from one page a row to most of the pool; branches in
groups of several widths over a shared prefix; without and with a prompt chunk beside them. A point is the
median of its rounds.

Every form is fitted by least squares of relative errors, no coefficient below zero. The paper's form is
`linear`, T = a + b n + c L, with each branch's whole context in L; `constant` is a mean cost per row. The
staircase counts KV that is read together once, and adds a little for every row that reads it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bench import hardware
from bench.command import Command, split
from bench.device.probe import probe, shapes
from bench.progress import waiting
from bench.result import head, ran_on, say, write
from bench.timing import clock
from scheduler.predictor import StepLatencyModel, StepLoad
from scheduler.step import Step
from serve.engine.calibration import conditions

if TYPE_CHECKING:
    from serve.engine.runner import Runner

SETTLING = 40  # steps of a bucket before the first one that counts

# --- measuring ---------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """A step's load and its median seconds on the device."""

    bucket: int
    load: StepLoad
    seconds: float


def measure(runner: Runner, budget_seconds: float, repeats: int = 4, seed: int = 0) -> list[Point]:
    """Time every shape, and again in rounds until the time is up.

    A round takes one bucket after the other, in random order, and its shapes in random order: a card's clocks
    follow its load, and so they are those of a server that stays in that bucket.
    """
    config = runner.config
    made = shapes(config.buckets, config.num_pages, config.page_size)
    probes = [probe(shape, config.page_size) for shape in made]
    probes = [(step, load) for step, load in probes if _fits(step, runner)]
    times: list[list[float]] = [[] for _ in probes]
    rng, began = np.random.default_rng(seed), clock()
    while not times[0] or clock() - began < budget_seconds:
        for bucket in rng.permutation(config.buckets).tolist():
            of_bucket = [index for index, (step, _) in enumerate(probes) if step.bucket == bucket]
            runner.seconds(probes[of_bucket[0]][0], SETTLING)
            for index in rng.permutation(of_bucket).tolist():
                times[index].append(runner.seconds(probes[index][0], repeats))
    return [
        Point(step.bucket, load, float(np.median(seconds)))
        for (step, load), seconds in zip(probes, times, strict=True)
    ]


def _fits(step: Step, runner: Runner) -> bool:
    longest = max(entry.start + entry.rows for entry in step.entries)
    return longest < runner.model_config.max_context


# --- fitting -----------------------------------------------------------------------------------------------

KV = {"shared_kv": ("shared_kv",), "private_kv": ("private_kv",)}
UNIQUE, RAW = {"kv": ("shared_kv", "private_kv")}, {"raw_kv": ("raw_kv",)}
REST = {"items": ("items",), "chunk_context": ("chunk_context",)}
FORMS: dict[str, tuple[bool, Mapping[str, tuple[str, ...]]]] = {  # (a staircase?, features: their parts)
    "staircase": (True, {**KV, **RAW, **REST}),
    "staircase-raw": (True, {**RAW, **REST}),
    "linear": (False, RAW),
    "linear-unique": (False, UNIQUE),
}


LEAST = 0.1  # of the shortest step: what a bucket costs at least, however noisy the measurement


def fit(points: Sequence[Point]) -> dict[str, Any]:
    """Every form with its coefficients, and how well it says what was measured."""
    buckets = sorted({point.bucket for point in points})
    seconds = np.array([point.seconds for point in points])
    rows = np.array([point.load.rows for point in points])
    forms: dict[str, Any] = {}
    for name, (staircase, features) in FORMS.items():
        if staircase:  # what each bucket adds to the one before it
            base = [[float(point.bucket >= bucket) for point in points] for bucket in buckets]
        else:
            base = [[1.0] * len(points), rows.tolist()]
        added = [
            [sum(getattr(point.load, part) for part in parts) for point in points]
            for parts in features.values()
        ]
        found = non_negative(np.array([*base, *added], float).T / seconds[:, None])
        of_base, of_added = found[: len(base)], found[len(base) :]
        costs = {
            part: float(cost)
            for parts, cost in zip(features.values(), of_added, strict=True)
            for part in parts
        }
        forms[name] = {"costs": costs}
        if staircase:
            steps = np.maximum(np.cumsum(of_base), LEAST * seconds.min()).tolist()
            forms[name]["buckets"] = {str(b): step for b, step in zip(buckets, steps, strict=True)}
        else:
            forms[name]["line"] = of_base.tolist()
    forms["constant"] = {"line": [0.0, float(seconds.sum() / rows.sum())], "costs": {}}
    for name, form in forms.items():
        form |= _accuracy({"forms": forms}, name, points, buckets)
    return forms


def non_negative(design: np.ndarray, sweeps: int = 3000) -> np.ndarray:
    """The x >= 0 for which design @ x is nearest to 1 in every row: coordinate descent."""
    size = np.linalg.norm(design, axis=0)
    size[size == 0.0] = 1.0
    scaled = design / size
    gram, right = scaled.T @ scaled, scaled.sum(axis=0)
    x = np.zeros(design.shape[1])
    for _ in range(sweeps):
        before = x.copy()
        for k in range(len(x)):
            if gram[k, k] > 0.0:
                x[k] = max(0.0, x[k] + (right[k] - gram[k] @ x) / gram[k, k])
        if np.abs(x - before).max() <= 1e-12 * max(1.0, np.abs(x).max()):
            break
    return x / size


def _accuracy(
    profile: Mapping[str, Any], name: str, points: Sequence[Point], buckets: Sequence[int]
) -> dict[str, float]:
    """Of measured / predicted - 1: mean, mean size, and the 95 % quantile as the margin."""
    profile["forms"][name]["margin"] = 0.0
    model = StepLatencyModel.from_profile(profile, buckets, name)
    errors = np.array([point.seconds / model.predict(point.load) - 1.0 for point in points])
    return {
        "bias": float(errors.mean()),
        "mape": float(np.abs(errors).mean()),
        "margin": max(0.0, float(np.quantile(errors, 0.95))),
    }


def profile(name: str, points: Sequence[Point], runner: Runner, device: str) -> dict[str, Any]:
    """What serve.engine.calibration and bench.simulate.profile read."""
    config = runner.config
    return {
        "name": name,
        **conditions(device, runner.model_config, runner.dtype.name, config.backend.name, config.placement),
        "num_pages": config.num_pages,
        "page_size": config.page_size,
        "forms": fit(points),
    }


# --- command line ------------------------------------------------------------------------------------------


def default_name(device: str, model: str, count: int = 1) -> str:
    """As in h100-qwen3-32b: without the maker and the memory of an accelerator's name. Two: h100x2-…"""
    short = re.sub(r"^NVIDIA | \d+GB.*$", "", device) + (f"x{count}" if count > 1 else "")
    return f"{short}-{model}".lower().replace(" ", "-")


def main(arguments: Sequence[str]) -> dict[str, Any]:
    own, server = split(arguments)
    parser = Command("bench.device.calibrate", "Measures a step-time profile.")
    parser.add_argument("--name", help="of the profile; default: the device's and the model's")
    parser.add_argument("--budget-seconds", type=float, default=300.0, help="no round begins after so many")
    parser.add_argument("--profile", type=Path, help="where to write the profile, without points")
    options = parser.parse_args(own)
    from bench import inside

    here = inside.start(inside.configured(server))
    say(here.summary, options.json)
    here.engine.stop(drain=False, timeout=10.0)
    runner = here.runner
    count = runner.config.placement.count
    with waiting(f"measuring steps, for {options.budget_seconds:.0f} s"):
        points = measure(runner, options.budget_seconds)
    described = head(parser.typed(arguments), hardware.describe(count))
    device, model = described["hardware"]["device"], runner.model_config.name
    name = options.name or default_name(device, model, count)
    found = {**described, "model": model, **profile(name, points, runner, device)}
    write(found, options.profile)
    measured = [{**point._asdict(), "load": point.load._asdict()} for point in points]
    write({**found, "points": measured}, options.json)
    for form, fitted in found["forms"].items():
        off = f"bias {fitted['bias']:+.2%}  MAPE {fitted['mape']:.2%}  margin {fitted['margin']:.2%}"
        say(f"{form:<14} {off}", options.json)
    say(ran_on(found), options.json)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
