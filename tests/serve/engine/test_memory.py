"""The KV pool takes what memory is left, and the next start finds the same size."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import jax
import pytest

from serve.engine.memory import IN_FLIGHT, MemoryPlan, device_limit, remembered
from tests.serve.engine.memory_plan import GIB, PLAN


def test_the_pool_is_what_is_left_in_whole_shares_of_the_memory() -> None:
    assert PLAN.reserve == 2 * GIB
    assert PLAN.kv == 62 * GIB  # 128 - 61 - 1 - 2 x 1 - 2
    assert PLAN.num_pages == 62 * 64
    used = PLAN.weights + PLAN.slots + IN_FLIGHT * PLAN.step + PLAN.reserve + PLAN.num_pages * PLAN.page
    assert used <= PLAN.limit


def test_a_little_more_weight_does_not_change_the_pool() -> None:
    """The programs in the cache have the pool's size in their shapes."""
    heavier = MemoryPlan(limit=128 * GIB, weights=61 * GIB - 2**20, slots=GIB, step=GIB, page=16 * 2**20)
    assert heavier.num_pages == PLAN.num_pages


def test_one_share_is_a_pool_and_less_is_none() -> None:
    """Of 64 GiB, a share is 1 GiB, and another one is the reserve. A page that does not fit whole is none."""
    least = MemoryPlan(limit=64 * GIB, weights=57 * GIB, slots=GIB, step=2 * GIB, page=3 * 2**28)
    assert (least.kv, least.num_pages) == (GIB, 1)
    with pytest.raises(ValueError, match="no memory is left"):
        _ = replace(least, slots=GIB + 1).kv


def test_too_little_memory_is_said_with_where_it_goes() -> None:
    with pytest.raises(ValueError, match=r"no memory is left for KV pages.*'weights': '61.0 GiB'"):
        _ = MemoryPlan(limit=64 * GIB, weights=61 * GIB, slots=GIB, step=GIB, page=1).num_pages


def test_a_plan_is_measured_once_for_each_key(tmp_path: Path) -> None:
    measured = []

    def measure() -> MemoryPlan:
        measured.append(PLAN)
        return PLAN

    folder = tmp_path
    assert [remembered(folder, {"limit": 1}, measure) for _ in range(3)] == [PLAN] * 3
    assert len(measured) == 1
    remembered(folder, {"limit": 2}, measure)
    remembered(None, {"limit": 1}, measure)
    assert len(measured) == 3
    for key in ({"limit": 1, "rows": 2}, {"rows": 2, "limit": 1}):
        remembered(folder, key, measure)
    assert len(measured) == 4, "the order of a key's parts is no part of it"


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "\0", json.dumps({"limit": 1}), json.dumps(dict.fromkeys(asdict(PLAN), "1"))]
)
def test_what_cannot_be_read_is_measured_again(tmp_path: Path, content: str) -> None:
    remembered(tmp_path, {}, lambda: PLAN)
    (file,) = tmp_path.iterdir()
    file.write_text(content)
    assert remembered(tmp_path, {}, lambda: PLAN) == PLAN
    assert MemoryPlan(**json.loads(file.read_text())) == PLAN


def test_where_nothing_can_be_written_it_is_measured_every_time(tmp_path: Path) -> None:
    for _ in range(2):
        assert remembered(tmp_path / "missing", {}, lambda: PLAN) == PLAN


def test_a_cpu_names_no_limit() -> None:
    assert device_limit(jax.devices()) is None


def test_the_limit_of_devices_that_share_a_model_is_that_of_the_smallest() -> None:
    class Device:
        def __init__(self, limit: int) -> None:
            self.limit = limit

        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": self.limit}

    assert device_limit([Device(80), Device(79)]) == 79
