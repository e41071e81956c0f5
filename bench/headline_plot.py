"""The picture of why: goodput and attainment over load, all policies. Needs matplotlib.

    python -m bench.headline_plot docs/headline.png

Lines are simulated, from `bench.simulate.maps`; marks are measured, one for each run of `bench.load.goodput`
on an H200 that bench/results holds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.colors import look
from bench.plot import against_load, begun, saved

RESULTS = Path(__file__).parent / "results"
POLICIES = ("taper", "cap:8", "cap:4", "cap:2", "eager", "off")
PANELS = (
    ("goodput_stage", "Tokens of requests that met their targets", "tokens a second"),
    ("attainment_stage", "Requests that met their targets", "share"),
)


def simulated(maps: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the map over load, as `against_load` has them."""
    return [{**row, "load": row["x"]} for row in maps["rows"] if row["map"] == "load"]


def measured(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of runs of the headline workload."""
    return [row for result in results if result["workload"] == "headline" for row in result["rows"]]


def draw(lines: Sequence[Mapping[str, Any]], marks: Sequence[Mapping[str, Any]], path: Path) -> None:
    pyplot = begun()
    figure, grid = pyplot.subplots(1, len(PANELS), figsize=(10, 4.4))
    for axes, (column, title, unit) in zip(grid, PANELS, strict=True):
        found = against_load(lines, column)
        for policy in POLICIES:
            style = look(policy)
            loads = [point.load for point in found[policy]]
            width = 2.6 if policy == "taper" else 1.4
            means = [point.mean for point in found[policy]]
            axes.plot(loads, means, color=style["color"], linewidth=width, label=policy)
            own = [row for row in marks if row["policy"] == policy and row[column] is not None]
            at, values = [row["load"] for row in own], [row[column] for row in own]
            axes.plot(at, values, linestyle="", markeredgecolor="white", markersize=8, zorder=3, **style)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_ylabel(unit)
        axes.set_xlabel("requests a second")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(POLICIES), frameon=False)
    figure.suptitle(
        "Qwen3-32B on one H200, branching requests in bursts. Lines: simulated. Marks: measured.", fontsize=10
    )
    saved(figure, path)


def main(arguments: Sequence[str]) -> None:
    (target,) = arguments
    maps = json.loads((RESULTS / "maps-h200.json").read_text())
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("goodput-h200-o*.json"))]
    draw(simulated(maps), measured(runs), Path(target))


if __name__ == "__main__":
    main(sys.argv[1:])
