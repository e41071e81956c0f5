"""Plans become arrays: rows in tree order, samples in plan order."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attention.backend import Backend, Sizes
from attention.gpu import Gpu
from attention.layout import ItemCapacity
from attention.xla import Xla
from model.sampling import branch_key
from model.step import StepLayout
from scheduler.footprint import worst_case_pages
from scheduler.request import Request
from scheduler.sampling import SamplingParams
from scheduler.step import Entry, SegmentRead, SlotSetup, Step
from serve.engine.packing import step_inputs
from tests.scheduler.alphabet import PLAIN
from tests.scheduler.requests import fork, request, serial
from tests.scheduler.strategies import RELAXED, examples, loads, plans, serving
from tests.scheduler.symbolic import SymbolicModel
from tests.scheduler.world import Setting, serve

PREFIX = SegmentRead((7, 3), 6)  # pages of four positions: the second is half full


def entry(
    branch: int, own: SegmentRead, ordinal: int, tokens: tuple[int, ...] | None, **more: object
) -> Entry:
    rows = 1 if tokens is None else len(tokens)
    fields = {
        "request_id": "r",
        "branch": branch,
        "segment": branch,
        "slot": branch,
        "start": 6 + ordinal,
        "ordinal": ordinal,
        "rows": rows,
        "tokens": tokens,
        "context": (PREFIX,),
        "own": own,
        "samples": True,
        "path": ((0, branch),),
    }
    return Entry(**(fields | more))  # type: ignore[arg-type]


def layout(rows: int) -> StepLayout:
    return StepLayout(Xla(), ItemCapacity.for_bucket(rows, 16, page_size=4), page_size=4, samples=rows)


def step(*entries: Entry, slots: tuple[SlotSetup, ...] = ()) -> Step:
    return Step(0, entries, slots, 8)


def test_two_branches_read_their_prefix_once_and_write_to_pages_of_their_own() -> None:
    plan = step(
        entry(2, SegmentRead((9,), 2), 1, None),
        entry(1, SegmentRead((5, 1), 5), 3, (41, 42)),
        slots=(SlotSetup(1, SamplingParams()),),
    )
    inputs = step_inputs(plan, layout(8))
    assert inputs.tokens.tolist() == [41, 42, -3], "page 5 comes before page 9"
    assert inputs.positions.tolist() == [9, 10, 7]
    assert inputs.write_page.tolist() == [5, 1, 9]
    assert inputs.write_offset.tolist() == [3, 0, 1]
    work = inputs.work
    items = {
        (tuple(work.page_ids[first : first + count].tolist()), tuple(rows.tolist()))
        for (first, count), rows in zip(
            work.item_pages[: work.num_items], work.item_rows[: work.num_items], strict=True
        )
    }
    assert ((7, 3), (0, 3)) in items, "the prefix is one item for all three rows"
    assert inputs.sample.row.tolist() == [2, 1], "samples come back in the plan's order"
    assert inputs.sample.slot.tolist() == [2, 1]
    assert inputs.sample.position.tolist() == [8, 11]
    assert inputs.sample.count_fed.tolist() == [1, 0], "a slot's history already holds what is fed first"
    assert inputs.sample.branch_key.tolist() == [branch_key(((0, 2),)), branch_key(((0, 1),))]


def test_an_entry_that_does_not_sample_has_no_sample() -> None:
    plan = step(entry(1, SegmentRead((5,), 2), 0, (41, 42), samples=False, slot=None))
    inputs = step_inputs(plan, layout(8))
    assert inputs.sample.row.size == 0
    assert inputs.tokens.dtype == np.int32


def test_a_chunk_beside_decode_rows_is_written_in_order() -> None:
    plan = step(
        entry(3, SegmentRead((9,), 1), 0, None, slot=0),
        entry(1, SegmentRead((5, 1, 8), 9), 2, tuple(range(40, 47)), samples=False, slot=None, context=()),
        entry(2, SegmentRead((4,), 3), 2, (77,)),
        slots=(SlotSetup(2, SamplingParams()),),
    )
    inputs = step_inputs(plan, layout(16))
    assert inputs.tokens.tolist() == [*range(40, 47), 77, -1]
    assert inputs.positions.tolist() == [*range(8, 15), 8, 6]
    assert inputs.write_page.tolist() == [5, 5, 1, 1, 1, 1, 8, 4, 9]
    assert inputs.write_offset.tolist() == [2, 3, 0, 1, 2, 3, 0, 2, 0]
    assert inputs.sample.row.tolist() == [8, 7]
    assert inputs.sample.slot.tolist() == [0, 2]
    assert inputs.sample.count_fed.tolist() == [1, 0]


def test_more_rows_than_the_bucket_are_refused() -> None:
    plan = step(entry(1, SegmentRead((5, 6, 8), 9), 0, tuple(range(9))))
    with pytest.raises(ValueError, match="rows"):
        step_inputs(plan, layout(8))


def test_a_branchs_key_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not in each of its steps."""
    hashed: list[bytes] = []
    hash_of = hashlib.blake2s

    def counted(data: bytes, **options: int) -> Any:
        hashed.append(data)
        return hash_of(data, **options)

    monkeypatch.setattr(hashlib, "blake2s", counted)
    plan = step(entry(1, SegmentRead((5,), 1), 0, None, path=((3, 77), (4, 78))))
    keys = [step_inputs(plan, layout(8)).sample.branch_key.tolist() for _ in range(3)]
    assert keys[0] == keys[1] == keys[2]
    assert len(hashed) == 1


def tight(load: list[Request], setting: Setting, spare: int) -> Setting:
    """Hardly more pages than the largest request needs."""
    needed = max(worst_case_pages(each, setting.page_size, setting.max_context) for each in load)
    return replace(setting, num_pages=needed + spare)


def room_for(backend: Backend, setting: Setting, bucket: int, depth: int) -> StepLayout:
    sizes = Sizes(
        num_pages=setting.num_pages, page_size=setting.page_size, heads=4, kv_heads=2, paths=1 + depth
    )
    return StepLayout(backend, backend.capacity(bucket, sizes), setting.page_size, samples=bucket)


BACKENDS = pytest.mark.parametrize("backend", [Xla(), Gpu()], ids=["xla", "gpu"])


@BACKENDS
def test_the_last_tokens_of_branches_and_their_join_fit_one_step_of_a_full_pool(backend: Backend) -> None:
    """A branch reads its pages after its ancestors', the join of all of them after its siblings', too."""
    setting = Setting(buckets=(8,), num_pages=30)
    load = [request("r", fork(3, tokens=30, join="kv"), serial(4, prefix=(1,)))]
    most = 0
    for step in serve(load, tight(load, setting, 0), SymbolicModel(PLAIN)).steps:
        read = sum(len(each.pages) for entry in step.entries for each in (*entry.context, entry.own))
        most = max(most, read)
        step_inputs(step, room_for(backend, setting, 8, 1))
    assert most > setting.num_pages + 8, "else it tests nothing"


@BACKENDS
def test_after_a_join_of_kv_a_row_reads_more_than_a_context_holds(backend: Backend) -> None:
    """Branches have the same positions: so the context does not bound what a bucket's reads refer to."""
    setting = Setting(buckets=(1, 16), num_pages=600, page_size=4, max_context=100)
    load = [request("r", fork(16, tokens=60, join="kv"), serial(4, prefix=(1,)))]
    longest = 0
    for step in serve(load, setting, SymbolicModel(PLAIN)).steps:
        for entry in step.entries:
            longest = max(longest, sum(len(each.pages) for each in (*entry.context, entry.own)))
        step_inputs(step, room_for(backend, setting, step.bucket, 1))
    assert longest > 2 * setting.max_context / setting.page_size, "else it tests nothing"


@BACKENDS
@examples(8)
@given(loads(plans, least=3, most=6, slos=st.just(RELAXED)), serving, st.integers(0, 24))
def test_every_step_of_any_load_fits_its_bucket(
    backend: Backend, load: list[Request], setting: Setting, spare: int
) -> None:
    setting = tight(load, setting, spare)
    for step in serve(load, setting, SymbolicModel(PLAIN)).steps:
        step_inputs(step, room_for(backend, setting, step.bucket, 4))
