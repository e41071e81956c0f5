from __future__ import annotations

import numpy as np
import pytest

from bench.device.calibrate import Point, default_name, fit, non_negative
from bench.device.probe import probe, shapes
from scheduler.predictor import StepLatencyModel, StepLoad

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
