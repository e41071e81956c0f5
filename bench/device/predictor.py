"""How well steps are predicted while a server is loaded: end to end, and against the device's own time.

    python -m bench.device.predictor --workload mixed --rate 2 --seed 7 --json OUT -- --model qwen3-32b ...

The server's engine runs in this process and serves a workload that it was not calibrated on. Every step was
predicted before it ran. End to end, it takes from the end of the step before it to its own end; some of them
are run again afterwards, in a queue, for the device's time alone. Steps in the first `--skip` seconds let the
online corrections settle and do not count.

`--into PROFILE` adds to a profile what the simulator needs of a loaded server: by how much longer than the
profile says a bucket's steps take (`factors`), and how what is left is spread (`noise`).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench import hardware, inside
from bench.command import Command, split
from bench.inside import Inside
from bench.load.workload import Item, Workload, named
from bench.progress import waiting
from bench.result import conclude, head, say, write
from scheduler.predictor import StepLatencyModel, StepLoad
from scheduler.request import Slo
from scheduler.step import FinishedStep
from serve.engine.runner import Runner

ALONE = Item(0.0, 800, ((100,),))
ENOUGH = 100  # steps of a bucket from which on its bias is judged
QUANTILES = 41  # of the noise
REPEATS = 4  # of a step that is run again


@dataclass(slots=True)
class Recorder:
    """Finished steps, when they ended, and the margin that was kept for them."""

    results: list[FinishedStep] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)

    def on_step(self, result: FinishedStep) -> None:
        self.results.append(result)
        self.ends.append(time.monotonic())

    def watch(self, latency: StepLatencyModel) -> None:
        """Note the margin whenever a step is about to be learned from."""
        learn = latency.observe

        def observe(load: StepLoad, seconds: float) -> None:
            self.margins.append(latency.accuracy.margin)
            learn(load, seconds)

        latency.observe = observe  # type: ignore[method-assign]

    def after(self, begin: float) -> list[tuple[FinishedStep, float]]:
        """The steps that ended later, each with its margin."""
        known = zip(self.results, self.ends, self.margins, strict=False)
        return [(result, margin) for result, end, margin in known if end > begin]


def play(here: Inside, workload: Workload, slo: Slo, seconds: float) -> None:
    """Hand in the workload's requests at their times, for so many seconds."""
    begin = time.monotonic()
    for number, item in enumerate(workload.items):
        if item.arrival >= seconds:
            break
        request = item.request(f"{begin}-{number}", slo, number, here.runner.model_config.vocab_size)
        time.sleep(max(0.0, begin + item.arrival - time.monotonic()))
        here.ask(request)
    time.sleep(max(0.0, begin + seconds - time.monotonic()))


def unloaded_tpot(here: Inside, item: Item) -> float:
    """Seconds per token of one request that is served alone."""
    patient, vocab_size = Slo(tpot=10.0, ttft=600.0), here.runner.model_config.vocab_size
    return here.ask(item.request("alone", patient, 0, vocab_size)).result().timing.tpot


def errors_of(
    predicted: Sequence[float] | np.ndarray, taken: Sequence[float] | np.ndarray
) -> dict[str, float]:
    """Of taken / predicted - 1: mean, mean size, median size."""
    errors = np.array(taken) / np.array(predicted) - 1.0
    size = np.abs(errors)
    return {
        "steps": len(errors),
        "bias": float(errors.mean()),
        "mape": float(size.mean()),
        "median_error": float(np.median(size)),
    }


def summarize(steps: Sequence[tuple[FinishedStep, float]]) -> dict[str, Any]:
    """Predictions against measured times, over all steps and by bucket."""
    predicted = [result.forecast.seconds for result, _ in steps]
    taken = [result.seconds for result, _ in steps]
    within = [t <= p * (1.0 + margin) for p, t, (_, margin) in zip(predicted, taken, steps, strict=True)]
    buckets = np.array([result.step.bucket for result, _ in steps])
    by_bucket = {
        str(bucket): errors_of(np.array(predicted)[buckets == bucket], np.array(taken)[buckets == bucket])
        for bucket in np.unique(buckets).tolist()
    }
    judged = [abs(each["bias"]) for each in by_bucket.values() if each["steps"] >= ENOUGH]
    return {
        **errors_of(predicted, taken),
        "coverage": sum(within) / len(within),
        "mean_margin": float(np.mean([margin for _, margin in steps])),
        "largest_bias_of_a_bucket": max(judged, default=None),
        "buckets": by_bucket,
    }


def against_device(
    runner: Runner, results: Sequence[FinishedStep], replays: int, seed: int
) -> dict[str, Any]:
    """Runs some of the steps again, and compares what was predicted and what they took then."""
    chosen = np.random.default_rng(seed).permutation(len(results))[:replays]
    again = [results[index] for index in sorted(chosen.tolist())]
    device = [runner.seconds(result.step, REPEATS) for result in again]
    return {
        "predicted": errors_of([result.forecast.seconds for result in again], device),
        "end_to_end": errors_of(device, [result.seconds for result in again]),
    }


def serving(results: Sequence[FinishedStep], still: StepLatencyModel) -> dict[str, Any]:
    """What the simulator needs: see bench.simulate.profile.Profile. `still`: without corrections."""
    ratios: dict[int, list[float]] = {}
    for result in results:
        ratio = result.seconds / still.predict(result.forecast.load)
        ratios.setdefault(result.step.bucket, []).append(ratio)
    known = {bucket: float(np.median(found)) for bucket, found in ratios.items() if len(found) >= ENOUGH}
    factors = {bucket: _nearest(known, bucket) for bucket in still.buckets} if known else {}
    left = [ratio / factors[bucket] - 1.0 for bucket in known for ratio in ratios[bucket]]
    noise = np.quantile(left, np.linspace(0.0, 1.0, QUANTILES)).tolist() if left else []
    return {"factors": factors, "noise": noise, "steps": len(left)}


def _nearest(known: dict[int, float], bucket: int) -> float:
    """The factor of the bucket, or of the nearest one by ratio of rows that has one."""
    return known[min(known, key=lambda other: max(other, bucket) / min(other, bucket))]


def text(result: dict[str, Any]) -> str:
    def errors(each: dict[str, float]) -> str:
        return f"{each['steps']:>6} steps, MAPE {each['mape']:.2%}, bias {each['bias']:+.2%}"

    end = result["end_to_end"]
    within = f"{end['coverage']:.1%} within the margin, {end['mean_margin']:.2%} on average"
    lines = [f"{'end to end':<26}{errors(end)}", f"{'':<26}{within}"]
    lines += [f"{'  bucket ' + bucket:<26}{errors(each)}" for bucket, each in end["buckets"].items()]
    for name, each in result["device"].items():
        lines.append(f"{'device, ' + name.replace('_', ' '):<26}{errors(each)}")
    return "\n".join(lines)


def command() -> Command:
    parser = Command("bench.device.predictor", "Predicted steps against real ones.")
    parser.add_argument("--workload", default="mixed", help="a family, headline, or a file")
    parser.add_argument("--rate", type=float, help="requests per second")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all lengths, for a small model")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--skip", type=float, default=10.0, help="seconds at the beginning that do not count")
    parser.add_argument("--tpot-slo", type=float, help="seconds, instead of twice the unloaded TPOT")
    parser.add_argument("--replays", type=int, default=100, help="steps to run again")
    parser.add_argument("--into", type=Path, help="a profile to add `serving` to")
    return parser


def main(arguments: Sequence[str]) -> dict[str, Any]:
    own, server = split(arguments)
    options = command().parse_args(own)
    recorder = Recorder()
    here = inside.start(inside.configured(server), recorder.on_step)
    say(here.summary, options.json)
    recorder.watch(here.engine.scheduler.controller.latency)
    tpot = options.tpot_slo or 2.0 * unloaded_tpot(here, ALONE.scaled(options.scale))
    workload = named(options.workload, options.seed, options.seconds, rate=options.rate).scaled(options.scale)
    begin = time.monotonic() + options.skip
    with waiting(f"serving requests, for {options.seconds:.0f} s"):
        play(here, workload, Slo(tpot=tpot, ttft=5.0), options.seconds)
    steps = recorder.after(begin)
    here.engine.stop(drain=False, timeout=10.0)
    if not steps:
        raise SystemExit("no steps were measured: serve for longer")
    results = [result for result, _ in steps]
    result = {
        **head(command().typed(arguments), hardware.describe(here.runner.config.placement.count)),
        "model": here.runner.model_config.name,
        "summary": here.summary,
        "tpot_slo_ms": 1e3 * tpot,
        "sha256": workload.digest,
        "end_to_end": summarize(steps),
        "device": against_device(here.runner, results, options.replays, options.seed),
    }
    if options.into is not None:
        profile = json.loads(options.into.read_text())
        still = StepLatencyModel.from_profile(profile, here.runner.buckets)
        profile["serving"] = {"command": result["command"], **serving(results, still)}
        write(profile, options.into)
    return conclude(result, text(result), options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
