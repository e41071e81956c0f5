"""On schedules that libtpu 0.0.42.1 made of the project's kernels for v5e, in `schedules/`: of each bundle
only what is looked for is kept there, and bundles with nothing of it are left out.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.tpu.cycles import AttentionCycles, WriteCycles
from bench.tpu.schedule import Region, Schedule, ScheduleError, dumped_to

SCHEDULES = Path(__file__).parent / "schedules"
# Of nested loops: the outer one runs as often as is known at run time only, the inner one 64 / 8 times.
NESTED = """
     0   :  { %s1 = smov 0 } /* Start region 0 */
   0x1 LB: > { %s2 = sadd.s32 1, %s1 } /* Start region 3 :: Start region 4 */
   0x2   : > {} /* End region 4 */
   0x3 LB: >> { %s5 = sadd.s32 8, %s4 } /* Start region 5 */
   0x4   : >> { %p1 = scmp.ge.s32.totalorder %s5, 64 /* loop exit test */ }
   0x5   : >> { vmatmul.bf16 %v1  ;;  %v2 = vpow2.f32 %v1 }
   0x6   : >> { %1 = sbr.rel (!%p1) target bundleno = 3 (0x3), region = 5 }
   0x7   : >> {} /* End region 5 */
   0x8 PF: > { %2 = sbr.rel (!%p2) target bundleno = 1 (0x1), region = 3 }
   0x9   : > {} /* End region 3 */
   0xa   :  {} /* End region 0 */
"""


def test_regions_are_bundles_from_the_first_to_the_last() -> None:
    schedule = Schedule.parse("a header\n" + NESTED)
    assert schedule.regions == (Region(0, 11), Region(1, 3), Region(1, 10), Region(3, 8))
    assert [region.cycles for region in schedule.regions] == [11, 2, 9, 5]


def test_an_instruction_is_in_the_innermost_region_that_has_it() -> None:
    schedule = Schedule.parse(NESTED)
    assert schedule.innermost("vmatmul") == [Region(3, 8)]
    assert schedule.count("vpow2", schedule.whole) == 1
    assert schedule.count("pow2", schedule.whole) == 0
    assert schedule.innermost("dma.hbm_to_vmem") == []


def test_a_loop_counts_as_often_as_it_runs_where_that_is_known() -> None:
    schedule = Schedule.parse(NESTED)
    outer, inner = Region(1, 10), Region(3, 8)
    assert schedule.loops == [outer, inner]
    assert [schedule.times(loop) for loop in schedule.loops] == [None, 8]
    assert schedule.cycles(inner) == 5
    assert schedule.cycles(outer) == 9 + 7 * 5
    assert schedule.cycles(schedule.whole) == 11 + 7 * 5
    assert schedule.around([inner]) == outer


def test_a_counter_that_is_kept_in_memory_is_found_there() -> None:
    kept = "%s5 = sld [smem:[#allocation8_spill]]"
    added = "%s9 = sadd.s32 8, %s4  ;;  %7 = sst [smem:[#allocation8_spill]] %s9"
    schedule = Schedule.parse(NESTED.replace("%s5 = sadd.s32 8, %s4", f"{added}  ;;  {kept}"))
    assert [schedule.times(loop) for loop in schedule.loops] == [None, 8]


def test_the_schedule_of_a_kernel_is_the_last_that_was_written(tmp_path: Path) -> None:
    analysis = "2-kv_write.1-64-schedule-analysis_packed-bundles-post-ra.txt"
    for name in (
        "1-kv_write.1-65-packed-bundles-post-ra.txt",
        "1-other-65-packed-bundles-post-ra.txt",
        analysis,
    ):
        (tmp_path / name).write_text("0x0 : {}")
    (tmp_path / "2-kv_write.1-65-packed-bundles-post-ra.txt").write_text(NESTED)
    assert len(Schedule.of_kernel(tmp_path, "kv_write").bundles) == 11
    with pytest.raises(ScheduleError, match="no schedule of a kernel attend"):
        Schedule.of_kernel(tmp_path, "attend")
    assert str(tmp_path) in dumped_to(tmp_path)["LIBTPU_INIT_ARGS"]


def test_what_is_no_schedule_is_refused() -> None:
    with pytest.raises(ScheduleError, match="without bundles"):
        Schedule.parse("no bundles")
    with pytest.raises(ScheduleError, match="without the loop"):
        Schedule.parse(NESTED).around([Region(1, 10)])
    with pytest.raises(ScheduleError, match="never comes back"):
        _ = Schedule.parse("0x1 LB: > {}").loops


def test_the_parts_of_the_attention_kernel_are_found() -> None:
    """The figures are of what is kept in the file."""
    schedule = Schedule.parse((SCHEDULES / "attend.txt").read_text())
    cycles = AttentionCycles.of(schedule, variants=[8], block_tokens=128)
    assert cycles == AttentionCycles(
        heads=1, updates={8: 7}, masked={8: 7}, page=18 / 16, mask=8 * 8, block=38, tile=31, once=38
    )


def test_an_attention_kernel_of_other_sizes_is_refused() -> None:
    schedule = Schedule.parse((SCHEDULES / "attend.txt").read_text())
    with pytest.raises(ScheduleError, match="2 regions with matrix products"):
        AttentionCycles.of(schedule, variants=[8, 64], block_tokens=128)
    with pytest.raises(ScheduleError, match="not of"):
        AttentionCycles.of(schedule, variants=[64], block_tokens=128)


def test_the_loops_of_the_kernel_that_writes_are_counted() -> None:
    schedule = Schedule.parse((SCHEDULES / "write.txt").read_text())
    assert [schedule.times(loop) for loop in schedule.loops] == [8, 8, 8, 2]
    assert WriteCycles.of(schedule).once == schedule.cycles(schedule.whole) > len(schedule.bundles)
    with pytest.raises(ScheduleError, match="for nobody knows how long"):
        WriteCycles.of(Schedule.parse(NESTED))
