from __future__ import annotations

import pytest

from bench.hlo import collectives

# As XLA writes them for TPUs, GPUs and CPUs.
TEXT = """
  %psum.23 = bf16[64,5120]{1,0:T(8,128)(2,1)S(1)} all-reduce(%fusion.2), channel_id=1, to_apply=%region_0.1
  ROOT %psum.24 = bf16[64,5120]{1,0:T(8,128)(2,1)S(1)} all-reduce(%fusion.97), channel_id=1
  %all.1 = (f32[64,15]{0,1:T(8,128)S(1)}, f32[64]{0:T(128)S(1)}) all-reduce(%fusion.1, %get.65), channel_id=1
  %get-tuple-element.1 = f32[64]{0} get-tuple-element(%all.1), index=1
  %fusion = f32[64]{0} fusion(%all-reduce), kind=kLoop, metadata={op_name="jit(f)/all-reduce(x)"}
  %start = (f32[2,64]{1,0}, f32[8,2,64]{2,1,0}) all-gather-start(f32[2,64]{1,0} %bitcast), dimensions={0}
  %done = f32[8,2,64]{2,1,0} all-gather-done(%start)
  %sum = f32[] all-reduce-start(f32[] %each), channel_id=3
  %seen = pred[3]{0} collective-permute(%p), source_target_pairs={{0,1}}
"""


def test_every_collective_is_found_once_with_what_each_device_has_then() -> None:
    assert [*map(str, collectives(TEXT))] == [
        "all-reduce bf16[64,5120]",
        "all-reduce bf16[64,5120]",
        "all-reduce f32[64,15] f32[64]",
        "all-gather f32[8,2,64]",
        "all-reduce f32[]",
        "collective-permute pred[3]",
    ]


@pytest.mark.parametrize(
    ("index", "numbers", "nbytes"),
    [(0, 64 * 5120, 2 * 64 * 5120), (2, 64 * 15, 4 * 64 * 16), (4, 1, 4), (5, 3, 3)],
)
def test_a_collective_knows_its_size(index: int, numbers: int, nbytes: int) -> None:
    found = collectives(TEXT)[index]
    assert (found.numbers, found.nbytes) == (numbers, nbytes)
