"""Profiles: what fits this server, and whether it is to be believed."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from attention.gpu import Gpu
from model.config import PRESETS
from model.peer_memory import PeerMemory
from model.sharding import ON_ONE_DEVICE, Placement
from scheduler.predictor import StepLatencyModel, StepLoad
from serve.config import ServerConfig
from serve.engine import calibration, startup
from serve.engine.calibration import conditions, load_profile, matching, shipped

H200 = conditions("NVIDIA H200", PRESETS["qwen3-32b"], "bfloat16", "gpu", ON_ONE_DEVICE)
NOT_SERVED_FROM = {"h200x2-qwen3-32b"}
"""Profiles of steps that were timed one by one only: bench.device.predictor has added nothing to them."""
TINY = ["--model", "default", "--buckets", "4", "--num-pages", "64", "--compilation-cache", "None"]


def test_every_shipped_profile_gives_every_form_of_the_predictor() -> None:
    assert "h200-qwen3-32b" in shipped()
    for name in shipped():
        profile = load_profile(name)
        for form in profile["forms"]:
            model = StepLatencyModel.from_profile(profile, form=form)
            assert 0.0 < model.rows_seconds(1) <= model.rows_seconds(model.buckets.largest)
        assert {"hardware", "versions", "command", "shape"} <= profile.keys()
        assert ("serving" in profile) is (name not in NOT_SERVED_FROM)


def test_a_profile_fits_its_device_type_and_shape_whatever_the_models_name() -> None:
    (found,) = matching(H200)
    assert found["name"] == "h200-qwen3-32b"
    assert not [*matching(H200 | {"device": "NVIDIA H100"})]
    assert not [*matching(H200 | {"dtype": "float32"})]
    assert not [*matching(H200 | {"backend": "xla"})]
    assert not [*matching(conditions("NVIDIA H200", PRESETS["qwen3-8b"], "bfloat16", "gpu", ON_ONE_DEVICE))]


def test_a_profile_fits_no_other_number_of_devices_nor_another_way_to_add_up() -> None:
    nccl = Placement.over(PRESETS["qwen3-32b"], 2)
    reached = replace(nccl, memory=PeerMemory(jnp.zeros(2), jnp.zeros(2)))
    over = partial(conditions, "NVIDIA H200", PRESETS["qwen3-32b"], "bfloat16", "gpu")
    (found,) = matching(over(reached))
    assert found["name"] == "h200x2-qwen3-32b"
    assert not [*matching(over(nccl))]
    assert not [*matching({**over(reached), "tensor_parallel": 3})]


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 64},
        {"num_layers": 63},
        {"num_heads": 32},
        {"num_kv_heads": 4},
        {"head_dim": 64},
        {"intermediate_size": 64},
        {"vocab_size": 64},
        {"tie_embeddings": True},
        {"architecture": "llama"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_profile_fits_no_other_shape(change: dict[str, Any]) -> None:
    other = replace(PRESETS["qwen3-32b"], **change)
    assert not [*matching(conditions("NVIDIA H200", other, "bfloat16", "gpu", ON_ONE_DEVICE))]


def test_a_cpus_profile_is_taken_by_name_alone() -> None:
    profile = load_profile("cpu-taper-tiny")
    assert profile["device"] == "cpu"
    assert not [*matching({"device": "cpu"})]


def test_what_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="h200-qwen3-32b"):
        load_profile("h300")


# --- what a server starts with -----------------------------------------------------------------------------


class TimedRunner:
    """A runner whose steps were measured to take `seconds`."""

    def __init__(self, seconds: float, placement: Placement = ON_ONE_DEVICE) -> None:
        self.model_config = PRESETS["qwen3-32b"]
        self.dtype = type("Dtype", (), {"name": "bfloat16"})
        self.config = type("Config", (), {"backend": Gpu(), "placement": placement})
        self.buckets = [8]
        self._seconds = seconds

    def measure(self) -> StepLatencyModel:
        return StepLatencyModel({8: self._seconds})

    def probe_load(self, bucket: int, pages_each: int) -> StepLoad:
        return StepLoad(bucket, private_kv=512, items=8, raw_kv=512)


PREDICTED = StepLatencyModel.from_profile(load_profile("h200-qwen3-32b"), (8,)).predict(
    StepLoad(8, private_kv=512, items=8, raw_kv=512)
)
"""What the profile says of the probe."""


def started_with(
    seconds: float,
    device: str = "NVIDIA H200",
    placement: Placement = ON_ONE_DEVICE,
    **options: Any,
) -> tuple[StepLatencyModel, str]:
    runner: Any = TimedRunner(seconds, placement)
    return startup.predictor_for(ServerConfig(**options), runner, device)


def test_a_server_starts_from_the_profile_that_fits() -> None:
    model, source = started_with(0.0166)
    assert source == "profile h200-qwen3-32b, staircase"
    assert model.rows_seconds(8) == load_profile("h200-qwen3-32b")["forms"]["staircase"]["buckets"]["8"]
    assert started_with(0.0166, predictor="linear")[1] == "profile h200-qwen3-32b, linear"


def test_it_measures_where_none_fits_or_is_wanted_or_it_is_far_off() -> None:
    for found in (
        started_with(0.0166, device="NVIDIA H100"),
        started_with(0.0166, placement=Placement.over(PRESETS["qwen3-32b"], 8)),
        started_with(0.0166, profile="measure"),
        started_with(PREDICTED * 1.26),
        started_with(PREDICTED * 0.74),
    ):
        assert found[1] == "measured at start"
    for factor in (0.76, 1.24):
        assert started_with(PREDICTED * factor)[1] == "profile h200-qwen3-32b, staircase"


def test_a_profile_may_miss_by_a_quarter_of_what_it_says_of_the_very_step() -> None:
    """Which reads KV: what the profile says of its rows alone is less."""
    profile = StepLatencyModel.from_profile(load_profile("h200-qwen3-32b"), [8])
    said = profile.predict(StepLoad(8, private_kv=512, items=8, raw_kv=512))
    for miss, believed in ((0.74, False), (0.76, True), (1.24, True), (1.2499, True), (1.2501, False)):
        assert (started_with(miss * said)[1] != "measured at start") is believed, miss


def test_a_profile_that_was_asked_for_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(load_profile("h200-qwen3-32b") | {"name": "mine"}))
    assert started_with(1.0, device="any", profile=str(path))[1] == "profile mine, staircase"


def test_a_form_for_comparison_needs_a_profile() -> None:
    with pytest.raises(ValueError, match="--predictor linear needs a --profile, and none fits"):
        started_with(0.0166, device="any", predictor="linear")


def test_profiles_are_where_the_package_says() -> None:
    assert calibration.FOLDER.is_dir()
