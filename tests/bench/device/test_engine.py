"""bench.device.engine on the embedded model: the engine runs, its steps are compared with the device's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.device import decode, engine


def test_the_engine_is_timed_against_its_own_executable(tmp_path: Path) -> None:
    sizes = ["--requests", "4", "--prompt-tokens", "4", "--new-tokens", "24", "--kv-levels", "16"]
    server = ["--buckets", "8", "--num-pages", "64", "--compilation-cache", str(tmp_path / "cache")]
    result = engine.main([*sizes, "--json", str(tmp_path / "out.json"), "--", *server])
    assert json.loads((tmp_path / "out.json").read_text()) == result
    assert result["steady_steps"] > 10
    assert result["wall_over_device"] > 0.5
    assert result["compilations"] == 0
    assert set(result["host"]) == {"schedule", "launch", "samples", "update"}
    assert [row["bucket"] for row in result["buckets"]] == [8]
    assert "64 pages of 16 tokens" in result["summary"]


def test_the_decode_loop_is_timed_without_its_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    result = decode.main(["--model", "default", "--dtype", "float32", "--tokens", "16", "--page-size", "16"])
    assert result["tokens_per_second"] == pytest.approx(1e3 / result["step_ms"])
    assert "x the floor" in capsys.readouterr().out
