from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from bench import plot, style
from bench.device.cases import STEP, Row
from bench.plot import against_load
from scheduler.predictor import StepLoad
from serve.door import StepRecord


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


def drawing(monkeypatch: pytest.MonkeyPatch, axes: object) -> None:
    """Everything is drawn on `axes`, of which a test looks at the calls."""
    pyplot = MagicMock()
    pyplot.subplots.return_value = MagicMock(), axes
    for module in (plot, style):
        monkeypatch.setattr(module, "begun", lambda: pyplot)


def test_cases_are_drawn_over_their_floors_by_what_they_must_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def case(name: str, suite: str, unique_bytes: int, **times: float) -> dict[str, object]:
        return {"name": name, "suite": suite, "unique_bytes": unique_bytes, "floor_us": 2.0, **times}

    cases = [
        case("large", "decode", 9_000_000, ours_us=3.0),
        case("prompt", "prefill", 5, ours_us=4.0),
        case("not run", "decode", 4),
        case("small", "decode", 1_000_000, ours_us=5.0, flashinfer_flat_us=8.0),
    ]
    axes = MagicMock()
    drawing(monkeypatch, axes)
    result = {"cases": cases, "hardware": {"device": "H200"}, "copy_tb_s": 4.0}
    plot.plot_cases(result, tmp_path / "plot.png")
    lines = {call.kwargs["label"]: call.args[:2] for call in axes.plot.call_args_list}
    assert lines == {"ours": ((9.0, 1.0), (1.5, 2.5)), "FlashInfer flat": ((1.0,), (4.0,))}


def test_steps_are_drawn_from_the_middle_of_the_log_for_some_seconds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def step(ended: float, requests: int) -> StepRecord:
        return StepRecord(ended, 8, StepLoad(3), requests, 3, 2, 0.02, 0.015, None, 0.03)

    width, time, errors = axes = MagicMock(), MagicMock(), MagicMock()
    drawing(monkeypatch, axes)
    steps = [step(ended, 2) for ended in (0.0, 1.0, 4.0, 6.0, 9.0)] + [step(5.0, 1)]
    plot.plot_steps(steps, tmp_path / "plot.png", seconds=5.0)
    shown = {call.kwargs["label"]: call.args[:2] for call in width.plot.call_args_list}
    assert shown["requests"] == ([0.0, 2.0], [2, 2])
    areas = {call.kwargs["label"]: call.args for call in width.fill_between.call_args_list}
    assert areas["branches that wait"] == ([0.0, 2.0], [3, 3], [5, 5])
    times = {call.kwargs["label"]: call.args[1] for call in time.plot.call_args_list}
    assert times["allowed"] == [None, None]
    assert times["measured"] == [30.0, 30.0]
    assert len(errors.scatter.call_args.args[0]) == 5, "of all steps of several requests"


def test_bars_are_hatched_where_they_are_estimated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def row(case: str, device: str, how: str, seconds: float | None = 0.0125, shape: str = "8 x 8") -> Row:
        backend, devices = ("gpu", 1) if how == "measured" else ("tpu-v5e", 8)
        return Row(
            case=case,
            shape=shape,
            backend=backend,
            device=device,
            devices=devices,
            model="qwen3-32b",
            layers=64,
            how=how,
            seconds=seconds,
            floor_seconds=0.01,
            tb_s=0.819,
            ran_on="2026-11-28T12:00:00Z, jax 0.10.2",
        )

    axes = MagicMock()
    drawing(monkeypatch, axes)
    rows = [
        row("decode, shared", "H200", "measured", shape="4 x 4, 1 + 1"),
        row(STEP, "H200", "measured", seconds=None),
        row("decode, shared", "TPU v5 lite", "estimated", shape="8 x 8, 2048 + 192"),
        row(STEP, "TPU v5 lite", "estimated", shape="8 x 8, 2048 + 192"),
    ]
    source = tmp_path / "rows.json"
    source.write_text(json.dumps({"rows": [each.as_json() for each in rows]}))
    plot.main([str(source), str(tmp_path / "plot.png")])
    here, there = axes.bar.call_args_list
    assert (here.kwargs["label"], there.kwargs["label"]) == (
        "H200, gpu, qwen3-32b",
        "8 x TPU v5 lite, tpu-v5e, qwen3-32b, estimated",
    )
    assert "hatch" not in here.kwargs
    assert "hatch" in there.kwargs
    assert (len(here.args[0]), len(there.args[0])) == (1, 2)
    assert there.args[1] == [pytest.approx(1.25)] * 2
    assert [call.args[1] for call in axes.bar_label.call_args_list] == [["1.25*"], ["1.25", "1.25"]]
