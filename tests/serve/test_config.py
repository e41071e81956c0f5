"""What an operator chooses is checked before minutes of loading."""

from __future__ import annotations

import pickle
from dataclasses import fields

import pytest

from serve.config import GROUPS, OptionError, ServerConfig, naming


def test_the_defaults_are_loopback_and_valid():
    assert ServerConfig().host == "127.0.0.1"


def test_the_defaults_are_those_that_were_measured_to_be_best():
    config = ServerConfig()
    assert (config.policy, config.rho, config.repay) == ("taper", 1, 8)
    assert (config.reserve, config.fill) == (0.1, True)
    assert (config.tpot_slo_ms, config.ttft_slo_ms) == (50, 5000)
    assert (config.profile, config.predictor, config.prefix_cache) == ("auto", "staircase", True)


def test_what_is_left_open_follows_the_platform():
    cpu, gpu = (ServerConfig().for_platform(platform) for platform in ("cpu", "gpu"))
    assert (cpu.dtype, cpu.page_size, max(cpu.buckets or ())) == ("float32", 16, 64)
    assert (gpu.dtype, gpu.page_size, max(gpu.buckets or ())) == ("bfloat16", 64, 512)
    chosen = ServerConfig(dtype="float32", page_size=32, buckets=(4,)).for_platform("gpu")
    assert (chosen.dtype, chosen.page_size, chosen.buckets) == ("float32", 32, (4,))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("policy", "fast"),
        ("page_size", 0),
        ("num_pages", -1),
        ("max_context", 0),
        ("max_chunk", 0),
        ("max_queue", 0),
        ("max_branches", 0),
        ("max_depth", 0),
        ("default_max_tokens", 0),
        ("ttft_slo_ms", 0.0),
        ("tpot_slo_ms", 0.0),
        ("tpot_slo_ms", float("nan")),
        ("buckets", ()),
        ("buckets", (8, 0)),
        ("buckets", (8, 2**31)),
        ("num_pages", 2**31),
        ("max_top_logprobs", 2**31),
        ("max_message_bytes", 2**29),
        ("max_client_calls", 2**29),
        ("read_memory_mb", 2**42 + 1),
        ("drain_timeout", 1e10),
        ("step_timeout", float("inf")),
        ("repay", -0.1),
        ("repay", float("nan")),
        ("step_timeout", -1.0),
        ("drain_timeout", -1.0),
        ("drain_timeout", float("nan")),
        ("max_logit_bias", -1),
        ("max_top_logprobs", -1),
        ("port", -1),
        ("port", 65536),
        ("metrics_port", -1),
        ("metrics_port", 65536),
        ("seed", -1),
        ("seed", 2**32),
        ("rho", 1.01),
        ("rho", -0.01),
        ("reserve", 1.01),
        ("reserve", -0.01),
    ],
)
def test_what_cannot_work_is_refused_by_name(option, value):
    with pytest.raises(OptionError, match=f"^--{option.replace('_', '-')}[ :]"):
        ServerConfig(**{option: value})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((name, value) for name in ("rho", "reserve") for value in (0.0, 1.0)),
        *((name, 1) for name in ("page_size", "num_pages", "max_chunk", "max_context", "max_queue")),
        *((name, 1) for name in ("max_branches", "max_depth", "default_max_tokens")),
        ("buckets", (1,)),
        *(
            (name, 0)
            for name in ("max_logit_bias", "max_top_logprobs", "repay", "step_timeout", "drain_timeout")
        ),
        *((name, value) for name in ("port", "metrics_port") for value in (0, 65535)),
        ("seed", 2**32 - 1),
        ("repay", 0.0),
        ("tpot_slo_ms", 0.5),
        ("num_pages", 2**31 - 1),
        ("max_message_bytes", 2**29 - 1),
        ("max_client_calls", 2**29 - 1),
        ("read_memory_mb", 2**42),
        ("drain_timeout", 1e9),
    ],
)
def test_what_just_works_is_taken(option, value):
    assert getattr(ServerConfig(**{option: value}), option) == value


def test_options_are_grouped_each_once():
    grouped = [option.name for group in GROUPS.values() for option in fields(group)]
    assert sorted(grouped) == sorted(option.name for option in fields(ServerConfig))
    assert all(group.__doc__ for group in GROUPS.values())


def test_a_config_and_its_faults_travel_between_processes():
    config = ServerConfig(port=1, buckets=(4, 8))
    fault = OptionError.must_be("port", "odd", 2)
    assert pickle.loads(pickle.dumps(config)) == config
    assert str(pickle.loads(pickle.dumps(fault))) == str(fault) == "--port must be odd, not 2"


def test_a_form_that_cannot_be_measured_needs_a_profile():
    with pytest.raises(OptionError, match=r"^--predictor linear needs a --profile") as caught:
        ServerConfig(predictor="linear", profile="measure")
    assert caught.value.options == ("predictor", "profile")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("what is wrong"), "--step-log: what is wrong"),
        (OSError("what is wrong"), "--step-log: what is wrong"),
        (FileNotFoundError(2, "No such file", "steps"), "--step-log: steps: No such file"),
        (OptionError("--port is odd", "port"), "--port is odd"),
    ],
)
def test_what_is_found_wrong_elsewhere_is_told_with_the_flag(error, line):
    with pytest.raises(OptionError) as caught, naming("step_log"):
        raise error
    assert str(caught.value) == line
