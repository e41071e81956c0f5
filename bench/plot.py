"""The plot of a kernel benchmark: how many times the byte floor each case takes, ours and FlashInfer's.

python -m bench.plot RESULT.json PLOT.png
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.report import label

SERIES = {
    "ours": ("ours_us", "o"),
    "FlashInfer composed": ("flashinfer_composed_us", "s"),
    "FlashInfer flat": ("flashinfer_flat_us", "^"),
    "FlashInfer cascade": ("flashinfer_cascade_us", "v"),
}


def plot_cases(result: Mapping[str, Any], path: Path) -> None:
    """Draws all cases but prefill's, smallest first. Needs matplotlib (`pip install taper[bench]`)."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
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
        f"Shared-prefix attention on {result['hardware']['device']}, smallest case first "
        f"(floor: unique bytes at {result['copy_tb_s']:.2f} TB/s)",
        fontsize=9,
    )
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    plot_cases(json.loads(source.read_text()), target)
