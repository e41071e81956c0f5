"""Plots of results. Needs matplotlib (`pip install -e '.[bench]'`).

    python -m bench.plot RESULT.json PLOT.png

Of a kernel benchmark: how many times the byte floor each case takes, ours and FlashInfer's. Of a comparison
of policies: goodput and attainment against load, by the stage measure and by the mean. Of simulated maps: the
same, by the stage measure, a picture for each two maps, and one of who forks. Of an engine: its steps against
the byte floor. Of a calibration: steps as they were measured, against what the profile says. Of a comparison
of backends: how many byte floors each case takes. Of a log of steps (.jsonl, as `taper-serve --step-log`
writes it): width and slack over time, and predicted against measured times.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.result import device_of
from bench.style import (
    ADVANCING,
    SERIES,
    WAITING,
    begun,
    beside_title,
    explained,
    in_percent,
    look,
    saved,
    titled,
)
from scheduler.predictor import StepLatencyModel, StepLoad
from serve.door import StepRecord
from serve.engine.step_log import read_steps

if TYPE_CHECKING:
    from bench.device.cases import Row

WAYS = {
    "ours": ("ours_us", "o"),
    "FlashInfer composed": ("flashinfer_composed_us", "s"),
    "FlashInfer flat": ("flashinfer_flat_us", "^"),
    "FlashInfer cascade": ("flashinfer_cascade_us", "v"),
}


def plot_cases(result: Mapping[str, Any], path: Path) -> None:
    """Draws all cases but prefill's, by the bytes that each must read."""
    pyplot = begun()
    cases = [case for case in result["cases"] if case["suite"] != "prefill" and "ours_us" in case]
    figure, axes = pyplot.subplots(figsize=(9, 5))
    for color, (name, (key, marker)) in zip(SERIES, WAYS.items(), strict=False):
        points = [(case["unique_bytes"] / 1e6, case[key] / case["floor_us"]) for case in cases if key in case]
        if points:
            axes.plot(*zip(*points, strict=True), marker, label=name, color=color, markersize=5)
    axes.axhline(1, color="black", linewidth=0.8)
    for scale, axis, base in ((axes.set_xscale, axes.xaxis, 10), (axes.set_yscale, axes.yaxis, 2)):
        scale("log", base=base)
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    titled(
        axes,
        f"Attention over shared prefixes on {device_of(result['hardware'])}",
        "MB that a case must read",
        "time, in times what the bytes take",
    )
    figure.suptitle(f"1 is the rate of a copy, {result['copy_tb_s']:.2f} TB/s. Lower is better.")
    explained(figure, [axes], len(WAYS))
    saved(figure, path)


class Point(NamedTuple):
    """A policy at a load: the mean over seeds of a figure, and its least and greatest value."""

    load: float
    mean: float
    least: float
    greatest: float


def against_load(rows: Sequence[Mapping[str, Any]], figure: str) -> dict[str, list[Point]]:
    """By policy, in order of load. Rows without the figure are left out."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        if row[figure] is not None:
            by_load = found.setdefault(row["policy"], {})
            by_load.setdefault(row["load"] or 0.0, []).append(row[figure])
    return {
        policy: [Point(load, sum(v) / len(v), min(v), max(v)) for load, v in sorted(by_load.items())]
        for policy, by_load in found.items()
    }


GOODPUT = ("goodput", "Tokens of requests that met their targets", "tokens a second")
ATTAINMENT = ("attainment", "Requests that met their targets", "share of all that arrived")


def plot_policies(result: Mapping[str, Any], path: Path) -> None:
    """Draws goodput and attainment of every policy against load; bars span the seeds."""
    pyplot = begun()
    figure, grid = pyplot.subplots(2, 2, figsize=(11, 8), sharex=True)
    for column, measure in zip(grid.T, ("stage", "mean"), strict=True):
        for axes, (name, title, unit) in zip(column, (GOODPUT, ATTAINMENT), strict=True):
            figures = against_load(result["rows"], f"{name}_{measure}")
            for policy, points in figures.items():
                loads, means, least, greatest = zip(*points, strict=True)
                below = [mean - low for mean, low in zip(means, least, strict=True)]
                above = [high - mean for mean, high in zip(means, greatest, strict=True)]
                axes.errorbar(loads, means, yerr=(below, above), label=policy, capsize=3, **look(policy))
            titled(axes, f"{title}, by {measure}", "load: requests a second, or clients", unit)
            axes.set_ylim(bottom=0)
        in_percent(column[1])
    explained(figure, grid.flat, 8)
    figure.suptitle(
        f"{result['workload']} on {result['server']['device']}, {result['server']['model']}: "
        f"TPOT {result['tpot_slo_ms']:.1f} ms, TTFT {result['ttft_slo_s']:g} s"
    )
    saved(figure, path)


# What each map of bench.simulate.maps changes: a title, and the x axis.
MAPS = {
    "load": ("over load", "requests a second"),
    "clients": ("over clients that ask again at once", "clients"),
    "share": ("over how many branch", "share of requests that branch"),
    "fanout": ("over the width of a fork", "branches of a fork, at as many tokens a second"),
    "slo": ("over the TPOT target", "target, in times what one request alone takes"),
    "family": ("over workloads", "workload"),
    "margin": ("over rho", "share of the slack that a step may spend"),
    "bias": ("over the predictor's error", "predicted time off by"),
    "reserve": ("over the KV that is reserved", "share of what running requests may still need"),
    "limits": ("over the limits of branches", "limit, in times what a branch takes"),
    "sustained": ("over load, for five minutes", "requests a second"),
    "lasting": ("over how long load lasts", "seconds"),
    "kept": ("over the KV that is reserved, for five minutes", "share of what running requests may need"),
    "starts": ("over how far starts may lengthen a step", "share of the TPOT target"),
}


def plot_maps(result: Mapping[str, Any], path: Path) -> None:
    """Draws stage goodput (above) and attainment (below) over the maps of bench.simulate.maps.

    Two maps are a picture, and that of who forks is one, of other figures too (`FORK`); if there are more,
    each picture's path has the name of its first map.
    """
    there = {row["map"] for row in result["rows"]}
    names = [name for name in MAPS if name in there]
    pictures = [names[begin : begin + 2] for begin in range(0, len(names), 2)]
    pictures += [["fork"]] if "fork" in there else []
    for maps in pictures:
        rows = [row for row in result["rows"] if row["map"] in maps]
        target = path if len(pictures) == 1 else path.with_stem(f"{path.stem}-{maps[0]}")
        if maps == ["fork"]:
            _plot_forks(rows, result["profile"], target)
        else:
            _plot_pair(maps, rows, result["profile"], target)


def _plot_pair(names: Sequence[str], rows: Sequence[Mapping[str, Any]], profile: str, path: Path) -> None:
    figure, grid = begun().subplots(2, len(names), figsize=(5 * len(names), 7.5), squeeze=False)
    for column, name in zip(grid.T, names, strict=True):
        own = [row for row in rows if row["map"] == name]
        places = {x: place for place, x in enumerate(dict.fromkeys(row["x"] for row in own))}
        for axes, (kind, _, unit) in zip(column, (GOODPUT, ATTAINMENT), strict=True):
            placed = [
                {"policy": row["label"], "load": float(places[row["x"]]), "y": row[f"{kind}_stage"]}
                for row in own
            ]
            apart = 0.1 if name == "family" else 0.0  # points that no line joins would hide each other
            for index, (policy, points) in enumerate(against_load(placed, "y").items()):
                at = [point.load + apart * (index - 1.5) for point in points]
                means = [point.mean for point in points]
                line = "none" if apart else "-"
                axes.plot(at, means, linestyle=line, label=policy, markersize=6, **look(policy))
            axes.set_ylim(0, 1.08 * axes.dataLim.ymax)
            axes.set_xticks([*places.values()], [_tick(name, x) for x in places])
            titled(axes, f"{kind.capitalize()} {MAPS[name][0]}", MAPS[name][1], unit)
        in_percent(column[1])
    explained(figure, grid.flat, 7)
    figure.suptitle(f"Simulated, profile {profile}. Goodput: tokens of requests that met their targets.")
    saved(figure, path)


# What is drawn of the map of who forks: a figure of its rows, a title, and the y axis.
FORK = (
    ("attainment_stage", "Attainment, each stage on pace", ATTAINMENT[2]),
    ("attainment_mean", "Attainment, by whole answers", ATTAINMENT[2]),
    ("e2e_p50_s", "Half of the answers are there after", "seconds"),
    ("given_tokens", "Prompt and joined text that an answer has read", "tokens"),
)


def _plot_forks(rows: Sequence[Mapping[str, Any]], profile: str, path: Path) -> None:
    figure, grid = begun().subplots(2, 2, figsize=(10, 7.5))
    for axes, (name, title, unit) in zip(grid.flat, FORK, strict=True):
        for policy, points in against_load([{**row, "load": row["x"]} for row in rows], name).items():
            loads, means, _, _ = zip(*points, strict=True)
            axes.plot(loads, means, label=policy, markersize=6, **look(policy))
        titled(axes, title, "requests a second", unit)
        axes.set_ylim(bottom=0)
        if unit == ATTAINMENT[2]:
            in_percent(axes)
    explained(figure, grid.flat, 3)
    figure.suptitle(
        f"Simulated, profile {profile}. The server forks, and joins by KV or by reading again; or the client."
    )
    saved(figure, path)


def _tick(name: str, x: float | str) -> str:
    return f"{100 * x:+.0f} %" if name == "bias" and isinstance(x, float) else f"{x}"


def plot_steps(steps: Sequence[StepRecord], path: Path, seconds: float = 30.0) -> None:
    """Draws `seconds` of a log of steps: how wide they were, what they were allowed and took, and how well
    all of the log's were predicted."""
    pyplot = begun()
    figure, (width, time, errors) = pyplot.subplots(3, 1, figsize=(10, 12))
    busy, shown = _some(steps, seconds)
    draw_widths(width, shown)
    draw_times(time, shown)
    most = 1e3 * max(step.predicted for step in busy)
    draw_predicted(figure, errors, [(each.predicted, each.seconds, each.bucket) for each in busy], 4, most)
    errors.set_ylim(0, 1.3 * most)
    titled(errors, "Time of a step, predicted and measured", "predicted, ms", "measured, ms")
    saved(figure, path)


def plot_tapering(steps: Sequence[StepRecord], path: Path, about: str, seconds: float = 30.0) -> None:
    """Draws the same of steps that were simulated, whose predictions are not news."""
    figure, (width, time) = begun().subplots(2, 1, figsize=(10, 8))
    _, shown = _some(steps, seconds)
    draw_widths(width, shown)
    draw_times(time, shown, measured=False)
    figure.suptitle(about)
    saved(figure, path)


def _some(steps: Sequence[StepRecord], seconds: float) -> tuple[list[StepRecord], list[StepRecord]]:
    """The steps of several requests, and of these `seconds` from the middle of the log on."""
    busy = [step for step in steps if step.requests > 1] or [*steps]
    begin = busy[len(busy) // 2].ended
    return busy, [step for step in busy if begin <= step.ended < begin + seconds]


def draw_widths(axes: Any, steps: Sequence[StepRecord]) -> None:
    """How many branches advance in each step, how many wait, and of how many requests they are."""
    at, branches = [step.ended - steps[0].ended for step in steps], [step.branches for step in steps]
    everybody = [step.branches + step.deferred for step in steps]
    for low, high, label, color in (
        (branches, everybody, "branches that wait", WAITING),
        ([0] * len(at), branches, "branches that advance", ADVANCING),
    ):
        axes.fill_between(at, low, high, label=label, color=color, alpha=0.6, linewidth=0, step="pre")
    axes.plot(at, [step.requests for step in steps], label="requests", color=SERIES[0])
    titled(axes, "Branches in a step", "seconds", "branches")
    axes.set_ylim(bottom=0)
    beside_title(axes)


def draw_times(axes: Any, steps: Sequence[StepRecord], measured: bool = True) -> None:
    """What each step would have taken without extra branches, was predicted to take, was allowed and took."""
    at = [step.ended - steps[0].ended for step in steps]
    lines = {
        "allowed": ([step.budget for step in steps], ":", "black"),
        "measured": ([step.seconds for step in steps], "-", SERIES[1]),
        "predicted": ([step.predicted for step in steps], "-", SERIES[2]),
        "predicted without extra branches": ([step.baseline for step in steps], "-", SERIES[3]),
    }
    for name, (values, style, color) in lines.items():
        if name != "measured" or measured:
            known = [None if value is None else 1e3 * value for value in values]
            axes.plot(at, known, style, label=name, lw=0.9, color=color)
    titled(axes, "Time of a step", "seconds", "ms")
    axes.set_ylim(0, 1.3e3 * max(step.predicted for step in steps))
    beside_title(axes)


def draw_predicted(
    figure: Any, axes: Any, points: Sequence[tuple[float, float, int]], size: float, most: float
) -> None:
    """Steps by what was predicted and what was measured, in seconds, colored by the rows of their programs;
    and the line on which both are the same, up to `most` ms."""
    predicted, measured, rows = zip(*points, strict=True)
    at = [1e3 * each for each in predicted], [1e3 * each for each in measured]
    found = axes.scatter(*at, c=rows, s=size, cmap="viridis")
    axes.plot((0, most), (0, most), "k-", lw=0.6)
    figure.colorbar(found, ax=axes, label="rows of the program")


def plot_points(result: Mapping[str, Any], path: Path) -> None:
    """Draws the steps that a profile was fitted to: what each took, against what the profile says."""
    pyplot = begun()
    model = StepLatencyModel.from_profile({"forms": result["forms"]})
    points = [
        (model.predict(StepLoad(**each["load"])), each["seconds"], each["bucket"])
        for each in result["points"]
    ]
    figure, axes = pyplot.subplots(figsize=(8, 5.5))
    draw_predicted(figure, axes, points, 16, 1e3 * max(measured for _, measured, _ in points))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    titled(
        axes,
        f"Single steps of {result['model']} on {device_of(result['hardware'])}",
        "ms that the fitted staircase says",
        "ms that were measured",
    )
    saved(figure, path)


def plot_buckets(result: Mapping[str, Any], path: Path) -> None:
    """Draws the time of a full step of every bucket against the KV that it reads, and the byte floor."""
    pyplot = begun()
    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    rows = result["buckets"]
    buckets = [*dict.fromkeys(row["bucket"] for row in rows)]
    colors = pyplot.get_cmap("viridis")
    for bucket, own in itertools.groupby(rows, key=lambda row: row["bucket"]):
        points = [(row["kv_tokens"] / 1000, row["step_ms"]) for row in own]
        color = colors(0.9 * buckets.index(bucket) / len(buckets))
        axes.plot(*zip(*points, strict=True), "o-", color=color, label=f"{bucket} rows")
    floor = sorted((row["kv_tokens"] / 1000, row["floor_ms"]) for row in rows)
    axes.plot(*zip(*floor, strict=True), "k--", label="what the bytes take")
    axes.set_ylim(bottom=0)
    titled(
        axes,
        f"Steps of {result['model']} on {device_of(result['hardware'])}",
        "thousands of KV positions that a step reads",
        "ms",
    )
    figure.suptitle(
        f"Dashed: weights and KV read once at the rate of a copy, {result['copy_tb_s']:.2f} TB/s."
    )
    figure.legend(loc="outside right upper")
    saved(figure, path)


def plot_backends(rows: Sequence[Row], path: Path) -> None:
    """Draws how many byte floors each case takes, a bar for each device; hatched where it is estimated."""
    pyplot = begun()
    rows = [row for row in rows if row.over_floor is not None]
    cases, series = (
        list(dict.fromkeys(each)) for each in zip(*((r.case, r.series) for r in rows), strict=True)
    )
    figure, axes = pyplot.subplots(figsize=(11, 6))
    width = 0.85 / len(series)
    for index, name in enumerate(series):
        own = [row for row in rows if row.series == name]
        color, guess = SERIES[index % len(SERIES)], own[0].how == "estimated"
        look = {"facecolor": "white", "hatch": "////"} if guess else {"facecolor": color}
        at = [cases.index(row.case) + (index - (len(series) - 1) / 2) * width for row in own]
        bars = axes.bar(at, [r.over_floor for r in own], 0.9 * width, label=name, edgecolor=color, **look)
        axes.bar_label(bars, [f"{row.over_floor:.3g}{'*' * row.differs}" for row in own], fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log", base=2)
    axes.set_ylim(bottom=0.5)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xticks(range(len(cases)), cases)
    titled(axes, "The same cases on each device", "case", "time, in times what the device's bytes take")
    about = "Filled: measured. Hatched: estimated, for a device that was not there."
    figure.suptitle(f"{about} *: another length." if any(row.differs for row in rows) else about)
    explained(figure, [axes], 2)
    saved(figure, path)


def main(arguments: Sequence[str]) -> None:
    source, target = map(Path, arguments)
    if source.suffix == ".jsonl":
        with source.open() as lines:
            plot_steps([*read_steps(lines)], target)
        return
    result = json.loads(source.read_text())
    if "over_floor" in next(iter(result.get("rows", [])), {}):
        from bench.device.cases import Row

        plot_backends([Row.of_json(row) for row in result["rows"]], target)
        return
    plots = {
        "capacity": plot_maps,
        "rows": plot_policies,
        "buckets": plot_buckets,
        "points": plot_points,
        "cases": plot_cases,
    }
    next(plot for key, plot in plots.items() if key in result)(result, target)


if __name__ == "__main__":
    main(sys.argv[1:])
