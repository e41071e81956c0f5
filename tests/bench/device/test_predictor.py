"""Predictions against a running engine's steps, and against the device's time of the same steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.device import calibrate, predictor
from bench.device.predictor import Recorder, errors_of, serving, summarize
from bench.simulate.profile import Profile
from scheduler.predictor import StepLatencyModel, StepLoad
from scheduler.step import FinishedStep, Forecast, Step

pytestmark = pytest.mark.usefixtures("quick_compiler")


def step(bucket: int, predicted: float, seconds: float) -> FinishedStep:
    forecast = Forecast(StepLoad(bucket), predicted, predicted, predicted, deferred=())
    return FinishedStep(Step(0, (), (), bucket), forecast, seconds)


def test_errors_are_relative_to_what_was_predicted() -> None:
    errors = errors_of([0.010, 0.020], [0.011, 0.018])
    assert errors == pytest.approx({"steps": 2, "bias": 0.0, "mape": 0.1, "median_error": 0.1})


def test_a_summary_tells_the_buckets_apart_and_judges_those_with_enough_steps() -> None:
    steps = [(step(8, 0.010, 0.0101), 0.02)] * 150 + [(step(16, 0.010, 0.012), 0.02)] * 50
    found = summarize(steps)
    assert found["buckets"]["8"]["bias"] == pytest.approx(0.01)
    assert found["buckets"]["16"]["bias"] == pytest.approx(0.2)
    assert found["largest_bias_of_a_bucket"] == pytest.approx(0.01)
    assert found["coverage"] == 0.75


def test_the_simulator_gets_each_buckets_factor_and_the_noise_around_it() -> None:
    still = StepLatencyModel({8: 0.010, 16: 0.020, 64: 0.030})
    eights = [step(8, 0.0, 0.010 * (1.1 + 0.001 * n)) for n in range(-50, 51)]
    rare = [step(16, 0.0, 0.020 * 1.5)] * 10
    found = serving(eights + rare, still)
    assert found["factors"] == pytest.approx({8: 1.1, 16: 1.1, 64: 1.1})
    assert found["noise"][0] == pytest.approx(1.05 / 1.1 - 1.0)
    assert found["noise"][len(found["noise"]) // 2] == pytest.approx(0.0)
    assert found["noise"] == sorted(found["noise"])
    assert found["steps"] == 101


def test_the_margin_is_the_one_before_the_step_was_learned_from() -> None:
    latency = StepLatencyModel({8: 0.010}, margin=0.07)
    recorder = Recorder()
    recorder.watch(latency)
    for _ in range(40):
        latency.observe(StepLoad(8), 0.012)
    assert recorder.margins[0] == 0.07
    assert recorder.margins[-1] > 0.1
    assert latency.accuracy.snapshot().bias > 0.0


@pytest.mark.full
def test_a_server_is_calibrated_and_its_predictions_are_measured(
    tmp_path: Path, compiled: str, one_layer: str
) -> None:
    server = ["--model", one_layer, "--buckets", "4", "32", "--num-pages", "96", "--page-size", "8"]
    server += ["--compilation-cache", compiled]
    profile = tmp_path / "tiny.json"
    points = tmp_path / "points.json"
    calibrate.main(["--budget-seconds", "0", "--profile", str(profile), "--json", str(points), "--", *server])
    record = json.loads(profile.read_text())
    assert {"hardware", "versions", "model", "shape", "forms"} <= record.keys()
    assert "points" not in record
    assert all(point["seconds"] > 0 for point in json.loads(points.read_text())["points"])

    measured = ["--seconds", "3", "--skip", "0.5", "--scale", "0.05", "--rate", "4", "--replays", "3"]
    out = ["--into", str(profile), "--json", str(tmp_path / "out.json")]
    result = predictor.main([*measured, *out, "--", *server, "--profile", str(profile)])
    assert json.loads((tmp_path / "out.json").read_text()) == result
    assert f"profile {record['name']}, staircase" in result["summary"]
    assert result["end_to_end"]["steps"] > 20
    assert result["device"]["predicted"]["steps"] == 3
    simulated = Profile.load(str(profile))
    assert [*simulated.bucket_seconds] == [4, 32]
    assert simulated.num_pages == 96
    assert 0 < simulated.latency().rows_seconds(1) <= simulated.latency().rows_seconds(32)
