"""The offline decode loop, against the dense oracle and itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import Backend
from attention.gpu import Gpu
from attention.reference import Reference
from attention.xla import Xla
from model import decode
from model.checkpoint import load_model
from model.decode import compile_ahead, generate
from model.decoder import Decoder
from model.sampling import USES_ALL, USES_RANDOM, USES_TOP, branch_key
from model.sharding import ON_ONE_DEVICE
from model.weights import hf_tensors, place_model
from scheduler.sampling import SamplingParams
from tests.model.dense import dense_greedy, dense_logits
from tests.sizes import sampled

pytestmark = pytest.mark.usefixtures("quick_compiler")

NAME = "qwen3-gqa2-untied-wide-heads-bf16"
PROMPTS = [[7], [*range(50, 72)], [3, 1, 4, 1, 5, 9, 2, 6, 5]]
TOKENS = 14
# Tests that differ in no shape and in no sampler share a program, which is compiled once.


@pytest.fixture(scope="module")
def model(golden_folder: Callable[[str], Path]) -> Decoder:
    return load_model(str(golden_folder(NAME)), jnp.float32)


@pytest.fixture(scope="module")
def greedy(model: Decoder) -> list[list[int]]:
    """What the dense oracle goes on with after each prompt."""
    tensors = hf_tensors(model)
    return [dense_greedy(tensors, model.config, prompt, TOKENS) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("page_size", "backend"),
    sampled([(4, Xla()), (16, Xla()), (4, Reference())], [(4, Xla())]),
)
def test_every_branch_of_every_prompt_is_the_dense_continuation(
    model: Decoder, greedy: list[list[int]], page_size: int, backend: Backend
) -> None:
    """Prompts of 1, 22 and 9 tokens in one batch; two branches of each."""
    generation = generate(model, PROMPTS, max_tokens=TOKENS, branches=2, page_size=page_size, backend=backend)
    assert generation.ids == [[ids, ids] for ids in greedy]
    assert generation.tokens_per_second > 0


@pytest.mark.full
def test_the_gpu_kernels_generate_the_same(golden_folder: Callable[[str], Path]) -> None:
    """Prompts of 1, 22 and 9 tokens, three branches of each on shared tiles; the kernels are interpreted."""
    model = load_model(str(golden_folder("qwen3-gqa8-untied-sharded")), jnp.float32)
    sampling = SamplingParams(temperature=0.8, seed=5)
    ours, theirs = (
        generate(model, PROMPTS, max_tokens=5, branches=3, sampling=sampling, page_size=4, backend=backend)
        for backend in (Gpu(interpret=True), Xla())
    )
    assert ours.ids == theirs.ids


@pytest.mark.full
@pytest.mark.parametrize("branches", sampled([1, 2], [2]))
def test_draws_are_keyed_by_seed_path_and_position(model: Decoder, branches: int) -> None:
    """Drawn again from the dense oracle's logits. One branch is the trunk; several are a stage's children."""
    seed, temperature = 2**63 + 12345, 0.7
    sampling = SamplingParams(temperature=temperature, seed=seed)
    generation = generate(model, PROMPTS, max_tokens=TOKENS, branches=branches, sampling=sampling)
    tensors = hf_tensors(model)
    for prompt, answers in zip(PROMPTS, generation.ids, strict=True):
        for number, ids in enumerate(answers):
            path = ((0, number),) if branches > 1 else ()
            words = np.array([seed >> 32, seed % 2**32], np.uint32)
            key = jax.random.wrap_key_data(words, impl="threefry2x32")
            key = jax.random.fold_in(key, np.uint32(branch_key(path) % 2**32))
            logits = dense_logits(tensors, model.config, prompt + ids)[len(prompt) - 1 : -1]
            for end, row in enumerate(logits, len(prompt)):
                noise = jax.random.gumbel(jax.random.fold_in(key, end), row.shape, jnp.float32)
                assert ids[end - len(prompt)] == (row / temperature + noise).argmax()
        assert len({tuple(ids) for ids in answers}) == branches


@pytest.mark.full
def test_penalties_count_the_prompt_and_what_was_generated(model: Decoder) -> None:
    sampling = SamplingParams(repetition_penalty=1e6, frequency_penalty=1e6)
    generation = generate(model, PROMPTS, max_tokens=TOKENS, branches=2, sampling=sampling)
    for prompt, answers in zip(PROMPTS, generation.ids, strict=True):
        for ids in answers:
            assert len(set(ids)) == len(ids) == TOKENS
            assert not set(ids) & set(prompt)


def test_each_prompt_is_counted_for_its_own_branches_to_its_last_token(model: Decoder) -> None:
    """7 would always be next, but where it was already."""
    shy = SamplingParams(logit_bias=((7, 1e4),), repetition_penalty=1e6)
    answers = generate(model, [[7], [5], [5, 7, 6]], max_tokens=TOKENS, branches=2, sampling=shy).ids
    begun = [[branch[:2].count(7) for branch in branches] for branches in answers]
    assert begun == [[0, 0], [1, 1], [0, 0]]


def test_a_generated_token_counts_once_and_one_of_the_prompt_never(model: Decoder) -> None:
    """The prompt's last token is fed by the loop as what it generates is, but was not generated."""
    liked = SamplingParams(logit_bias=((7, 1e4),), frequency_penalty=6e3)
    for answers in generate(model, [[7], [7, 5, 7], [5]], max_tokens=TOKENS, branches=2, sampling=liked).ids:
        for ids in answers:
            assert ids[:2] == [7, 7]
            assert 7 not in ids[2:]


@pytest.mark.parametrize(
    ("sampling", "sampler"),
    [
        (None, 0),
        (SamplingParams(temperature=1.0), USES_RANDOM | USES_TOP),
        (SamplingParams(presence_penalty=1.0), USES_ALL),
    ],
)
def test_the_loop_is_compiled_with_the_cheapest_sampler_that_suffices(
    model: Decoder, sampling: SamplingParams | None, sampler: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def compile_generation(*arguments: object) -> Callable[..., tuple[np.ndarray]]:
        taken.append(arguments[4])
        return lambda weights, cache, slots, arrays: (np.zeros_like(arrays.tokens),)

    monkeypatch.setattr(decode, "compile_generation", compile_generation)
    generate(model, PROMPTS, max_tokens=TOKENS, sampling=sampling)
    assert taken == [sampler]


@pytest.mark.parametrize("eos_ids", [(), (0,), (3, 5), range(8), range(9)])
def test_no_token_ends_a_branch_but_those_that_were_given(
    model: Decoder, eos_ids: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[decode.Arrays] = []

    def run(weights: object, cache: object, slots: object, arrays: decode.Arrays) -> tuple[np.ndarray]:
        told.append(arrays)
        return (np.zeros_like(arrays.tokens),)

    monkeypatch.setattr(decode, "compile_generation", lambda *arguments: run)
    generate(model, [[7]], max_tokens=TOKENS, eos_ids=eos_ids)
    assert {token for token in told[0].eos_ids.tolist() if token >= 0} == set(eos_ids)


def test_a_branch_ends_before_the_end_of_sequence_token(model: Decoder, greedy: list[list[int]]) -> None:
    end = greedy[1][5]
    expected = [ids[: ids.index(end)] if end in ids else ids for ids in greedy]
    assert len(expected[1]) <= 5
    how = {"branches": 2, "page_size": 4, "backend": Xla()}
    generation = generate(model, PROMPTS, max_tokens=TOKENS, eos_ids=(end,), **how)
    assert generation.ids == [[ids, ids] for ids in expected]


def test_the_loop_ends_with_its_last_branch_and_looks_once_a_stride(model: Decoder) -> None:
    """Every token ends a branch, or none does, since none of those that would is in the vocabulary."""
    vocab = model.config.vocab_size
    stepped = [
        generate(model, PROMPTS, max_tokens=3 * decode.STRIDE, eos_ids=eos_ids).steps
        for eos_ids in (range(vocab), range(vocab, 2 * vocab))
    ]
    assert stepped == [decode.STRIDE, 3 * decode.STRIDE]


def test_prompts_of_other_lengths_and_other_options_use_the_same_program(model: Decoder) -> None:
    sampling = SamplingParams(temperature=0.5, top_p=0.9)
    generate(model, PROMPTS, max_tokens=TOKENS, branches=2, eos_ids=(1,), sampling=sampling)
    compiled = decode.compile_generation.cache_info().misses
    others, sampling = [[4], [5, 6], [7, 8, 9]], SamplingParams(temperature=1.0, top_k=3)
    generate(model, others, max_tokens=TOKENS, branches=2, eos_ids=(2, 3), sampling=sampling)
    assert decode.compile_generation.cache_info().misses == compiled


@pytest.mark.full
def test_a_program_compiled_ahead_of_the_weights_is_the_one_that_generates(model: Decoder) -> None:
    abstract = place_model(Decoder(model.config, jnp.float32), ON_ONE_DEVICE)
    ahead = compile_ahead(
        abstract, PROMPTS, max_tokens=TOKENS, branches=3, backend=Xla(), placement=ON_ONE_DEVICE
    )
    compiled = decode.compile_generation.cache_info().misses
    assert ahead.memory_analysis() is not None
    generate(model, PROMPTS, max_tokens=TOKENS, branches=3, backend=Xla())
    assert decode.compile_generation.cache_info().misses == compiled


def test_the_donated_cache_is_not_copied(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = []
    compile_generation = decode.compile_generation

    def keep(*arguments: object) -> jax.stages.Compiled:
        programs.append(compile_generation(*arguments))
        return programs[-1]

    monkeypatch.setattr(decode, "compile_generation", keep)
    generate(model, [[1, 2]], max_tokens=480, branches=8, eos_ids=range(model.config.vocab_size))
    config = model.config
    cache = 2 * config.num_layers * 8 * 480 * config.num_kv_heads * config.head_dim * 4
    memory = programs[0].memory_analysis()
    assert memory.alias_size_in_bytes > cache
    assert memory.temp_size_in_bytes < cache / config.num_layers


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "a prompt"),
        ([[]], {}, "at least one token"),
        ([[1], [259]], {}, r"0\.\.258"),
        ([[1] * 500], {}, "context, 512"),
        ([[1]], {"max_tokens": 0}, "at least one token"),
        ([[1]], {"branches": 0}, "one branch"),
        ([[1]], {"sampling": SamplingParams(seed=2**64)}, "64 bits"),
    ],
)
def test_what_cannot_be_generated_is_refused(
    model: Decoder, prompts: list[list[int]], options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **({"max_tokens": 20} | options))


def test_a_model_that_comes_to_what_is_no_number_is_told(model: Decoder) -> None:
    structure, weights = model.split()
    broken = structure.merge(tuple(jnp.full_like(each, jnp.nan) for each in weights))
    with pytest.raises(ValueError, match="not numbers"):
        generate(broken, PROMPTS, max_tokens=TOKENS, branches=2, page_size=4, backend=Xla())
