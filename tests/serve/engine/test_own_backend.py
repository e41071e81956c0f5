"""A backend with a page layout and a work type of its own serves, and nothing else has to know it.

Keys and values lie in one array, position by position; what a row reads is a line of a table. Slow, and as
different from the product's backends as the contract lets it be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from attention import Backend, PageArray, Sizes
from attention.heads import rms_norm
from attention.reads import Reads
from model.decode import generate
from model.decoder import Decoder
from scheduler.request import Slo
from scheduler.sampling import SamplingParams
from serve.engine.runner import Runner
from tests.serve.lab import compiled_runner, run, tiny_model
from tests.serve.loads import load


class Table(NamedTuple):
    """Of each row: the pages that it reads, and how many positions of each."""

    pages: Any
    seen: Any


@dataclass(frozen=True)
class TableSize:
    rows: int
    longest: int
    page_size: int

    def empty(self) -> Table:
        nothing = np.zeros((self.rows, self.longest), np.int32)
        return Table(nothing, nothing)


@dataclass(frozen=True)
class Tabular(Backend):
    @property
    def name(self) -> str:
        return "tabular"

    def pages(self, sizes: Sizes, head_dim: int, dtype: Any) -> Sequence[PageArray]:
        shape = (sizes.num_pages, sizes.page_size, sizes.kv_heads, 2, head_dim)
        axes = ("pages", "page", "kv_heads", None, "head_dim")
        return (PageArray(shape, axes, dtype),)

    def capacity(self, rows: int, sizes: Sizes, pages_per_read: int | None = None) -> TableSize:
        return TableSize(rows, min(sizes.num_pages, pages_per_read or sizes.num_pages), sizes.page_size)

    def lay_out(self, reads: Reads, capacity: Any) -> tuple[np.ndarray, Table]:
        size, table, row = capacity.page_size, Table(*map(np.copy, capacity.empty())), 0
        for context, own, rows, ordinal in zip(*reads, strict=True):
            before = [
                (page, min(size, run.length - size * index))
                for run in context
                for index, page in enumerate(run.pages)
            ]
            for last in range(ordinal, ordinal + rows):
                mine = [
                    (page, min(size, last + 1 - size * index))
                    for index, page in enumerate(own.pages)
                    if size * index <= last
                ]
                for column, (page, seen) in enumerate(before + mine):
                    table.pages[row, column], table.seen[row, column] = page, seen
                row += 1
        return np.arange(len(reads.rows)), table

    def write(self, qkv: Any, norms: Any, angles: Any, pages: Any, places: Any) -> tuple[Any, Any]:
        (array,) = pages
        kv_heads = array.shape[2]
        cos, sin = (angle[:, None] for angle in angles)

        def turned(x: Any) -> Any:
            first, second = jnp.split(x, 2, axis=-1)
            return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

        q, k, v = jnp.split(qkv, [qkv.shape[1] - 2 * kv_heads, qkv.shape[1] - kv_heads], axis=1)
        if norms is not None:
            q, k = rms_norm(q, norms.q_scale, norms.eps), rms_norm(k, norms.k_scale, norms.eps)
        new = jnp.stack([turned(k), v], axis=2).astype(array.dtype)
        return turned(q), (array.at[places.page, places.offset].set(new, mode="drop"),)

    def attend(self, q: Any, pages: Any, work: Table, *, scale: float) -> tuple[Any, Any]:
        (array,) = pages
        rows, heads, head_dim = q.shape
        size, kv_heads = array.shape[1:3]
        visible = (jnp.arange(size) < work.seen[..., None]).reshape(rows, 1, 1, -1)
        taken = array[work.pages].reshape(rows, -1, kv_heads, 2, head_dim)
        k, v = taken[:, :, :, 0], taken[:, :, :, 1]
        query = q.reshape(rows, kv_heads, heads // kv_heads, head_dim)
        scores = jnp.where(visible, jnp.einsum("rhgd,rphd->rhgp", query, k) * scale, -1e30)
        highest = scores.max(-1, keepdims=True)
        weights = jnp.where(visible, jnp.exp(scores - highest), 0)
        total = weights.sum(-1)
        out = jnp.einsum("rhgp,rphd->rhgd", weights, v) / jnp.maximum(total, 1e-30)[..., None]
        return out.reshape(q.shape), (highest[..., 0] + jnp.log(total)).reshape(rows, heads)

    def refill(self, work: Table, filled: Any) -> Table:
        seen = filled[work.pages]
        return work._replace(seen=jnp.where((work.seen > 0) & (seen >= 0), seen, work.seen))


@pytest.fixture(scope="module")
def model() -> Decoder:
    return tiny_model(jnp.float32)


@pytest.mark.full
def test_it_serves_the_same_tokens_through_the_engine(runner: Runner, model: Decoder) -> None:
    """Forks, joins, prompt chunks, preemption."""
    own = compiled_runner(model, (16,), Tabular())
    assert {array.shape[3] for array in own.cache.layers[0]} == {2}, "the pages are its own"
    requests = load(Slo(tpot=1.0, ttft=60.0))
    record = run(own, requests, policy="eager", num_pages=60)
    assert record.preemptions() > 0
    assert record.answers() == run(runner, requests, policy="eager").answers()


@pytest.mark.full
def test_it_decodes_the_same_tokens_offline(model: Decoder) -> None:
    """Prompts of 1, 20 and 7 tokens, three branches of each, past the end of several pages."""
    prompts = [[7], [*range(50, 70)], [3, 1, 4, 1, 5, 9, 2]]
    sampling = SamplingParams(temperature=0.8, seed=5)
    ours, theirs = (
        generate(model, prompts, max_tokens=14, branches=3, sampling=sampling, page_size=4, backend=backend)
        for backend in (Tabular(), None)
    )
    assert ours.ids == theirs.ids


def test_a_form_that_it_lacks_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match="tabular has no deterministic form"):
        Tabular().deterministic()
