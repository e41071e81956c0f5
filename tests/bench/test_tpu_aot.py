"""What the benchmark makes of what a compiler says; tests/tpu asks a real one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from attention.tpu import Tpu
from bench.device.shapes import Shape
from bench.hlo import Collective
from bench.tpu.cycles import AttentionCycles, WriteCycles
from bench.tpu.figures import FIGURES
from bench.tpu_aot import Target, command, estimate, memory, text
from model.config import PRESETS
from model.sharding import Placement

QWEN3 = PRESETS["qwen3-0.6b"]
CYCLES = (
    AttentionCycles(
        heads=2,
        updates={16: 1, 64: 1, 128: 1},
        masked={16: 1, 64: 1, 128: 1},
        page=1,
        mask=1,
        block=1,
        tile=1,
        once=1,
    ),
    WriteCycles(once=1500),
)


def program(argument: int, output: int, alias: int, temporary: int, code: int) -> Any:
    names = ("argument", "output", "alias", "temp", "generated_code")
    sizes = dict(zip(names, (argument, output, alias, temporary, code), strict=True))
    return SimpleNamespace(
        memory_analysis=lambda: SimpleNamespace(**{f"{n}_size_in_bytes": s for n, s in sizes.items()})
    )


@pytest.mark.parametrize(("argument", "fits"), [(15 << 30, True), (16 << 30, False)])
def test_a_step_fits_with_what_its_samplers_need(argument: int, fits: bool) -> None:
    """Beside the model's arguments: slots, which are the samplers' aliases, working bytes, and code."""
    step: Any = SimpleNamespace(
        forward=program(argument, 11, 10, 1, 1),
        samplers={0: program(200, 101, 100, 0, 1), 31: program(200, 101, 100, 2, 1)},
        working_bytes=2 + 3,
    )
    said = memory(step, FIGURES["v5e"])
    assert said["needed_bytes_per_chip"] == argument + 100 + 5 + 3
    assert said["argument_bytes_per_chip"] == argument
    assert (said["alias_bytes_per_chip"], said["temp_bytes_per_chip"]) == (10, 1)
    assert said["hbm_bytes_per_chip"] == 16 << 30
    assert said["fits"] is fits


def target() -> Target:
    """Of a model on one chip."""
    placement: Any = Placement(device=SimpleNamespace(coords=(0, 0, 0)))
    return Target("v5e:2x2", QWEN3, placement, Tpu(), rows=64, num_pages=1024, page_size=64)


def test_an_estimate_is_the_sum_of_its_parts_and_never_below_the_floor() -> None:
    shape = Shape("decode", 8, 8, 2048, 192, 64, QWEN3.num_heads, QWEN3.num_kv_heads)
    told = [Collective("all-reduce", (("bf16", (64, 1024)),))]
    said = estimate(target(), shape, told, CYCLES)
    assert said["parts"].keys() == {
        f"{part}_seconds" for part in ("products", "attention", "write", "collectives")
    }
    assert said["estimate_seconds"] == sum(said["parts"].values())
    assert said["over_floor"] == said["estimate_seconds"] / said["floor_seconds"] > 1
    # A chip tells nobody; cycles as few as these leave attention to its bytes.
    assert said["parts"]["collectives_seconds"] == 0
    assert said["parts"]["write_seconds"] == pytest.approx(28 * 1e-6)
    tokens = 8 * 2048 + 64 * 192
    assert said["parts"]["attention_seconds"] == pytest.approx(28 * tokens * 8 * 512 / 819e9)
    assert said["roofline_shares"] == {16: 1.0, 64: 1.0, 128: 1.0}


def test_a_reader_is_told_what_fits_and_that_nothing_was_measured() -> None:
    shape = Shape("decode", 8, 8, 2048, 192, 64, QWEN3.num_heads, QWEN3.num_kv_heads)
    step: Any = SimpleNamespace(
        forward=program(1 << 30, 0, 0, 0, 0), samplers={0: program(0, 0, 0, 0, 0)}, working_bytes=0
    )
    result = {
        "model": "qwen3-0.6b",
        "layers": 28,
        "chips": 1,
        "device": "TPU v5 lite",
        "topology": "v5e:2x2",
        "compile_seconds": 12.3,
        "collectives": {"all-reduce bf16[64,1024]": 3},
        **memory(step, FIGURES["v5e"]),
        **estimate(target(), shape, [], CYCLES),
    }
    said = text(result)
    assert "1 x TPU v5 lite (v5e:2x2), compiled in 12 s" in said
    assert "needed 1.00 of 15.75: fits" in said
    assert "3 x all-reduce bf16[64,1024]" in said
    assert "estimated, not measured" in said
    refused = {**result, "fits": False, "refused": "RESOURCE_EXHAUSTED: more than there is"}
    assert text(refused).endswith("DOES NOT FIT: RESOURCE_EXHAUSTED: more than there is")


def test_the_command_has_defaults_for_all_but_what_is_asked() -> None:
    options = command().parse_args(["--topology", "v6e:2x4", "--case", "4,16,512,64", "--json", "-"])
    assert (options.topology, options.model, options.rows, options.kv_tokens) == (
        "v6e:2x4",
        "qwen3-32b",
        64,
        200_000,
    )
    assert options.case == [4, 16, 512, 64]
