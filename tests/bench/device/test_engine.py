"""bench.device.engine on the embedded model: the engine runs, its steps are compared with the device's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.device import decode, engine
from bench.device.probe import Shape, probe
from model.checkpoint import ModelSource
from model.decode import Generation
from model.decoder import Decoder
from model.sharding import Placement
from scheduler.step import FinishedStep, Forecast

pytestmark = pytest.mark.usefixtures("quick_compiler")


def finished(requests: int, rows: int = 1) -> FinishedStep:
    """A step in which so many requests advance, each by so many rows."""
    probed, load = probe(Shape(8, requests, 1, requests), page_size=4)
    entries = tuple(entry._replace(rows=rows) for entry in probed.entries)
    return FinishedStep(replace(probed, entries=entries), Forecast(load, 0.0, 0.0, 0.0, ()), 0.01)


def test_a_steady_step_has_every_request_by_one_token_and_follows_such_a_step() -> None:
    first, second, third = (finished(3) for _ in range(3))
    results = [finished(2), first, second, finished(3, rows=2), third, finished(2)]
    assert engine.steady(results, 3) == [second]


def test_the_engine_is_timed_against_its_own_executable(
    tmp_path: Path, compiled: str, one_layer: str
) -> None:
    sizes = ["--requests", "4", "--prompt-tokens", "4", "--new-tokens", "24", "--kv-levels", "16"]
    server = ["--model", one_layer, "--buckets", "8", "--num-pages", "64", "--compilation-cache", compiled]
    result = engine.main([*sizes, "--json", str(tmp_path / "out.json"), "--", *server])
    assert json.loads((tmp_path / "out.json").read_text()) == result
    assert result["steady_steps"] > 10
    assert result["wall_over_device"] > 0.5
    assert result["compilations"] == 0
    assert set(result["host"]) == {"schedule", "launch", "samples", "update"}
    assert [row["bucket"] for row in result["buckets"]] == [8]
    assert "64 pages of 16 tokens" in result["summary"]


def test_the_decode_loop_is_timed_without_its_prompt(
    one_layer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ModelSource.find(one_layer)
    monkeypatch.setattr(decode.ModelSource, "find", lambda *_: small)
    sizes = ["--tokens", "16", "--page-size", "16", "--repeats", "1"]
    result = decode.main(["--model", "default", "--dtype", "float32", *sizes])
    assert result["tokens_per_second"] == pytest.approx(1e3 / result["step_ms"])
    assert "x the floor" in capsys.readouterr().out


def test_the_decode_loop_runs_over_the_devices_that_have_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(model: Decoder, *_: Any, max_tokens: int, placement: Placement, **__: Any) -> Generation:
        assert all(len(leaf.devices()) == placement.count == 2 for leaf in model.split()[1])
        return Generation([], max_tokens, float(max_tokens))

    monkeypatch.setattr(decode, "generate", generate)
    result = decode.main(["--model", "default", "--repeats", "1", "--tensor-parallel", "2"])
    assert result["step_ms"] == pytest.approx(1e3)
    assert result["hardware"]["devices"] == 2
