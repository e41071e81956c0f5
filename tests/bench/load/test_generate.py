from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.load import generate
from bench.load.generate import Arrivals, Load, best_peer, decode_floor, main
from model.config import PRESETS
from model.find import model_config, model_folder

DEVICE = {"hardware": {"device": "a card"}, "versions": {"jax": "0"}, "copy_tb_s": 4.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The embedded model's tokenizer, and a model of one layer."""
    embedded = model_folder("default")
    assert embedded
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded / name, tmp_path)
    config = replace(model_config("default"), num_layers=1)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    return tmp_path


@pytest.mark.full
def test_a_real_server_is_measured_and_peers_that_fail_are_reported(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {
        "device": DEVICE,
        "static sdpa": {"tokens_per_second": 2.0, "seconds": 6.0},
        "continuous sdpa": {"error": "ImportError: no such thing"},
    }
    monkeypatch.setattr(generate, "child", lambda part, load: parts[part])
    out = folder / "generate.json"
    result = main(
        [
            *("--model", str(folder), "--dtype", "float32", "--json", str(out)),
            *("--prompts", "3", "--prompt-tokens", "9", "--new-tokens", "4", "--buckets", "8"),
            *("--interval-ms", "2.5"),
            *("--peers", "transformers", "--settings", "static sdpa", "continuous sdpa"),
            *("--", "--max-chunk", "8"),
        ]
    )
    assert json.loads(out.read_text()) == result
    ours = result["taper"]
    assert ours["tokens_per_second"] == pytest.approx(3 * 4 / ours["seconds"])
    assert ours["options"][-2:] == ["--max-chunk", "8"]
    assert ours["interval_ms"] == 2.5
    assert result["best_peer"] == "static sdpa"
    assert result["ratio"] == pytest.approx(ours["tokens_per_second"] / 2)
    printed = capsys.readouterr().out
    assert "no such thing" in printed
    assert "x the best of transformers (static sdpa)" in printed


def test_decoding_counts_while_every_request_decodes() -> None:
    """The second request starts two seconds late: from 3 to 5 s both decode, two tokens a second."""
    arrivals = Arrivals(np.array([[1.0, 2, 3, 4, 5], [3, 4, 5, 6, 7]]))
    assert arrivals.total == 7
    assert arrivals.decoded_together() == (2.0, (3 + 1 + 1 + 1) / 2)


def test_a_pace_does_not_depend_on_how_far_apart_a_step_s_messages_come() -> None:
    """Sixteen requests, a token of each every 10 ms, spread over 3 ms or over none."""
    steps = 0.01 * np.arange(30)
    for spread in (0.0, 0.0002):
        arrivals = Arrivals(steps + spread * np.arange(16)[:, None])
        assert arrivals.decoded_together() == (pytest.approx(1600), pytest.approx(15.5, abs=0.6))


def test_a_pace_counts_the_tokens_of_every_message_but_the_first() -> None:
    """Three tokens a message, every 30 ms: 100 tokens a second."""
    arrivals = Arrivals(np.repeat(0.03 * np.arange(9), 3)[None])
    assert arrivals.decoded_together() == (pytest.approx(100), 15)


def test_requests_that_never_decode_together_have_no_rate() -> None:
    assert Arrivals(np.array([[1.0, 2], [2, 3]])).decoded_together() is None
    assert Arrivals(np.array([[1.0, 2, 3], [4, 5, 6]])).decoded_together() is None


def test_the_floor_is_every_weight_and_every_position_once() -> None:
    load = Load("qwen3-8b", "bfloat16", prompts=64, prompt_tokens=512, new_tokens=128, seed=0)
    floor = decode_floor(load, answer_tokens=64, copy_tb_s=4.0)
    config = PRESETS["qwen3-8b"]
    assert floor["weight_bytes"] == pytest.approx(2 * (8.19e9 - config.vocab_size * 4096), rel=1e-3)
    assert floor["kv_bytes"] == 64 * 576 * 2 * 36 * 8 * 128 * 2
    assert floor["tokens_per_second"] == pytest.approx(64e3 / floor["step_ms"])


def test_every_run_has_prompts_of_its_own() -> None:
    load = Load("default", "float32", prompts=3, prompt_tokens=5, new_tokens=2, seed=1)
    assert np.shape(load.ids(0)) == (3, 5)
    assert load.ids(0) == load.ids(0) != load.ids(1)
    other = replace(load, seed=2)
    seeds = [seed for each in (load, other) for run in range(2) for seed in each.seeds(run)]
    assert len(seeds) == len({*seeds}) == 12


def test_a_part_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Load("no/such/model", "float32", prompts=1, prompt_tokens=1, new_tokens=1, seed=0)
    assert "Error" in generate.child("static sdpa", load)["error"]


def test_the_best_peer_is_the_fastest_that_ran() -> None:
    rates = {
        "slow": {"tokens_per_second": 2.0},
        "failed": {"error": "no"},
        "fast": {"tokens_per_second": 3.0},
    }
    assert best_peer({"peers": rates}) == ("fast", 3.0)
    assert best_peer({"peers": {"failed": {"error": "no"}}}) is None
