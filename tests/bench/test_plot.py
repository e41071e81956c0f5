from __future__ import annotations

from bench.plot import against_load


def row(policy: str, load: float | None, figure: float | None) -> dict[str, object]:
    return {"policy": policy, "load": load, "figure": figure}


def test_seeds_become_a_mean_with_its_span() -> None:
    rows = [row("off", 2.0, 4.0), row("off", 1.0, 3.0), row("taper", 1.0, 9.0), row("off", 2.0, 8.0)]
    assert against_load(rows, "figure") == {
        "off": [(1.0, 3.0, 3.0, 3.0), (2.0, 6.0, 4.0, 8.0)],
        "taper": [(1.0, 9.0, 9.0, 9.0)],
    }


def test_what_is_not_known_is_not_drawn() -> None:
    assert against_load([row("off", None, None), row("off", None, 1.0)], "figure") == {
        "off": [(0.0, 1.0, 1.0, 1.0)]
    }
