"""The runner compiles before the first request and never after it, and keeps one cache."""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention.gpu import Gpu
from model.sampling import NO_TOKEN, USES_PENALTIES, USES_RANDOM, USES_TOP, SampleOutputs
from model.step import StepProgram
from scheduler.predictor import StepLoad
from scheduler.program import Plan
from scheduler.request import Request, Slo
from scheduler.sampling import SamplingParams
from scheduler.step import Sample, SlotSetup, Step
from serve.engine.runner import GarbageError, Runner, StepHandle
from tests.serve.lab import compiled_runner, run, tiny_model
from tests.serve.loads import load, serial

COMPILE = "/jax/core/compile/backend_compile_duration"


@contextmanager
def counted_compilations() -> Iterator[list[str]]:
    """Every program that XLA compiles meanwhile, or fetches from the persistent cache."""
    compiled: list[str] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if event == COMPILE:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def random_load(seed: int) -> list[Request]:
    """The mixed load, with every sampling option in it, in random order and with random prompts."""
    rng = random.Random(seed)
    requests = load(Slo(tpot=rng.choice([0.003, 1.0]), ttft=60.0))
    for index in range(6):
        options = SamplingParams(
            temperature=rng.choice([0.0, 0.5, 1.5]),
            top_k=rng.choice([0, 5]),
            top_p=rng.choice([1.0, 0.7]),
            min_p=rng.choice([0.0, 0.05]),
            repetition_penalty=rng.choice([1.0, 1.3]),
            presence_penalty=rng.choice([0.0, 0.4]),
            frequency_penalty=rng.choice([0.0, 0.4]),
            logit_bias=rng.choice([(), ((4, 2.0),)]),
            seed=rng.getrandbits(64),
            logprobs=rng.random() < 0.5,
            top_logprobs=rng.choice([0, 3]),
        )
        prompt = tuple(rng.randrange(131) for _ in range(rng.randrange(1, 60)))
        plan = Plan(stages=(serial(rng.randrange(1, 20)),))
        requests.append(Request(id=f"any-{index}", prompt=prompt, program=plan, sampling=options))
    rng.shuffle(requests)
    return requests


def test_the_compile_counter_sees_a_compilation() -> None:
    with counted_compilations() as compiled:
        jax.jit(lambda x: x * 3 + 1)(jnp.arange(17)).block_until_ready()
    assert compiled


@pytest.mark.parametrize("policy", ["off", "eager", "taper"])
def test_nothing_compiles_while_serving(runner: Runner, policy: str) -> None:
    """Over a randomized load with every sampling option, preemptions included."""
    with counted_compilations() as compiled:
        record = run(runner, random_load(len(policy)), policy=policy, num_pages=40)
    assert {step.bucket for step in record.steps} > {runner.buckets.largest}, "one bucket proves little"
    assert compiled == []


def test_the_gpu_kernels_serve_the_same_tokens(runner: Runner) -> None:
    """Forks, joins, prompt chunks and preemption through tiles; the kernels are interpreted."""
    kernels = compiled_runner(tiny_model(jnp.float32), (16,), backend=Gpu(interpret=True))
    requests = load(Slo(tpot=1.0, ttft=60.0))
    record = run(kernels, requests, policy="eager", num_pages=60)
    assert record.preemptions() > 0
    assert record.answers() == run(runner, requests, policy="eager").answers()


def test_a_steps_memory_is_used_again_once_it_has_ended_and_not_before(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device on the host reads that memory in place."""
    packed: list[np.ndarray] = []
    ended: list[bool] = []

    class Token(Output):
        def is_ready(self) -> bool:
            return ended.pop(0)

    def step(_: StepProgram, weights: Any, cache: Any, slots: Any, vector: np.ndarray, *more: Any) -> Any:
        packed.append(vector)
        return cache, slots, SampleOutputs(*[Token()] * 4)  # type: ignore[arg-type]

    monkeypatch.setattr(StepProgram, "__call__", step)
    monkeypatch.setattr(runner, "_read", defaultdict(deque))
    small, large = (runner.probe(bucket, 1) for bucket in (min(runner.buckets), max(runner.buckets)))
    for each in (small, small, large):
        ended[:] = [False]
        runner.launch(each)
    assert len({id(vector) for vector in packed}) == 3, "each is still read"
    for is_ready in (True, False, True):
        ended[:] = [is_ready]
        runner.launch(small)
    first, second, _, third, fourth, fifth = packed
    assert third is first
    assert not any(fourth is other for other in (first, second))
    assert fifth is second, "they end in their order"


def test_the_cache_is_donated_and_never_copied(runner: Runner) -> None:
    before = runner.cache
    run(runner, random_load(1)[:2])
    assert all(page.is_deleted() for layer in before.layers for page in layer)


def test_log_probabilities_come_with_the_sample(runner: Runner) -> None:
    options = SamplingParams(logprobs=True, top_logprobs=3)
    plan = Plan(stages=(serial(5),))
    record = run(runner, [Request(id="r", prompt=(5, 6, 7), program=plan, sampling=options)])
    samples = [event.sample for event in record.events["r"] if hasattr(event, "sample")]
    assert len(samples) == 5
    for sample in samples:
        assert next(token for token, _ in sample.top) == sample.token, "greedy takes the likeliest token"
        assert sample.logprob == pytest.approx(sample.top[0][1])
        assert len(sample.top) == 3
        assert np.all(np.diff([logprob for _, logprob in sample.top]) <= 0)


class Output:
    """An array on the device that knows what the host asked of it."""

    def __init__(self, *values: Any) -> None:
        self.values, self.asked = values, list[str]()

    def copy_to_host_async(self) -> None:
        self.asked.append("copy")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        self.asked.append("wait")
        return np.array(self.values)


def test_only_what_is_wanted_of_a_step_comes_to_the_host() -> None:
    """Tokens are on their way before anybody waits for them. The last sample is padding."""

    def flown(*wanted: SamplingParams) -> tuple[StepHandle, list[Output]]:
        best = (-0.5, -1.0)
        outputs = [
            Output(5, 6, 0),
            Output(-0.5, -0.25, 0.0),
            Output((5, 1), (6, 2), (0, 0)),
            Output(best, best, best),
        ]
        return StepHandle(SampleOutputs(*outputs), [*wanted], 7), outputs  # type: ignore[arg-type]

    plain, told = SamplingParams(), SamplingParams(logprobs=True, top_logprobs=1)
    handle, outputs = flown(plain, plain)
    assert [output.asked for output in outputs] == [["copy"], [], [], []]
    assert handle.samples() == (Sample(5), Sample(6))
    assert [output.asked for output in outputs] == [["copy", "wait"], [], [], []]
    handle, _ = flown(plain, told)
    assert handle.samples() == (Sample(5), Sample(6, -0.25, ((6, -0.5),)))


@pytest.mark.parametrize(
    ("token", "what"), [(7, "token 7"), (NO_TOKEN, "not numbers"), (-(2**31), "token -2")]
)
def test_a_token_that_there_is_not_is_no_sample(token: int, what: str) -> None:
    outputs = SampleOutputs(*[Output(3, token, 99)] * 4)  # type: ignore[arg-type]
    assert StepHandle(outputs, [SamplingParams()], 7).samples() == (Sample(3),)
    with pytest.raises(GarbageError, match=what):
        StepHandle(outputs, [SamplingParams()] * 2, 7).samples()


def test_all_that_a_slot_is_told_arrives_however_much_it_is(runner: Runner) -> None:
    """More slots than one call of the assign program sets, more history than one call counts."""
    many = Runner.HISTORY + 3
    generated = tuple(index % 7 for index in range(many))
    given = (*[3] * Runner.HISTORY, 9)
    options = [SamplingParams(temperature=1.0 + slot) for slot in range(Runner.ASSIGNMENTS + 4)]
    step = runner.probe(min(runner.buckets), 1)  # samples in slots of its own
    first, last = len(step.entries), len(step.entries) + len(options)
    setups = tuple(SlotSetup(first + i, each, given, generated) for i, each in enumerate(options))
    runner.launch(replace(step, slots=setups))
    temperatures = runner.slots.options["temperature"][first:last]
    np.testing.assert_array_equal(temperatures, [each.temperature for each in options])
    for slot in (first, last - 1):
        counts = np.bincount(generated, minlength=131)
        np.testing.assert_array_equal(runner.slots.generated_count[slot], counts)
        assert np.flatnonzero(runner.slots.given_seen[slot]).tolist() == [3, 9]


def test_a_step_takes_the_sampler_that_its_own_samples_need(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even in slots that were used with other options before."""
    used: list[int] = []
    call = StepProgram.__call__

    def counted(program: StepProgram, *arguments: Any) -> Any:
        used.append(arguments[-1])
        return call(program, *arguments)

    monkeypatch.setattr(StepProgram, "__call__", counted)
    for requests, options, uses in (
        (1, SamplingParams(presence_penalty=1.0), USES_PENALTIES),
        (2, SamplingParams(temperature=1.0, top_k=3), USES_RANDOM | USES_TOP),
        (1, SamplingParams(), 0),
    ):
        plan = Plan(stages=(serial(3),))
        run(
            runner,
            [
                Request(id=f"r{index}", prompt=(5, 6, 7), program=plan, sampling=options)
                for index in range(requests)
            ],
        )
        assert set(used) == {uses}
        used.clear()


def test_kv_is_priced_by_what_the_pools_pages_took_more(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of 1 s, and 1 ms more for each row and each position of KV."""
    asked: list[int] = []

    def seconds(step: Step, repeats: int) -> float:
        asked.append(repeats)
        return 1.0 + 1e-3 * sum(entry.rows + entry.own.length for entry in step.entries)

    monkeypatch.setattr(runner, "seconds", seconds)
    latency, page_size = runner.measure(repeats=3), runner.config.page_size
    for bucket in runner.buckets:
        assert latency.rows_seconds(bucket) == pytest.approx(1.0 + 1e-3 * bucket * (1 + page_size))
    more = latency.predict(StepLoad(1, private_kv=500)) - latency.predict(StepLoad(1))
    assert more == pytest.approx(0.5)
    assert asked == [3] * (len([*runner.buckets]) + 1)


def test_a_measured_staircase_is_positive_and_ascending(runner: Runner) -> None:
    latency = runner.measure(repeats=1)
    seconds = [latency.rows_seconds(bucket) for bucket in runner.buckets]
    assert seconds[0] > 0
    assert seconds == sorted(seconds)
    assert latency.predict(StepLoad(3, private_kv=1000)) >= latency.rows_seconds(3)
