"""Numbers that operators look at."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.predictor import PredictionAccuracy
from scheduler.program import Plan, SerialStage
from scheduler.request import Request
from scheduler.scheduler import SchedulerLoad
from scheduler.stopping import Stopping
from serve.config import ServerConfig
from serve.door import Load, Programs
from serve.lateness import CAUSES
from serve.served import Platform, Served
from serve.server.metrics import Metrics
from serve.server.service import Service
from taper_client import AsyncClient
from taper_client.errors import RETRY_AFTER, ServiceError
from tests.serve.fakes import STEP, FakeEngine, finished, served_model
from tests.serve.server.own_loop import answer, in_loop, serving


def test_a_step_is_measured_against_its_prediction():
    metrics = Metrics()
    metrics.observe_step(STEP)
    value = metrics.registry.get_sample_value
    assert value("taper_step_seconds_sum") == 0.03
    assert value("taper_step_prediction_ratio_sum") == 1.5
    assert round(value("taper_step_externality_seconds_sum") or 0, 6) == 0.005


def test_what_a_launch_takes_the_host_and_how_long_the_device_waits_for_it_are_measured():
    metrics = Metrics()
    metrics.observe_step(STEP._replace(launching=1.5, launched=1.75, idle=0.125))
    metrics.observe_step(STEP._replace(launching=1.5, launched=1.625))
    value = metrics.registry.get_sample_value
    assert value("taper_step_launch_seconds_sum") == 0.375
    assert value("taper_step_idle_seconds_sum") == 0.125
    assert value("taper_step_idle_seconds_bucket", {"le": "0.0"}) == 1, "for one it did not wait"


def test_width_counts_the_branches_of_each_request_that_advance():
    metrics = Metrics()
    metrics.observe_step(STEP)
    assert metrics.registry.get_sample_value("taper_width_branches_count") == 2
    assert metrics.registry.get_sample_value("taper_width_branches_sum") == 3


def late(metrics: Metrics) -> dict[str, float | None]:
    value = metrics.registry.get_sample_value
    return {cause: value("taper_late_steps_total", {"cause": cause}) for cause in CAUSES}


def test_late_steps_are_counted_by_cause_once_the_step_after_them_is_known():
    metrics, none = Metrics(), dict.fromkeys(CAUSES, 0.0)
    assert late(metrics) == none, "all causes are there from the start"
    metrics.observe_step(STEP._replace(idle=0.009))
    assert late(metrics) == none
    metrics.observe_step(STEP._replace(seconds=0.02))
    metrics.observe_step(STEP)
    assert late(metrics) == none | {"launch": 1}
    metrics.observe_step(STEP._replace(seconds=0.01))  # makes up for the one before it
    assert late(metrics) == none | {"launch": 1, "seen": 1}


def test_what_equals_a_bound_counts_as_within_it():
    metrics = Metrics()
    metrics.observe_step(STEP._replace(widths=(1, 2, 3, 5, 64, 65)))
    counts = {
        le: metrics.registry.get_sample_value("taper_width_branches_bucket", {"le": le})
        for le in ("1.0", "2.0", "3.0", "4.0", "6.0", "32.0", "64.0", "+Inf")
    }
    assert [*counts.values()] == [1, 2, 3, 3, 4, 4, 5, 6]


def test_a_step_without_extra_work_or_without_a_prediction_adds_nothing_false():
    metrics = Metrics()
    metrics.observe_step(STEP._replace(predicted=0.01))  # less than its baseline
    metrics.observe_step(STEP._replace(predicted=0.0))
    value = metrics.registry.get_sample_value
    assert (value("taper_step_externality_seconds_sum"), value("taper_step_seconds_count")) == (0.0, 2)
    assert value("taper_step_prediction_ratio_count") == 1


def test_finished_requests_add_up():
    metrics = Metrics()
    for preemptions in (0, 3):
        event = finished("r", 5)
        metrics.observe_finished(replace(event, usage=replace(event.usage, preemptions=preemptions)))
    value = metrics.registry.get_sample_value
    kinds = ("prompt", "cached", "completion")
    tokens = {kind: value("taper_tokens_total", {"kind": kind, "tenant": ""}) for kind in kinds}
    assert tokens == {"prompt": 4, "cached": 2, "completion": 10}
    assert value("taper_preemptions_total") == 3
    assert value("taper_slo_total", {"target": "tpot", "met": "true"}) == 2
    assert value("taper_slo_total", {"target": "ttft", "met": "false"}) == 2
    assert value("taper_ttft_seconds_sum") == 1.0
    assert value("taper_tpot_seconds_sum") == 0.02


def test_a_request_that_ended_for_a_reason_is_a_refusal_unless_its_caller_wanted_that():
    metrics = Metrics()
    for code, reason in (("OK", ""), ("CANCELLED", "ABORTED"), *[("RESOURCE_EXHAUSTED", "QUEUE_FULL")] * 2):
        metrics.count_request(code, "", reason)
    value = metrics.registry.get_sample_value
    assert value("taper_requests_total", {"code": "RESOURCE_EXHAUSTED", "tenant": ""}) == 2
    reasons = {reason: value("taper_refusals_total", {"reason": reason}) for reason in RETRY_AFTER}
    assert reasons == dict.fromkeys(RETRY_AFTER, 0) | {"ABORTED": None, "QUEUE_FULL": 2}


def test_what_an_alert_asks_for_the_increase_of_is_there_before_it_happens():
    metrics = Metrics()
    value = metrics.registry.get_sample_value
    assert value("taper_slo_total", {"target": "ttft", "met": "false"}) == 0
    metrics.count_request("OK", "search")
    assert value("taper_requests_total", {"code": "INTERNAL", "tenant": "search"}) == 0
    names = {sample.name for family in metrics.registry.collect() for sample in family.samples}
    assert not any(name.endswith("_created") for name in names)


def gauges_of(metrics: Metrics) -> dict[str, tuple[float, dict[str, str]]]:
    return {
        sample.name: (sample.value, sample.labels)
        for family in metrics.registry.collect()
        if family.type == "gauge"
        for sample in family.samples
    }


BUSY = Load(
    SchedulerLoad(1, 2, 3, 4, 5),
    PredictionAccuracy(6.0, 7.0, 8.0),
    0.0,
    0,
    9.0,
    10.0,
    Programs(11, 12, 13, 14),
)


def test_every_figure_of_the_load_has_a_gauge_of_its_own_with_the_name_of_the_model():
    metrics = Metrics()
    metrics.watch_load(lambda: BUSY, "tiny")
    gauges = gauges_of(metrics)
    assert {name: value for name, (value, _) in gauges.items()} == {
        "taper_running_requests": 1,
        "taper_running_branches": 2,
        "taper_queued_requests": 3,
        "taper_kv_used_tokens": 4,
        "taper_kv_capacity_tokens": 5,
        "taper_kv_used_ratio": 0.8,
        "taper_prediction_bias": 6,
        "taper_prediction_mape": 7,
        "taper_prediction_coverage": 8,
        "taper_unloaded_step_seconds": 9,
        "taper_start_gap_seconds": 10,
    }
    assert [labels for _, labels in gauges.values()] == [{"model_name": "tiny"}] * len(gauges)


def test_programs_are_counted_by_how_the_engine_got_them_and_when():
    metrics = Metrics()
    metrics.watch_load(lambda: BUSY, "tiny")
    counts = {
        (when, how): metrics.registry.get_sample_value("taper_programs_total", {"when": when, "how": how})
        for when in ("start", "serving")
        for how in ("compiled", "cached")
    }
    assert [*counts.values()] == [11, 12, 13, 14]


def test_autoscalers_find_the_load_under_the_names_that_vllm_gives_it():
    metrics = Metrics()
    metrics.watch_load_as_vllm(lambda: BUSY, "tiny", page_size=2)
    both = {"model_name": "tiny", "engine": "0"}
    assert gauges_of(metrics) == {
        "vllm:num_requests_running": (1, both),
        "vllm:num_requests_waiting": (3, both),
        "vllm:kv_cache_usage_perc": (0.8, both),
        "vllm:cache_config_info": (1, both | {"block_size": "2", "num_gpu_blocks": "2"}),
    }


def test_without_a_kv_cache_none_of_it_is_used():
    metrics = Metrics()
    metrics.watch_load(lambda: Load(SchedulerLoad(0, 0, 0, 0, 0), PredictionAccuracy(), 0.0, 0), "tiny")
    assert gauges_of(metrics)["taper_kv_used_ratio"][0] == 0


def test_the_model_that_is_served_is_told():
    metrics = Metrics()
    metrics.describe_model("tiny")
    assert metrics.registry.get_sample_value("taper_model_info", {"model_name": "tiny"}) == 1


def test_the_targets_of_the_time_between_tokens_are_told():
    metrics = Metrics()
    metrics.describe_targets(0.05, 0.03)
    told = [
        metrics.registry.get_sample_value("taper_tpot_slo_seconds", {"target": target})
        for target in ("default", "least")
    ]
    assert told == [0.05, 0.03]


def test_the_devices_that_share_the_model_are_counted():
    metrics = Metrics()
    metrics.describe_devices("NVIDIA H200", 2)
    assert metrics.registry.get_sample_value("taper_devices", {"kind": "NVIDIA H200"}) == 2


def test_load_is_read_when_it_is_scraped():
    metrics, engine = Metrics(), FakeEngine()
    stage = SerialStage(stopping=Stopping(max_tokens=1))
    metrics.watch_load(engine.load, "tiny")
    value, name = metrics.registry.get_sample_value, {"model_name": "tiny"}
    assert value("taper_running_requests", name) == 0
    engine.submit(Request(id="r", prompt=(1,), program=Plan(stages=(stage,))), print)
    assert value("taper_running_requests", name) == 1
    assert value("taper_kv_used_tokens", name) == 10
    assert value("taper_prediction_coverage", name) == 1.0


@in_loop
async def test_requests_are_counted_by_how_they_ended():
    engine = FakeEngine(answer)
    async with serving(engine) as (service, address), AsyncClient(address) as client:
        await client.complete("go")
        await client.load()
        with pytest.raises(ServiceError):
            await client.complete([999])
        with pytest.raises(ServiceError):
            await client.set_policy("fast")
    value = service.metrics.registry.get_sample_value
    assert value("taper_requests_total", {"code": "OK", "tenant": ""}) == 1
    assert value("taper_requests_total", {"code": "INVALID_ARGUMENT", "tenant": ""}) == 1
    assert value("taper_tokens_total", {"kind": "completion", "tenant": ""}) == 2
    assert value("taper_refusals_total", {"reason": "INVALID_FIELD"}) == 1, "of Generate alone"


@pytest.mark.parametrize("wanted", [False, True])
def test_the_load_has_vllms_names_too_if_they_are_asked_for(wanted: bool):
    service = Service(ServerConfig(port=0, vllm_metric_names=wanted))
    service.serve(Served(engine=FakeEngine(), model=served_model(), platform=Platform(page_size=50)))
    value, model = service.metrics.registry.get_sample_value, {"model_name": "tiny"}
    assert value("taper_model_info", model) == 1
    assert value("taper_kv_used_ratio", model) == 0.01
    vllms = model | {"engine": "0"}
    assert value("vllm:kv_cache_usage_perc", vllms) == (0.01 if wanted else None)
    pages = {"block_size": "50", "num_gpu_blocks": "20"}
    assert value("vllm:cache_config_info", vllms | pages) == (1 if wanted else None)
