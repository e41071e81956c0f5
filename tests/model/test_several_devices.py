"""A model over several devices: the same tokens, few collectives, and no copy of what should be divided."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from attention.gpu import Gpu
from attention.xla import Xla
from bench.hlo import collectives
from model.config import ModelConfig
from model.decode import generate
from model.kv_cache import KVCache, bytes_per_page
from model.sampling import USES_ALL, USES_RANDOM, USES_TOP, SlotState
from model.sharding import ON_ONE_DEVICE, bytes_each
from model.step import StepLayout, StepProgram, compile_step
from scheduler.sampling import SamplingParams
from tests.model.meshes import divisible, meshes, over

pytestmark = pytest.mark.usefixtures("quick_compiler")

PROMPTS = [[1, 2, 3, 4, 5], [7, 8]]
SAMPLINGS = {
    "greedy": SamplingParams(),
    "every option": SamplingParams(
        temperature=1.5,
        top_p=0.9,
        top_k=100,
        min_p=1e-4,
        seed=3,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias=((3, 5.0), (120, 4.0)),
    ),
}


@lru_cache
def decoded(kv_heads: int, count: int, sampling: str, **sizes: int) -> list[list[list[int]]]:
    placement, model = over(divisible(kv_heads, **sizes), count)
    with jax.enable_x64(True):
        options = {"sampling": SAMPLINGS[sampling], "placement": placement}
        return generate(model, PROMPTS, max_tokens=16, branches=3, **options).ids


@pytest.mark.parametrize(("kv_heads", "count"), meshes())
def test_tokens_are_those_of_one_device(kv_heads: int, count: int) -> None:
    assert decoded(kv_heads, count, "every option") == decoded(kv_heads, 1, "every option")
    assert len({token for branches in decoded(kv_heads, count, "every option") for token in branches[0]}) > 4


@pytest.mark.parametrize(("kv_heads", "count"), meshes())
def test_greedy_tokens_are_those_of_one_device(kv_heads: int, count: int) -> None:
    assert decoded(kv_heads, count, "greedy") == decoded(kv_heads, 1, "greedy")


@pytest.mark.full
def test_a_vocabulary_that_cannot_be_divided_is_whole_everywhere() -> None:
    sizes = {"vocab_size": 131, "num_layers": 1}
    assert decoded(2, 4, "every option", **sizes) == decoded(2, 1, "every option", **sizes)


# --- what the devices tell each other -----------------------------------------------------------------------

LAYERS, PAGES, PAGE_SIZE, SLOTS = 3, 256, 16, 8


def compiled(config: ModelConfig, samplers: Sequence[int]) -> StepProgram:
    """A step of four devices."""
    placement, model = over(config, 4, jnp.float32)
    structure, weights = model.split()
    sizes = {"num_pages": PAGES, "page_size": PAGE_SIZE, "samples": 4, "placement": placement}
    return compile_step(
        structure,
        weights,
        KVCache.abstract(Xla(), config, PAGES, PAGE_SIZE, jnp.float32, placement),
        SlotState.abstract(SLOTS, config.vocab_size, 2, placement),
        layout=StepLayout.for_bucket(config, Xla(), 8, **sizes),
        max_top_logprobs=4,
        samplers=samplers,
    )


@pytest.fixture(scope="module")
def step() -> StepProgram:
    """Of a model with two KV heads."""
    return compiled(divisible(2, num_layers=LAYERS), (0, USES_RANDOM | USES_TOP, USES_ALL))


def kinds(program: jax.stages.Compiled) -> Counter[str]:
    return Counter(each.kind for each in collectives(program.as_text()))


def most_numbers(program: jax.stages.Compiled) -> int:
    """In the result of any of its collectives."""
    return max(each.numbers for each in collectives(program.as_text()))


def test_a_step_has_two_all_reduces_a_layer_and_one_for_the_embedding(step: StepProgram) -> None:
    assert kinds(step.forward) == {"all-reduce": 2 * LAYERS + 1}


def test_a_sampler_tells_bests_and_sums_and_never_loops_over_a_collective(step: StepProgram) -> None:
    """The best of the logits; the greatest, eight digits of each of two thresholds (XLA adds up the mass of
    which top-p takes a part beside the first) and the best of the noisy logits; for log-probabilities the
    totals and the best few."""
    greedy, drawn, every = (kinds(step.samplers[uses]) for uses in step.samplers)
    assert greedy == {"all-gather": 1}
    assert drawn == {"all-gather": 2, "all-reduce": 1 + 2 * 8}
    assert every == {"all-gather": 4, "all-reduce": 1 + 2 * 8}


def test_devices_with_the_whole_vocabulary_each_sample_for_themselves() -> None:
    step = compiled(divisible(2, num_layers=1, vocab_size=131), (0,))
    assert kinds(step.forward) == {"all-reduce": 2}
    assert not kinds(step.samplers[0])


def test_no_sampler_gathers_logits(step: StepProgram) -> None:
    vocab, samples = divisible(2).vocab_size, step.layout.samples
    for program in step.samplers.values():
        assert most_numbers(program) < samples * vocab / 2


def test_the_slots_are_updated_in_place(step: StepProgram) -> None:
    slots = SlotState.abstract(SLOTS, divisible(2).vocab_size, 2, step.layout.placement)
    for program in step.samplers.values():
        assert program.memory_analysis().alias_size_in_bytes >= bytes_each(slots)


def test_a_step_has_room_for_the_reads_of_one_device_s_heads(step: StepProgram) -> None:
    sizes: dict[str, Any] = {"num_pages": PAGES, "page_size": PAGE_SIZE, "samples": 4}
    heads = StepLayout.for_bucket(divisible(2), Gpu(), 8, placement=step.layout.placement, **sizes)
    part = replace(divisible(2), num_heads=2, num_kv_heads=1)
    assert heads.capacity == StepLayout.for_bucket(part, Gpu(), 8, **sizes).capacity
    assert heads.capacity != StepLayout.for_bucket(divisible(2), Gpu(), 8, **sizes).capacity


def test_the_cache_is_updated_in_place_and_nothing_as_large_is_allocated(step: StepProgram) -> None:
    placement, config = step.layout.placement, divisible(2, num_layers=LAYERS)
    pages = PAGES * bytes_per_page(Xla(), config, PAGE_SIZE, jnp.float32, placement)
    analysis = step.forward.memory_analysis()
    assert analysis.alias_size_in_bytes >= pages
    assert analysis.temp_size_in_bytes < pages / LAYERS


# --- what each of them has ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kv_heads", "count", "kept"), [(8, 4, 1), (2, 4, 2), (1, 8, 8)])
def test_each_device_has_its_part_of_the_pages_and_of_what_slots_count(
    kv_heads: int, count: int, kept: int
) -> None:
    """Where there are fewer KV heads than devices, `kept` devices have the same one."""
    config = divisible(kv_heads)
    placement, _ = over(config, count, jnp.float32)
    (whole, all_counts), (part, counts) = (
        (KVCache.abstract(Xla(), config, 5, 4, jnp.float32, where), SlotState.abstract(6, 136, 2, where))
        for where in (ON_ONE_DEVICE, placement)
    )
    assert bytes_each(part) * count == bytes_each(whole) * kept
    assert bytes_each(part) == 5 * bytes_per_page(Xla(), config, 4, jnp.float32, placement)
    assert bytes_each(counts.generated_count) * count == bytes_each(all_counts.generated_count)
    assert bytes_each(counts.last_token) == bytes_each(all_counts.last_token)


def test_each_device_has_its_part_of_the_weights() -> None:
    config = replace(divisible(8), tie_embeddings=False)
    (_, whole), (_, part) = over(config, 1, jnp.float32), over(config, 8, jnp.float32)
    norms = sum(leaf.nbytes for leaf in whole.split()[1] if leaf.ndim == 1)
    assert bytes_each(part.split()[1]) == (bytes_each(whole.split()[1]) - norms) / 8 + norms
