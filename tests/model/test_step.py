"""A step feeds packed rows, samples where it is told to, and leaves everything else as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.gpu import Gpu
from attention.layout import ItemCapacity
from attention.xla import Xla
from model.checkpoint import load_model
from model.config import ModelConfig
from model.decoder import Decoder
from model.kv_cache import KVCache
from model.sampling import (
    SAMPLERS,
    USES_ALL,
    USES_LOGPROBS,
    USES_RANDOM,
    USES_TOP,
    SampleInputs,
    SampleOutputs,
    SlotState,
)
from model.sharding import ON_ONE_DEVICE, Placement
from model.step import NOWHERE, StepBuffer, StepInputs, StepLayout, StepProgram, compile_step, forward
from model.weights import hf_tensors, place_model, random_weights
from tests.model.checkpoints import CHECKPOINTS, GREEDY_TOKENS, Golden
from tests.model.dense import dense_logits
from tests.model.paged import Feed, Sequence, step_inputs
from tests.sizes import sampled

pytestmark = pytest.mark.usefixtures("quick_compiler")

PAGE_SIZE = 8
NUM_PAGES = 2000
SLOTS = 4
LAYOUT = StepLayout(
    Xla(), ItemCapacity.for_bucket(24, NUM_PAGES, PAGE_SIZE, pages_per_read=20), PAGE_SIZE, samples=4
)


class Device:
    """A model with its cache and slots, stepped through one compiled program."""

    def __init__(self, model: Decoder):
        config = self.config = model.config
        self.cache = KVCache.abstract(Xla(), config, NUM_PAGES, PAGE_SIZE, model.dtype).zeros()
        self.slots = SlotState.create(SLOTS, config.vocab_size, 2)
        structure, self.weights = model.split()
        self.program = compile_step(
            structure,
            self.weights,
            self.cache,
            self.slots,
            layout=LAYOUT,
            max_top_logprobs=3,
        )

    def step(self, *feeds: Feed, sampled: bool = True) -> SampleOutputs:
        inputs = step_inputs(feeds, LAYOUT, sampled=sampled)
        self.cache, self.slots, outputs = self.program(
            self.weights, self.cache, self.slots, LAYOUT.pack(inputs), USES_LOGPROBS
        )
        return jax.tree.map(np.asarray, outputs)


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return CHECKPOINTS["qwen3-gqa2-untied-wide-heads-bf16"].config


@pytest.fixture(scope="module")
def model(config: ModelConfig) -> Decoder:
    return random_weights(Decoder(config, jnp.float32), 1, ON_ONE_DEVICE)


@pytest.fixture(scope="module")
def device(model: Decoder) -> Device:
    return Device(model)


@pytest.mark.parametrize(
    "name", sampled(["qwen3-gqa8-untied-sharded", "llama-gqa3-tied"], ["qwen3-gqa8-untied-sharded"])
)
def test_64_greedy_tokens_are_those_of_transformers(name: str, golden_folder: Callable[[str], Path]) -> None:
    device = Device(load_model(str(golden_folder(name)), jnp.float32))
    sequence = Sequence(pages=list(range(NUM_PAGES - 1, 0, -7)), page_size=PAGE_SIZE, slot=2)
    chosen = [device.step(sequence.feed(CHECKPOINTS[name].prompt)).token[0]]
    while len(chosen) < GREEDY_TOKENS:
        chosen.append(device.step(sequence.feed([-1 - sequence.slot])).token[0])
    np.testing.assert_array_equal(chosen, Golden.load(name).greedy)


def test_chunks_and_decoding_in_one_batch_match_the_dense_oracle(
    device: Device, model: Decoder, config: ModelConfig
) -> None:
    """Two prompts, one in uneven chunks while the other already decodes."""
    first = Sequence(pages=[3, 14, 1], page_size=PAGE_SIZE, slot=0)
    second = Sequence(pages=[8, 0, 19, 5], page_size=PAGE_SIZE, slot=3)
    texts: dict[int, list[int]] = {0: [5, 6, 7], 3: [*range(40, 61)]}
    device.step(first.feed(texts[0][:2]), second.feed(texts[3][:9]), sampled=False)
    device.step(first.feed(texts[0][2:]), second.feed(texts[3][9:10]))
    texts[0].append(int(device.slots.last_token[first.slot]))
    device.step(second.feed(texts[3][10:]), first.feed([-1]))
    for sequence, text in ((first, texts[0]), (second, texts[3])):
        logits = dense_logits(hf_tensors(model), config, text)
        assert device.slots.last_token[sequence.slot] == logits[-1].argmax()


def test_forked_branches_share_pages_and_never_see_each_other(
    device: Device, model: Decoder, config: ModelConfig
) -> None:
    """Three children of an 11-token parent, whose second page is partial, in one step."""
    prompt = [*range(100, 111)]
    parent = Sequence(pages=[6, 13], page_size=PAGE_SIZE)
    seeds = [[1, 2, 3], [4], [5, 6]]
    children = [
        Sequence(pages=[7 + 2 * i], page_size=PAGE_SIZE, slot=i, ancestors=(parent,), start=len(prompt))
        for i in range(len(seeds))
    ]
    device.step(parent.feed(prompt), sampled=False)
    outputs = device.step(*(child.feed(seed) for child, seed in zip(children, seeds, strict=True)))
    expected = [dense_logits(hf_tensors(model), config, prompt + seed)[-1] for seed in seeds]
    np.testing.assert_array_equal(device.slots.last_token[:3], [logits.argmax() for logits in expected])
    best = [(logits - np.logaddexp.reduce(logits)).max() for logits in expected]
    np.testing.assert_allclose(np.sort(outputs.logprob[:3]), np.sort(best), atol=1e-4)


def test_a_kv_join_reads_siblings_at_overlapping_positions(
    device: Device, model: Decoder, config: ModelConfig
) -> None:
    """After the join a segment sees the prefix and both branches, and continues at the longer one's end."""
    prompt, left, right, after = [*range(10, 15)], [21, 22, 23, 24], [31, 32], [41, 42]
    parent = Sequence(pages=[2], page_size=PAGE_SIZE)
    branches = [
        Sequence(pages=[page], page_size=PAGE_SIZE, slot=slot, ancestors=(parent,), start=5)
        for page, slot in ((4, 1), (16, 2))
    ]
    joined = Sequence(pages=[9], page_size=PAGE_SIZE, slot=0, ancestors=(parent, *branches), start=9)
    device.step(parent.feed(prompt), sampled=False)
    device.step(branches[0].feed(left), branches[1].feed(right))
    outputs = device.step(joined.feed(after))

    tokens = prompt + left + right + after
    positions = [*range(5), *range(5, 9), *range(5, 7), *range(9, 11)]
    mask = np.tril(np.ones((13, 13), bool))
    mask[9:11, 5:9] = False
    logits = dense_logits(hf_tensors(model), config, tokens, positions, mask)[-1]
    assert outputs.token[0] == logits.argmax()
    np.testing.assert_allclose(
        outputs.logprob[0], logits.max() - np.logaddexp.reduce(logits), atol=1e-4, rtol=0
    )


def test_a_step_writes_only_the_positions_that_it_feeds(device: Device) -> None:
    before = jax.tree.map(np.array, device.cache)
    device.step(Sequence(pages=[17], page_size=PAGE_SIZE).feed([1, 2, 3]))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(device.cache), strict=True):
        changed = (old != np.asarray(new)).any(axis=(1, 3))
        assert {(int(page), int(offset)) for page, offset in zip(*changed.nonzero(), strict=True)} == {
            (17, 0),
            (17, 1),
            (17, 2),
        }


def test_a_step_changes_only_the_slots_that_it_samples(device: Device) -> None:
    before = np.array(device.slots.last_token)
    token = device.step(Sequence(pages=[17], page_size=PAGE_SIZE, slot=1).feed([9, 8])).token[0]
    expected = before.copy()
    expected[1] = token
    np.testing.assert_array_equal(device.slots.last_token, expected)


def test_the_cache_and_the_slots_are_updated_in_place(device: Device) -> None:
    cache, slots = device.cache, device.slots
    device.step(Sequence(pages=[17], page_size=PAGE_SIZE).feed([1]))
    assert all(array.is_deleted() for array in jax.tree.leaves((cache, slots)))
    assert not any(array.is_deleted() for array in device.weights)
    parts = {device.program.forward: device.cache, device.program.samplers[0]: device.slots}
    for compiled, donated in parts.items():
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= sum(array.nbytes for array in jax.tree.leaves(donated))
        assert memory.temp_size_in_bytes < device.cache.layers[0][0].nbytes / 2


def test_no_step_on_a_gpu_makes_the_host_wait_for_the_device(device: Device) -> None:
    """As a conditional or a loop of unknown length would: the host fetches what decides."""
    config = replace(device.config, head_dim=16)
    structure, weights = place_model(Decoder(config, jnp.bfloat16), ON_ONE_DEVICE).split()
    layout = StepLayout.for_bucket(config, Gpu(), 16, num_pages=9, page_size=16, samples=4)

    def run(weights: tuple, cache: KVCache, last_token: jax.Array, packed: jax.Array) -> object:
        return forward(structure.merge(weights), cache, last_token, packed, layout=layout)

    program = jax.make_jaxpr(run)(
        weights,
        KVCache.abstract(Gpu(), config, 9, 16, jnp.bfloat16),
        jax.ShapeDtypeStruct((SLOTS,), jnp.int32),
        jax.ShapeDtypeStruct((layout.size,), jnp.int32),
    )
    assert {"pallas_call", "dot_general"} <= primitives(program.jaxpr)
    assert not {"cond", "while"} & primitives(program.jaxpr)
    for sampler in device.program.samplers.values():
        text = sampler.as_text()
        assert " conditional(" not in text
        assert text.count(" while(") == text.count('"known_trip_count"')


def primitives(jaxpr: Any) -> set[str]:
    """The names of all that a program computes, inside its calls and loops too, but not inside kernels."""
    names = set()
    for equation in jaxpr.eqns:
        names.add(equation.primitive.name)
        if equation.primitive.name != "pallas_call":
            for inner in jax.tree.leaves([*equation.params.values()], is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    names |= primitives(inner)
    return names


def test_the_head_runs_for_sampled_rows_only(model: Decoder, config: ModelConfig) -> None:
    structure, weights = model.split()

    def run(weights: tuple, cache: KVCache, last_token: jax.Array, packed: jax.Array) -> object:
        return forward(structure.merge(weights), cache, last_token, packed, layout=LAYOUT)

    jaxpr = jax.make_jaxpr(run)(
        weights,
        KVCache.abstract(Xla(), config, NUM_PAGES, PAGE_SIZE, jnp.float32),
        jax.ShapeDtypeStruct((SLOTS,), jnp.int32),
        jax.ShapeDtypeStruct((LAYOUT.size,), jnp.int32),
    )
    products = [eqn.outvars[0].aval.shape for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert products == [(LAYOUT.samples, config.vocab_size)]


OUTPUTS = (((1,), jnp.int32), ((1,), jnp.float32), ((1, 1), jnp.int32), ((1, 1), jnp.float32))


class Asked(Placement):
    """Keeps what a program is asked to be compiled with, and compiles nothing."""

    __slots__ = ()
    options: ClassVar[list[dict[str, int]]] = []

    def compile(self, *_: Any, gpu_options: Any = None, **__: Any) -> Any:
        self.options.append(dict(gpu_options or {}))
        return MagicMock(spec=jax.stages.Compiled)


@pytest.mark.parametrize(
    ("rows", "limit"),
    [(1, None), (8, 112), (64, 112), (65, None), (128, None), (129, 0), (256, 0), (257, None)],
)
def test_products_of_one_input_are_merged_where_that_is_faster(
    model: Decoder, rows: int, limit: int | None
) -> None:
    Asked.options.clear()
    capacity = ItemCapacity.for_bucket(rows, NUM_PAGES, PAGE_SIZE, pages_per_read=20)
    layout = replace(LAYOUT, capacity=capacity, placement=Asked())
    shapes = KVCache.abstract(Xla(), model.config, NUM_PAGES, PAGE_SIZE, model.dtype)
    slots = SlotState.abstract(SLOTS, model.config.vocab_size, 2)
    compile_step(*model.split(), shapes, slots, layout=layout, max_top_logprobs=1, samplers=(0,))
    step, sampler = Asked.options
    assert step == ({} if limit is None else {"xla_gpu_dot_merger_threshold_mb": limit})
    assert sampler == {}


def program_of(forward: MagicMock, samplers: dict[int, MagicMock]) -> StepProgram:
    inputs = LAYOUT.placement.sharding([None])
    return StepProgram(LAYOUT, inputs, cast(Any, forward), cast(Any, samplers))


def test_a_step_runs_the_cheapest_sampler_that_suffices() -> None:
    forward = MagicMock(spec=jax.stages.Compiled, return_value=(KVCache(()), None, None))
    slots = SlotState.create(SLOTS, 5, 1)
    outputs = SampleOutputs(*(jnp.zeros(shape, dtype) for shape, dtype in OUTPUTS))
    samplers = {options: MagicMock(spec=jax.stages.Compiled) for options in SAMPLERS}
    for sampler in samplers.values():
        sampler.return_value = slots, outputs
    for uses in (0, USES_RANDOM, USES_RANDOM | USES_TOP, USES_LOGPROBS):
        program_of(forward, samplers)((), KVCache(()), slots, np.zeros(1, np.int32), uses)
    assert [sampler.call_count for sampler in samplers.values()] == [1, 2, 1]


def test_a_steps_inputs_travel_to_the_device_once() -> None:
    forward = MagicMock(spec=jax.stages.Compiled, return_value=(KVCache(()), None, None))
    slots, packed = SlotState.create(SLOTS, 5, 1), np.zeros(3, np.int32)
    outputs = SampleOutputs(*(jnp.zeros(shape, dtype) for shape, dtype in OUTPUTS))
    sampler = MagicMock(spec=jax.stages.Compiled, return_value=(slots, outputs))
    program_of(forward, {0: sampler})((), KVCache(()), slots, packed)
    sent = forward.call_args.args[-1]
    assert isinstance(sent, jax.Array)
    assert sampler.call_args.args[-1] is sent


def test_a_step_needs_room_for_the_model_and_for_its_largest_sampler() -> None:
    def part(temp: int, output: int, alias: int) -> MagicMock:
        sizes = {"temp_size_in_bytes": temp, "output_size_in_bytes": output, "alias_size_in_bytes": alias}
        program = MagicMock(spec=jax.stages.Compiled)
        program.memory_analysis.return_value = SimpleNamespace(**sizes)
        return program

    samplers = {0: part(1, 20, 10), 3: part(50, 20, 10), USES_ALL: part(30, 20, 10)}
    assert program_of(part(1000, 500, 400), samplers).working_bytes == 1100 + 60


def inputs_of(rows: int, samples: int) -> StepInputs:
    feeds = [Sequence(pages=[i], page_size=PAGE_SIZE, slot=i).feed([50 + i]) for i in range(samples)]
    feeds.append(Sequence(pages=[10, 11, 12], page_size=PAGE_SIZE).feed([7] * (rows - samples)))
    inputs = step_inputs(feeds, LAYOUT)
    sample = inputs.sample
    return inputs._replace(
        sample=sample._replace(**{n: getattr(sample, n)[:samples] for n in sample._fields})
    )


def test_unpacking_gives_what_was_packed_and_padding_that_does_nothing() -> None:
    inputs = inputs_of(rows=10, samples=3)
    unpacked = jax.tree.map(np.asarray, LAYOUT.unpack(jnp.asarray(LAYOUT.pack(inputs))))
    np.testing.assert_array_equal(unpacked.tokens[:10], inputs.tokens)
    np.testing.assert_array_equal(unpacked.write_page[10:], NOWHERE)
    np.testing.assert_array_equal(unpacked.sample.slot, [*inputs.sample.slot, NOWHERE])
    for name, value in inputs.work._asdict().items():
        np.testing.assert_array_equal(getattr(unpacked.work, name), value)


def test_every_packed_vector_is_in_memory_of_its_own() -> None:
    inputs = inputs_of(rows=10, samples=3)
    first, second = LAYOUT.pack(inputs), LAYOUT.pack(inputs)
    assert first.shape == (LAYOUT.size,)
    assert not np.shares_memory(first, second)
    first[:] = -7
    np.testing.assert_array_equal(LAYOUT.pack(inputs), second)


def test_what_a_vector_is_padded_with_is_laid_out_once_and_not_in_every_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = inputs_of(rows=10, samples=3)
    first = LAYOUT.pack(inputs)
    monkeypatch.setattr(np, "concatenate", MagicMock(side_effect=AssertionError("laid out again")))
    np.testing.assert_array_equal(LAYOUT.pack(inputs), first)


@given(
    st.lists(st.tuples(*[st.integers(1, 4), st.integers(1, 20), st.integers(0, 60)]), min_size=2, max_size=6)
)
@settings(max_examples=50)
def test_a_buffer_holds_nothing_of_the_steps_before(steps: list[tuple[int, int, int]]) -> None:
    """What it packs is what fresh memory would hold, however much longer or shorter the steps before were."""
    buffer, vectors = StepBuffer(LAYOUT), list[np.ndarray]()
    for samples, more, most in steps:
        inputs = inputs_of(rows=samples + more, samples=samples)
        work = jax.tree.map(lambda array: array[:most] if array.ndim else array, inputs.work)  # noqa: B023
        inputs = inputs._replace(work=work)
        vectors.append(buffer.pack(inputs))
        assert vectors[-1] is vectors[0], "it is the same memory"
        np.testing.assert_array_equal(vectors[-1], plainly_packed(inputs))


def plainly_packed(inputs: StepInputs) -> np.ndarray:
    """The arrays end to end, each in a copy of its padding."""
    padded = jax.tree.map(np.array, LAYOUT.unpack(jnp.asarray(LAYOUT.pack(nothing()))))
    for padding, value in zip(jax.tree.leaves(padded), jax.tree.leaves(inputs), strict=True):
        padding[tuple(map(slice, value.shape))] = value
    return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(padded)])


def nothing() -> StepInputs:
    empty = np.zeros(0, np.int32)
    return StepInputs(*[empty] * 4, work=LAYOUT.capacity.empty(), sample=SampleInputs(*[empty] * 5))


def test_a_buffer_that_refused_a_step_packs_the_next_one() -> None:
    buffer, inputs = StepBuffer(LAYOUT), inputs_of(rows=10, samples=3)
    buffer.pack(inputs_of(rows=20, samples=4))
    with pytest.raises(ValueError, match="positions"):
        buffer.pack(inputs._replace(positions=np.zeros(25, np.int32)))
    np.testing.assert_array_equal(buffer.pack(inputs), LAYOUT.pack(inputs))


def test_inputs_larger_than_the_bucket_are_refused_by_name() -> None:
    inputs = inputs_of(rows=10, samples=3)
    with pytest.raises(ValueError, match="positions"):
        LAYOUT.pack(inputs._replace(positions=np.zeros(25, np.int32)))
