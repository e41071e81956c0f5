"""Plots of results. Needs matplotlib (`pip install -e '.[bench]'`).

    python -m bench.plot RESULT.json PLOT.png

Of a kernel benchmark: how many times the byte floor each case takes, ours and FlashInfer's. Of a comparison
of policies: goodput and attainment against load, by the stage measure and by the mean. Of simulated maps:
the same, by the stage measure. Of an engine: its steps against the byte floor. Of a comparison of backends:
how many byte floors each case takes. Of a log of steps (.jsonl, as `taper-serve --step-log` writes it): width
and slack over time, and predicted against measured times.
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.colors import look
from bench.device.report import label
from bench.result import device_of
from serve.door import StepRecord
from serve.engine.step_log import read_steps

if TYPE_CHECKING:
    from bench.device.cases import Row

SERIES = {
    "ours": ("ours_us", "o"),
    "FlashInfer composed": ("flashinfer_composed_us", "s"),
    "FlashInfer flat": ("flashinfer_flat_us", "^"),
    "FlashInfer cascade": ("flashinfer_cascade_us", "v"),
}


def plot_cases(result: Mapping[str, Any], path: Path) -> None:
    """Draws all cases but prefill's, smallest first."""
    pyplot = begun()
    cases = [case for case in result["cases"] if case["suite"] != "prefill" and "ours_us" in case]
    cases.sort(key=lambda case: case["unique_bytes"])
    figure, axes = pyplot.subplots(figsize=(0.22 * len(cases) + 3, 6))
    for name, (key, marker) in SERIES.items():
        points = [(x, case[key] / case["floor_us"]) for x, case in enumerate(cases) if key in case]
        if points:
            axes.plot(*zip(*points, strict=True), marker, label=name, markersize=5)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(pyplot.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel("time / byte floor")
    axes.set_xticks(
        range(len(cases)), [" ".join(label(case).split()) for case in cases], rotation=90, fontsize=6
    )
    axes.set_title(
        f"Shared-prefix attention on {device_of(result['hardware'])}, smallest case first "
        f"(floor: unique bytes at {result['copy_tb_s']:.2f} TB/s)",
        fontsize=9,
    )
    axes.legend()
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


def plot_policies(result: Mapping[str, Any], path: Path) -> None:
    """Draws goodput and attainment of every policy against load; bars span the seeds."""
    pyplot = begun()
    line = {"capsize": 3, "markerfacecolor": "none", "markersize": 8}  # lines may lie on one another
    figure, grid = pyplot.subplots(2, 2, figsize=(11, 8), sharex=True)
    for column, measure in zip(grid.T, ("stage", "mean"), strict=True):
        for axes, (name, unit) in zip(column, (("goodput", "tokens/s"), ("attainment", "")), strict=True):
            figures = against_load(result["rows"], f"{name}_{measure}")
            for policy, points in figures.items():
                loads, means, least, greatest = zip(*points, strict=True)
                below = [mean - low for mean, low in zip(means, least, strict=True)]
                above = [high - mean for mean, high in zip(means, greatest, strict=True)]
                axes.errorbar(loads, means, yerr=(below, above), label=policy, **look(policy), **line)
            axes.set_title(f"{name}, {measure} TPOT", fontsize=10)
            axes.set_ylabel(unit)
            axes.set_ylim(bottom=0)
        column[-1].set_xlabel("load (requests/s, or clients of a closed loop)")
    grid[0][0].legend()
    figure.suptitle(
        f"{result['workload']} on {result['server']['device']}, {result['server']['model']}: "
        f"TPOT {result['tpot_slo_ms']:.1f} ms, TTFT {result['ttft_slo_s']:g} s",
        fontsize=10,
    )
    saved(figure, path)


def plot_maps(result: Mapping[str, Any], path: Path) -> None:
    """Draws stage goodput (above) and attainment (below) over each map of bench.simulate.maps."""
    pyplot = begun()
    names = [*dict.fromkeys(row["map"] for row in result["rows"] if row["map"] != "hour")]
    figure, grid = pyplot.subplots(2, len(names), figsize=(3.4 * len(names), 7), sharex="col", squeeze=False)
    for column, name in zip(grid.T, names, strict=True):
        rows = [row for row in result["rows"] if row["map"] == name]
        places = {x: place for place, x in enumerate(dict.fromkeys(row["x"] for row in rows))}
        for axes, figure_name in zip(column, ("goodput_stage", "attainment_stage"), strict=True):
            placed = [
                {"policy": row["label"], "load": float(places[row["x"]]), "y": row[figure_name]}
                for row in rows
            ]
            for policy, points in against_load(placed, "y").items():
                at, means, _, _ = zip(*points, strict=True)
                axes.plot(at, means, label=policy, markerfacecolor="none", **look(policy))
            axes.set_ylim(bottom=0)
            axes.set_xticks([*places.values()], [f"{x}" for x in places], fontsize=7)
        column[0].set_title(name, fontsize=10)
        column[0].legend(fontsize=7)
    grid[0][0].set_ylabel("stage goodput, tokens/s")
    grid[1][0].set_ylabel("attained")
    figure.suptitle(f"Simulated, {result['profile']}", fontsize=10)
    saved(figure, path)


def plot_steps(steps: Sequence[StepRecord], path: Path, seconds: float = 30.0) -> None:
    """Draws `seconds` of a log of steps: how wide they were, what they were allowed and took, and how well
    all of the log's were predicted."""
    pyplot = begun()
    figure, (width, time, errors) = pyplot.subplots(3, 1, figsize=(11, 10))
    busy = [step for step in steps if step.requests > 1] or [*steps]
    begin = busy[len(busy) // 2].ended
    shown = [step for step in busy if begin <= step.ended < begin + seconds]
    at = [step.ended - begin for step in shown]
    width.plot(at, [step.requests for step in shown], label="requests")
    width.plot(at, [step.branches for step in shown], label="branches that advance")
    width.plot(at, [step.branches + step.deferred for step in shown], ":", label="and those that wait")
    width.set_ylabel("in a step")
    for name, values, style in (
        ("allowed", [step.budget for step in shown], "k:"),
        ("measured", [step.seconds for step in shown], "-"),
        ("predicted", [step.predicted for step in shown], "-"),
        ("predicted baseline", [step.baseline for step in shown], "-"),
    ):
        time.plot(at, [None if value is None else 1e3 * value for value in values], style, label=name, lw=0.8)
    time.set_ylabel("ms")
    time.set_xlabel("s")
    for bucket in sorted({step.bucket for step in busy}):
        points = [(1e3 * step.predicted, 1e3 * step.seconds) for step in busy if step.bucket == bucket]
        errors.plot(*zip(*points, strict=True), ".", markersize=2, label=f"{bucket} rows")
    most = 1e3 * max(step.predicted for step in busy)
    errors.plot((0, most), (0, most), "k-", lw=0.6)
    errors.set_xlim(0, 1.05 * most)
    errors.set_ylim(0, 1.3 * most)
    errors.set_xlabel("predicted, ms")
    errors.set_ylabel("measured, ms")
    for axes in (width, time, errors):
        axes.legend(fontsize=7, ncols=4, markerscale=4)
    width.set_ylim(bottom=0)
    time.set_ylim(0, 1.3 * most)
    saved(figure, path)


def plot_buckets(result: Mapping[str, Any], path: Path) -> None:
    """Draws the time of a full step of every bucket against the KV that it reads, and the byte floor."""
    pyplot = begun()
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for bucket, rows in itertools.groupby(result["buckets"], key=lambda row: row["bucket"]):
        points = [(row["kv_tokens"] / 1000, row["step_ms"]) for row in rows]
        axes.plot(*zip(*points, strict=True), "o-", label=f"{bucket} rows")
    floor = sorted((row["kv_tokens"] / 1000, row["floor_ms"]) for row in result["buckets"])
    axes.plot(*zip(*floor, strict=True), "k--", label="byte floor")
    axes.set_xlabel("KV positions read (thousands)")
    axes.set_ylabel("ms")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    axes.set_title(
        f"{result['model']} on {device_of(result['hardware'])}, copy {result['copy_tb_s']:.2f} TB/s",
        fontsize=10,
    )
    saved(figure, path)


def plot_backends(rows: Sequence[Row], path: Path) -> None:
    """Draws how many byte floors each case takes, a bar for each device; hatched where it is estimated."""
    pyplot = begun()
    rows = [row for row in rows if row.over_floor is not None]
    cases, series = (
        list(dict.fromkeys(each)) for each in zip(*((r.case, r.series) for r in rows), strict=True)
    )
    colors = pyplot.get_cmap("tab10")
    figure, axes = pyplot.subplots(figsize=(11, 5))
    width = 0.85 / len(series)
    for index, name in enumerate(series):
        own = [row for row in rows if row.series == name]
        color, guess = colors(index % 10), own[0].how == "estimated"
        look = {"facecolor": "white", "hatch": "////"} if guess else {"facecolor": color}
        at = [cases.index(row.case) + (index - (len(series) - 1) / 2) * width for row in own]
        bars = axes.bar(at, [r.over_floor for r in own], 0.9 * width, label=name, edgecolor=color, **look)
        axes.bar_label(bars, [f"{row.over_floor:.3g}{'*' * row.differs}" for row in own], fontsize=6)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log", base=2)
    axes.set_ylim(bottom=0.5)
    axes.yaxis.set_major_formatter(pyplot.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel("time / byte floor of the device")
    axes.set_xticks(range(len(cases)), cases)
    axes.legend(fontsize=7)
    axes.set_title(
        "Filled: measured. Hatched: estimated, for a device that was not there. *: another length", fontsize=9
    )
    saved(figure, path)


def begun() -> Any:
    """pyplot, for files alone. What a legend needs outside of the axes is left free."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams["figure.constrained_layout.use"] = True
    return importlib.import_module("matplotlib.pyplot")


def saved(figure: Any, path: Path) -> None:
    """Write a figure, and forget it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    begun().close(figure)


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
    plots = {"capacity": plot_maps, "rows": plot_policies, "buckets": plot_buckets, "cases": plot_cases}
    next(plot for key, plot in plots.items() if key in result)(result, target)


if __name__ == "__main__":
    main(sys.argv[1:])
