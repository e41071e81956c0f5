"""The pictures that the docs show, each drawn from files that lie here: `python -m bench.pictures`.

    python -m bench.pictures                       # all of them, where they belong; needs matplotlib
    python -m bench.pictures docs/headline.png     # this one

Lines of the headline are simulated, from `bench.simulate.maps`; `bench.headline --plot` adds a mark for each
of its runs. The picture of steps is simulated while it is drawn, which takes ten seconds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.device.cases import Row
from bench.load.measures import Window
from bench.load.runs import Load, Run
from bench.load.workload import named
from bench.plot import (
    ATTAINMENT,
    GOODPUT,
    against_load,
    plot_backends,
    plot_buckets,
    plot_cases,
    plot_maps,
    plot_points,
    plot_tapering,
)
from bench.simulate.profile import Profile
from bench.simulate.simulation import Setting, Simulation, targets
from bench.style import begun, explained, in_percent, look, saved, titled
from serve.door import StepRecord

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
LINES = RESULTS / "maps-sustained-h200.json"
POLICIES = ("taper", "cap:8", "cap:6", "cap:4", "cap:2", "eager", "off")


class Picture(NamedTuple):
    """What draws it, from which files: patterns from the top of the project."""

    draw: Callable[[Sequence[Path], Path], None]
    sources: tuple[str, ...]

    @property
    def files(self) -> list[Path]:
        return [file for pattern in self.sources for file in sorted(ROOT.glob(pattern))]


# --- the headline ------------------------------------------------------------------------------------------


def simulated(maps: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the map over load for five minutes, as `against_load` has them."""
    return [{**row, "load": row["x"]} for row in maps["rows"] if row["map"] == "sustained"]


def measured(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of runs like those of the lines: of the headline workload, in which the server branches and
    refuses nothing."""
    return [
        row
        for result in results
        for row in result["rows"]
        if (load := Run.of(result, row).load) == Load("headline", load.amount)
    ]


def headline(sources: Sequence[Path], path: Path) -> None:
    """Goodput and attainment over load, all policies: the picture of why. Lines are from the first source."""
    maps, *runs = [json.loads(file.read_text()) for file in sources]
    lines, marks = simulated(maps), measured(runs)
    policies = [policy for policy in POLICIES if any(row["policy"] == policy for row in (*lines, *marks))]
    figure, grid = begun().subplots(1, 2, figsize=(10, 4.4))
    for axes, (kind, title, unit) in zip(grid, (GOODPUT, ATTAINMENT), strict=True):
        column = f"{kind}_stage"
        found = against_load(lines, column)
        for policy in policies:
            style = {**look(policy), "linewidth": 2.6 if policy == "taper" else 1.4}
            plain, dots = {**style, "marker": ""}, {**style, "markeredgecolor": "white", "markersize": 8}
            own = [row for row in marks if row["policy"] == policy and row[column] is not None]
            axes.plot([], [], label=policy, **(dots if own else plain))
            if policy in found:
                axes.plot(*list(zip(*found[policy], strict=True))[:2], **plain)
            at, values = [row["load"] for row in own], [row[column] for row in own]
            axes.plot(at, values, **{**dots, "linestyle": "", "zorder": 3})
        titled(axes, title, "requests a second", unit)
        axes.set_ylim(bottom=0)
    in_percent(grid[1])
    explained(figure, grid, len(policies))
    seeds = len({row["seed"] for row in lines})
    what = f"Lines: five minutes of each load, {seeds} {'seed' if seeds == 1 else 'seeds'}, simulated."
    what += " Marks: measured." * bool(marks)
    figure.suptitle(f"Qwen3-32B on one H200, branching requests in bursts. {what}")
    saved(figure, path)


# --- the others --------------------------------------------------------------------------------------------


def of_one(plot: Callable[[Any, Path], None]) -> Callable[[Sequence[Path], Path], None]:
    """Draws the result in a single file."""
    return lambda sources, path: plot(json.loads(sources[0].read_text()), path)


def maps(*names: str) -> Callable[[Sequence[Path], Path], None]:
    """Draws some of the maps in a file."""

    def some(result: Mapping[str, Any], path: Path) -> None:
        plot_maps({**result, "rows": [row for row in result["rows"] if row["map"] in names]}, path)

    return of_one(some)


def backends(sources: Sequence[Path], path: Path) -> None:
    """All devices' rows, in the order of the files."""
    results = [json.loads(file.read_text()) for file in sources]
    plot_backends([Row.of_json(row) for result in results for row in result["rows"]], path)


def steps(sources: Sequence[Path], path: Path) -> None:
    """Half a minute of the headline workload under taper, simulated with the profile in a file."""
    profile = Profile.load(str(sources[0])).exact()
    window = Window(45.0, 90.0, drain=0.0)
    setting = Setting(
        profile=profile,
        workload=named("headline", 1, window.end, rate=1.4),
        slo=targets(profile),
        window=window,
        seed=1,
    )
    log: list[StepRecord] = []
    Simulation(setting, "taper", watcher=log.append).serve()
    plot_tapering(log, path, f"Simulated: taper at 1.4 requests a second, profile {profile.name}")


HELD = "bench/results"
OF_BACKENDS = ("h200", "h200x2", "tpu-estimates", "cpu")
PICTURES = {
    "docs/headline.png": Picture(headline, (f"{HELD}/{LINES.name}", f"{HELD}/sustained/*.json")),
    f"{HELD}/maps-h200-load.png": Picture(maps("load", "clients"), (f"{HELD}/maps-h200.json",)),
    f"{HELD}/maps-h200-share.png": Picture(maps("share", "fanout"), (f"{HELD}/maps-h200-others.json",)),
    f"{HELD}/maps-h200-slo.png": Picture(maps("slo", "family"), (f"{HELD}/maps-h200-others.json",)),
    f"{HELD}/maps-h200-margin.png": Picture(maps("margin", "bias"), (f"{HELD}/maps-h200-others.json",)),
    f"{HELD}/maps-fork-h200.png": Picture(of_one(plot_maps), (f"{HELD}/maps-fork-h200.json",)),
    f"{HELD}/kernels-h200.png": Picture(of_one(plot_cases), (f"{HELD}/kernels-h200.json",)),
    f"{HELD}/engine-h200-qwen3-32b.png": Picture(
        of_one(plot_buckets), (f"{HELD}/engine-h200-qwen3-32b.json",)
    ),
    f"{HELD}/calibrate-h200-qwen3-32b.png": Picture(
        of_one(plot_points), (f"{HELD}/calibrate-h200-qwen3-32b.json",)
    ),
    f"{HELD}/steps-h200-taper.png": Picture(steps, ("serve/engine/profiles/h200-qwen3-32b.json",)),
    f"{HELD}/backends.png": Picture(backends, tuple(f"{HELD}/backends-{name}.json" for name in OF_BACKENDS)),
}
"""By where each belongs."""


def main(arguments: Sequence[str]) -> None:
    for name in arguments or PICTURES:
        picture = PICTURES[name]
        picture.draw(picture.files, ROOT / name)
        print(name)


if __name__ == "__main__":
    main(sys.argv[1:])
