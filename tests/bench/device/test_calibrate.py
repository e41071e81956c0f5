from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from bench.device import calibrate
from bench.device.calibrate import Point, default_name, fit, non_negative
from bench.device.probe import probe, shapes
from scheduler.predictor import StepLatencyModel, StepLoad
from scheduler.step import Step

BUCKETS = (1, 8, 16, 64)


def test_a_profile_is_named_after_the_device_and_the_model() -> None:
    assert default_name("NVIDIA H100 80GB HBM3", "qwen3-32b") == "h100-qwen3-32b"
    assert default_name("NVIDIA H200", "qwen3-32b") == "h200-qwen3-32b"
    assert default_name("cpu", "taper-tiny") == "cpu-taper-tiny"
    assert default_name("NVIDIA H100 80GB HBM3", "qwen3-32b", 2) == "h100x2-qwen3-32b"


def test_least_squares_without_negative_coefficients() -> None:
    rng = np.random.default_rng(0)
    design = rng.random((50, 4))
    wanted = np.array([1.0, 0.5, 0.0, 2.0])
    found = non_negative(design / (design @ wanted)[:, None])
    assert found == pytest.approx(wanted, abs=1e-4)
    assert (non_negative(np.stack([np.ones(9), -np.arange(9.0)], axis=1)) >= 0).all()


def test_what_is_never_there_costs_nothing() -> None:
    assert non_negative(np.array([[1.0, 0.0], [1.0, 0.0]])).tolist() == [1.0, 0.0]


def test_a_constant_is_what_all_rows_took_over_their_number() -> None:
    points = [Point(1, StepLoad(1, raw_kv=1), 0.010), Point(8, StepLoad(8, raw_kv=9), 0.017)]
    assert fit(points)["constant"]["line"] == [0.0, pytest.approx(0.003)]


class Steady:
    """A runner whose steps take 1, 2 and then 9 seconds."""

    def __init__(self, max_context: int) -> None:
        self.config = SimpleNamespace(buckets=(1, 8), num_pages=400, page_size=16)
        self.model_config = SimpleNamespace(max_context=max_context)
        self.timed: Counter[Step] = Counter()

    def seconds(self, step: Step, repeats: int) -> float:
        if repeats == calibrate.SETTLING:
            return 100.0
        self.timed[step] += 1
        return (0.0, 1.0, 2.0, 9.0)[self.timed[step]]


def test_a_point_is_the_median_of_its_rounds_and_shorter_than_the_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = [probe(shape, page_size=16)[0] for shape in shapes((1, 8), num_pages=400, page_size=16)]
    ends = [max(entry.start + entry.rows for entry in step.entries) for step in steps]
    for max_context in (max(ends), max(ends) + 1):
        monkeypatch.setattr(calibrate, "clock", itertools.count().__next__)
        points = calibrate.measure(Steady(max_context), budget_seconds=2.5)  # type: ignore[arg-type]
        assert {point.seconds for point in points} == {2.0}
        assert len(points) == sum(end < max_context for end in ends)


def test_what_a_staircase_took_is_found_again() -> None:
    steps = {1: 0.010, 8: 0.0105, 16: 0.012, 64: 0.02}
    truth = StepLatencyModel.from_profile(
        {
            "forms": {
                "staircase": {
                    "buckets": steps,
                    "costs": {"shared_kv": 1e-6, "private_kv": 2e-6, "items": 5e-6, "chunk_context": 1e-7},
                    "margin": 0.0,
                }
            }
        }
    )
    probes = [probe(shape, page_size=16) for shape in shapes(BUCKETS, num_pages=400, page_size=16)]
    points = [Point(step.bucket, load, truth.predict(load)) for step, load in probes]
    forms = fit(points)
    assert forms["staircase"]["mape"] < 0.003
    assert forms["staircase"]["costs"]["private_kv"] == pytest.approx(2e-6, rel=0.1)
    for other in ("linear", "linear-unique", "constant", "staircase-raw"):
        assert forms[other]["mape"] > 3 * forms["staircase"]["mape"]
        model = StepLatencyModel.from_profile({"forms": forms}, form=other)
        assert model.predict(StepLoad(9, raw_kv=100)) > 0
