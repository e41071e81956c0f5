"""`taper-decode`: a whole generation in one jitted loop on the device. No scheduler, no server.

It is the server's independent oracle: it lays out its own pages and work lists, once, for the final lengths.
Each prompt but for its last token is read first, into pages that all of its branches share. Then every
branch feeds that last token as its own first row, on pages of its own, and what it sampled from there on.
Inside the loop only the valid counts of the branches' pages change.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax

from attention import BACKENDS
from attention.layout import WHOLE, WorkList
from model.checkpoint import LoadFormat, load_model, model_folder
from model.kv_cache import KVCache
from model.qwen3 import ModelStructure, Qwen3
from model.sampling import (
    SampleInputs,
    Sampling,
    SlotState,
    assign,
    branch_key,
    pack_assignments,
    sample,
)
from model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jaxtyping import Array, Int32


@dataclass(frozen=True, slots=True)
class Generation:
    """What was generated: `ids[prompt][branch]`, without the end-of-sequence token that ended a branch.

    `seconds` is the time of the loop on the device, reading the prompts included, compiling not.
    """

    ids: list[list[list[int]]]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return sum(len(branch) for branches in self.ids for branch in branches) / self.seconds


def generate(
    model: Qwen3,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    branches: int = 1,
    sampling: Sampling | None = None,
    eos_ids: Sequence[int] = (),
    page_size: int = 16,
    backend: str = "xla",
) -> Generation:
    """Continues every prompt (token ids) in `branches` branches, until `eos_ids` or `max_tokens`.

    The random key of a token is folded from the seed, the branch's path and the token's position: the path is
    that of a server's request without stages for one branch, and with one parallel stage of branches that
    begin with nothing for several. All prompts are read in one pass.

    Raises:
      ValueError: an empty prompt, an id outside the vocabulary, more tokens than the model's context, or a
        seed of more than 64 bits.
    """
    sampling = replace(sampling or Sampling(), logprobs=False)
    _check(model, prompts, max_tokens, branches)
    if not 0 <= sampling.seed < 2**64:
        raise ValueError(f"a seed has 64 bits: 0..{2**64 - 1}, not {sampling.seed}")
    plan = _lay_out(prompts, branches, max_tokens, page_size, sampling.flags, eos_ids)
    cache = KVCache.create(model.config, plan.num_pages, page_size, model.dtype)
    slots = _slots(model, prompts, branches, sampling)
    structure, weights = model.split()
    arguments = weights, cache, slots, plan.arrays
    program = compile_generation(structure, _Shapes.of(arguments), backend)
    started = time.perf_counter()
    tokens, *_ = program(*arguments)
    tokens = np.asarray(tokens)
    seconds = time.perf_counter() - started
    rows = [_until(row, eos_ids) for row in tokens.T.tolist()]
    return Generation([rows[i : i + branches] for i in range(0, len(rows), branches)], seconds)


def _check(model: Qwen3, prompts: Sequence[Sequence[int]], max_tokens: int, branches: int) -> None:
    if not prompts or max_tokens < 1 or branches < 1:
        raise ValueError("there must be a prompt, and at least one token and one branch to generate")
    vocab, context = model.config.vocab_size, model.config.max_context
    for prompt in prompts:
        if not prompt:
            raise ValueError("a prompt needs at least one token")
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            raise ValueError(f"a prompt's token ids must be in 0..{vocab - 1}, the model's vocabulary")
        if len(prompt) + max_tokens > context:
            raise ValueError(
                f"{len(prompt)} prompt tokens and {max_tokens} new ones exceed the model's context, {context}"
            )


def _until(tokens: list[int], eos_ids: Sequence[int]) -> list[int]:
    """The tokens before the first end-of-sequence one; -1 where the loop had ended."""
    ends = {-1, *eos_ids}
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


# --- layout -------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Rows of the pass that reads the prompts: where their KV goes, and what they read."""

    tokens: Int32[Any, " rows"]
    positions: Int32[Any, " rows"]
    write_page: Int32[Any, " rows"]
    write_offset: Int32[Any, " rows"]
    work: WorkList


class Arrays(NamedTuple):
    """What the device is told.

    prompts     all prompt tokens but each prompt's last
    start       rotary position of each branch's first row
    tail_pages  the branches' own pages
    work        what the branches' rows read at the end; the references of `tail_pages` come last
    branch_key  model.sampling.branch_key of each branch
    flags       model.sampling's USES_ bits
    eos_ids     tokens that end a branch, padded with -1
    tokens      all -1: where the tokens go
    """

    prompts: Rows
    start: Int32[Any, " branches"]
    tail_pages: Int32[Any, "branches tail_pages"]
    work: WorkList
    branch_key: Int32[Any, " branches"]
    flags: Int32[Any, ""]
    eos_ids: Int32[Any, " eos"]
    tokens: Int32[Any, "max_tokens branches"]


@dataclass(frozen=True, slots=True)
class Plan:
    arrays: Arrays
    num_pages: int


def _lay_out(
    prompts: Sequence[Sequence[int]],
    branches: int,
    max_tokens: int,
    page_size: int,
    flags: int,
    eos_ids: Sequence[int],
) -> Plan:
    """Pages 0, 1, … to the prompts one after the other, then to the branches."""
    shared = np.array([len(prompt) - 1 for prompt in prompts])
    shared_pages = -(-shared // page_size)
    first_page = np.cumsum(shared_pages) - shared_pages
    # Padded to a power of two, so that prompts of other lengths can use the same program.
    rows = 1 << int(max(shared.sum(), 32) - 1).bit_length()
    refs = rows // page_size + len(prompts)
    valid = np.zeros(refs, np.int32)
    for length, page in zip(shared, first_page, strict=True):
        valid[page : page - -length // page_size] = page_size
        if length % page_size:
            valid[page + length // page_size] = length % page_size
    count = len(prompts) * branches
    tail = -(-max_tokens // page_size)
    tail_pages = refs + np.arange(count * tail, dtype=np.int32).reshape(count, tail)
    keys = [branch_key(((0, branch),) if branches > 1 else ()) for branch in range(branches)]
    arrays = Arrays(
        prompts=_prompt_rows(prompts, rows, first_page, valid, refs + count * tail, page_size),
        start=np.repeat(shared, branches).astype(np.int32),
        tail_pages=tail_pages,
        work=_branch_work(valid, first_page, shared_pages, tail_pages, branches),
        branch_key=np.array(keys * len(prompts), np.int32),
        flags=np.array(flags, np.int32),
        eos_ids=np.pad(np.array(eos_ids, np.int32), (0, 8 - len(eos_ids) % 8), constant_values=-1),
        tokens=np.full((max_tokens, count), -1, np.int32),
    )
    return Plan(arrays, num_pages=refs + count * tail)


def _prompt_rows(
    prompts: Sequence[Sequence[int]],
    size: int,
    first_page: np.ndarray,
    valid: np.ndarray,
    nowhere: int,
    page_size: int,
) -> Rows:
    """One causal item for each prompt; the rows past the prompts', of `size`, write to `nowhere`."""
    tokens, positions, page, offset = (np.zeros(size, np.int32) for _ in range(4))
    page[:] = nowhere
    lengths = np.array([len(prompt) - 1 for prompt in prompts])
    row = 0
    for prompt, length, first in zip(prompts, lengths, first_page, strict=True):
        ordinal, rows = np.arange(length), slice(row, row + length)
        tokens[rows], positions[rows] = prompt[:-1], ordinal
        page[rows], offset[rows] = first + ordinal // page_size, ordinal % page_size
        row += length
    work = WorkList(
        item_pages=np.stack([first_page, -(-lengths // page_size)], axis=1).astype(np.int32),
        item_rows=np.stack([np.cumsum(lengths) - lengths, lengths], axis=1).astype(np.int32),
        item_causal=np.zeros(len(prompts), np.int32),
        page_ids=np.arange(len(valid), dtype=np.int32),
        page_valid=valid,
        num_items=np.array(len(prompts), np.int32),
        num_single=np.array(0, np.int32),
    )
    return Rows(tokens, positions, page, offset, work)


def _branch_work(
    valid: np.ndarray,
    first_page: np.ndarray,
    shared_pages: np.ndarray,
    tail_pages: np.ndarray,
    branches: int,
) -> WorkList:
    """One item for each branch's tail, then one for each prompt that all of its branches read."""
    refs, (count, tail), prompts = len(valid), tail_pages.shape, len(first_page)
    tails = np.stack([tail_pages[:, 0], np.full(count, tail)], axis=1)
    shared = np.stack([first_page, shared_pages], axis=1)
    single_rows = np.stack([np.arange(count), np.ones(count)], axis=1)
    group_rows = np.stack([branches * np.arange(prompts), np.full(prompts, branches)], axis=1)
    return WorkList(
        item_pages=np.concatenate([tails, shared]).astype(np.int32),
        item_rows=np.concatenate([single_rows, group_rows]).astype(np.int32),
        item_causal=np.full(count + prompts, WHOLE, np.int32),
        page_ids=np.arange(refs + count * tail, dtype=np.int32),
        page_valid=np.concatenate([valid, np.zeros(count * tail, np.int32)]),
        num_items=np.array(count + prompts, np.int32),
        num_single=np.array(count, np.int32),
    )


def _slots(model: Qwen3, prompts: Sequence[Sequence[int]], branches: int, sampling: Sampling) -> SlotState:
    """A slot for each branch, whose last token is its prompt's last."""
    count, vocab, bias = len(prompts) * branches, model.config.vocab_size, max(1, len(sampling.logit_bias))
    slots = SlotState.create(count, vocab, bias)
    assignments = [(slot, sampling) for slot in range(count)]
    packed = pack_assignments(assignments, capacity=count, slots=count, vocab=vocab, max_bias=bias)
    slots = assign(slots, jnp.asarray(packed))
    given = np.zeros((count, vocab), bool)
    for slot in range(count):
        given[slot, list(prompts[slot // branches])] = True
    last = np.repeat(np.array([prompt[-1] for prompt in prompts], np.int32), branches)
    return slots._replace(last_token=jnp.asarray(last), given_seen=jnp.asarray(given))


# --- the program --------------------------------------------------------------------------------------------


def decode_loop(
    weights: tuple[Any, ...],
    cache: KVCache,
    slots: SlotState,
    arrays: Arrays,
    *,
    structure: ModelStructure,
    backend: str,
) -> tuple[Int32[Array, "max_tokens branches"], KVCache, SlotState]:
    """Reads the prompts, then samples until every branch has ended. The cache and slots may be donated."""
    model = structure.merge(weights)
    rows = arrays.prompts
    _, cache = model.forward(
        rows.tokens, rows.positions, cache, rows.write_page, rows.write_offset, rows.work, backend
    )
    max_tokens, count = arrays.tokens.shape
    page_size, num_tail_refs = cache.page_size, arrays.tail_pages.size
    every = jnp.arange(count, dtype=jnp.int32)

    def unfinished(carry: tuple[Any, ...]) -> Array:
        step, _, ended, *_ = carry
        return (step < max_tokens) & ~ended.all()

    def feed(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, tokens, ended, cache, slots = carry
        fed, page, offset = slots.last_token, step // page_size, step % page_size
        positions = arrays.start + step
        hidden, cache = model.forward(
            fed,
            positions,
            cache,
            arrays.tail_pages[:, page],
            jnp.broadcast_to(offset, (count,)),
            arrays.work._replace(page_valid=valid_after(step)),
            backend,
        )
        inputs = SampleInputs(
            row=every,
            slot=every,
            branch_key=arrays.branch_key,
            position=positions + 1,
            count_fed=jnp.broadcast_to((step > 0).astype(jnp.int32), (count,)),
            flags=arrays.flags,
        )
        slots, outputs = sample(model.logits(hidden), fed, slots, inputs, max_top_logprobs=1)
        tokens = lax.dynamic_update_slice_in_dim(tokens, outputs.token[None], step, 0)
        ended |= (outputs.token[:, None] == arrays.eos_ids).any(1)
        return step + 1, tokens, ended, cache, slots

    def valid_after(step: Array) -> Int32[Array, " page_refs"]:
        begin = page_size * jnp.arange(arrays.tail_pages.shape[1], dtype=jnp.int32)
        tail = jnp.clip(step + 1 - begin, 0, page_size)
        shared = arrays.work.page_valid[:-num_tail_refs]
        return jnp.concatenate([shared, jnp.broadcast_to(tail, arrays.tail_pages.shape).reshape(-1)])

    arrays = jax.tree.map(jnp.asarray, arrays)
    carry = np.int32(0), arrays.tokens, jnp.zeros(count, bool), cache, slots
    _, tokens, _, cache, slots = lax.while_loop(unfinished, feed, carry)
    return tokens, cache, slots


@dataclass(frozen=True, slots=True)
class _Shapes:
    """The shapes and dtypes of a call's arguments, hashable."""

    treedef: Any
    leaves: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def of(cls, arguments: tuple[Any, ...]) -> _Shapes:
        leaves, treedef = jax.tree.flatten(arguments)
        return cls(treedef, tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves))


@lru_cache(maxsize=16)
def compile_generation(structure: ModelStructure, shapes: _Shapes, backend: str) -> jax.stages.Compiled:
    """`decode_loop` compiled for (weights, cache, slots, arrays); cache and slots are donated."""
    loop = partial(decode_loop, structure=structure, backend=backend)
    arguments = jax.tree.unflatten(shapes.treedef, shapes.leaves)
    return jax.jit(loop, donate_argnums=(1, 2)).lower(*arguments).compile()


# --- the command --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """Generate offline: one jitted loop on the device, no server."""

    model: str = "default"
    """`default` (the embedded tiny model), the name of a preset, or a model folder."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; repeat it for more prompts."""
    prompt_ids: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Token ids to continue, such as 1,2,3; repeat it for more prompts. They come after the texts."""
    max_tokens: int = 64
    """Most tokens of each branch."""
    branches: int = 1
    """Continuations of each prompt, which share the prompt's KV pages."""
    seed: int = 0
    """Same seed, same tokens."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Draw from the likeliest tokens only; 0 is off."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that have this much probability together."""
    min_p: float = 0.0
    """Draw from the tokens that are at least this likely, relative to the likeliest."""
    ignore_eos: bool = False
    """Go on after an end-of-sequence token."""
    dtype: Literal["bfloat16", "float32", "float64"] = "float32"
    """Type of weights, activations and KV pages."""
    load_format: LoadFormat = "auto"
    """`random` makes weights on the device instead of reading them."""
    weights_seed: int = 0
    """Seed of random weights."""
    attention: str = "xla"
    """Attention backend: `xla`, or `reference`, the oracle."""
    page_size: int = 16
    """KV positions in a page."""
    json: bool = False
    """Print one JSON object instead of text."""


def main(args: list[str] | None = None) -> None:
    command = tyro.cli(Decode, prog="taper-decode", description=Decode.__doc__, args=args)
    try:
        with jax.enable_x64(command.dtype == "float64"):
            print(_report(command))
    except (OSError, ValueError) as error:
        sys.exit(f"taper-decode: {error}")


def _report(command: Decode) -> str:
    backends = [name for name, backend in BACKENDS.items() if not backend.tiled]
    if command.attention not in backends:
        raise ValueError(f"--attention must be one of {', '.join(backends)}")
    tokenizer = _tokenizer(command.model)
    prompts = _prompts(command, tokenizer)
    model = load_model(
        command.model, jnp.dtype(command.dtype), command.load_format, seed=command.weights_seed
    )
    generation = generate(
        model,
        prompts,
        max_tokens=command.max_tokens,
        branches=command.branches,
        sampling=Sampling(
            temperature=command.temperature,
            top_k=command.top_k,
            top_p=command.top_p,
            min_p=command.min_p,
            seed=command.seed,
        ),
        eos_ids=() if command.ignore_eos else (tokenizer and tokenizer.eos_ids) or model.config.eos_ids,
        page_size=command.page_size,
        backend=command.attention,
    )
    answers = [
        [
            {"token_ids": ids, "text": tokenizer.decode(ids, skip_special_tokens=True) if tokenizer else ""}
            for ids in branches
        ]
        for branches in generation.ids
    ]
    if command.json:
        prompts_json = [{"branches": branches} for branches in answers]
        return json.dumps({"prompts": prompts_json, "tokens_per_second": generation.tokens_per_second})
    lines = []
    for number, branches in enumerate(answers, 1):
        for letter, branch in enumerate(branches, 1):
            text = branch["text"] if tokenizer else " ".join(map(str, branch["token_ids"]))
            lines += [f"--- prompt {number}, branch {letter}", text]
    return "\n".join([*lines, f"--- {generation.tokens_per_second:.1f} tokens/s"])


def _tokenizer(name: str) -> Tokenizer | None:
    """The model folder's tokenizer, if it has one. A preset's random weights go with the embedded one."""
    folder = model_folder(name) or Path(__file__).parent / "tiny"
    return Tokenizer.from_folder(folder) if (folder / "tokenizer.json").exists() else None


def _prompts(command: Decode, tokenizer: Tokenizer | None) -> list[list[int]]:
    if not command.prompt and not command.prompt_ids:
        raise ValueError("give a --prompt or --prompt-ids")
    if command.prompt and tokenizer is None:
        raise ValueError(f"{command.model} has no tokenizer.json: give --prompt-ids")
    texts = [tokenizer.encode(text, add_special_tokens=True) for text in command.prompt] if tokenizer else []
    try:
        return texts + [[int(word) for word in ids.split(",")] for ids in command.prompt_ids]
    except ValueError as error:
        raise ValueError(f"--prompt-ids takes numbers with commas between them: {error}") from error
