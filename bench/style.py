"""How pictures look, all of them: colors, fonts, titles, units, and legends outside of what is drawn.

A policy has one color and one mark everywhere; the mark is for those who cannot tell colors. Needs matplotlib
(`pip install -e '.[bench]'`) as soon as something is drawn.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_LOOKS = {
    "taper": ("#2563c9", "o"),
    "eager": ("#d97a06", "s"),
    "off": ("#7b8794", "v"),
    "cap:2": ("#9bd0b0", "P"),
    "cap:4": ("#1c8a52", "^"),
    "cap:6": ("#5c7f2a", "D"),
    "cap:8": ("#8a5fbf", "X"),
    "repaying": ("#2563c9", "o"),  # as taper does
    "forgetting": ("#b8336a", "D"),
}
_OTHERS = ("#b8336a", "#00838f", "#6d4c41", "#455a64")
SERIES = ("#1f2937", "#00838f", "#b8336a", "#a16207", "#6d4c41", "#7c9a3d")
"""Colors of what is no policy, in the order in which it comes."""
ADVANCING, WAITING = _LOOKS["taper"][0], _LOOKS["eager"][0]
"""Colors of branches, as on the status page."""

_STYLE = {
    "figure.constrained_layout.use": True,  # leaves room for a legend outside of the axes
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.titlesize": 10,
    "savefig.dpi": 150,
}


def look(policy: str) -> dict[str, Any]:
    """Its color and marker for matplotlib; a policy without a name of its own has one of a few others."""
    color, marker = _LOOKS.get(policy) or (_OTHERS[sum(policy.encode()) % len(_OTHERS)], "*")
    return {"color": color, "marker": marker}


def begun() -> Any:
    """pyplot, in this style, for files alone."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams.update(_STYLE)
    return importlib.import_module("matplotlib.pyplot")


def titled(axes: Any, title: str, x: str, y: str) -> None:
    """Give axes their title, and what stands on both of them, with its unit."""
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def explained(figure: Any, panels: Sequence[Any], columns: int) -> None:
    """Set one legend below all panels: each label once."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns)


def beside_title(axes: Any) -> None:
    """Set the legend of these axes above them, right of their title."""
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=4, borderaxespad=0.2)


def in_percent(axes: Any) -> None:
    """The y axis of a share, from nothing to all."""
    axes.set_ylim(0.0, 1.05)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")


def saved(figure: Any, path: Path) -> None:
    """Write a figure, and forget it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    begun().close(figure)
