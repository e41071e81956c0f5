"""Compiles a model's whole step for TPUs that are not here, and says what it would take on them.

    python -m bench.tpu_aot --topology v5e:2x4 --model qwen3-32b --rows 64 --kv-tokens 200000 --json -
    python -m bench.tpu_aot --topology v5e:2x2 --chips 1 --model qwen3-0.6b
    python -m bench.tpu_aot --topology v5e:2x4 --layers 2      # a quick look

The programs are those that taper-serve would compile there for one bucket: its own runner compiles them, from
shapes alone. libtpu does the rest, for real chips, on this host (it comes with the extra `tpu`). Memory is
what the compiled programs need, collectives are those of their HLO, cycles those of the kernels' static
schedules. Seconds are estimates from these and from published figures, for a decode step of the rows in
groups of branches: nothing of them has been measured. docs/notebook/measures.md has the formulas.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from bench.tpu.topology import ENVIRONMENT, devices

if __name__ == "__main__":
    os.environ.update({**ENVIRONMENT, **os.environ})

import jax.numpy as jnp
from jax.errors import JaxRuntimeError

from attention import Reads, Sizes
from attention.tpu import Tpu
from attention.tpu_plan import Plan
from bench import hardware
from bench.command import Command, ints
from bench.device.floor import kv_bytes, weight_bytes
from bench.device.shapes import PageTables, Shape
from bench.hlo import Collective, collectives
from bench.result import conclude, head
from bench.tpu.cycles import ATTEND, WRITE, AttentionCycles, WriteCycles
from bench.tpu.estimate import (
    Reading,
    collectives_seconds,
    products_seconds,
    roofline_shares,
    sides_of,
)
from bench.tpu.figures import Figures, figures_of
from bench.tpu.kernels import Kernels, cycles, tpu_for
from model.config import PRESETS, ModelConfig
from model.decoder import Decoder
from model.kv_cache import bytes_per_page, page_sizes
from model.sharding import Placement
from model.step import StepProgram
from model.weights import place_model
from serve.engine.runner import Runner, RunnerConfig

DTYPE = jnp.bfloat16


@dataclass(frozen=True, slots=True)
class Target:
    """A model on chips of a topology that share it, the rows of a step, and the pages of the pool."""

    topology: str
    config: ModelConfig
    placement: Placement
    backend: Tpu
    rows: int
    num_pages: int
    page_size: int

    @classmethod
    def over(
        cls, topology: str, config: ModelConfig, rows: int, *, kv_tokens: int, page_size: int, chips: Any
    ) -> Target:
        """The model on these chips of a topology, in whose pool so many positions have room."""
        return cls(
            topology=topology,
            config=config,
            placement=Placement.over(config, len(chips), chips),
            backend=tpu_for(chips[0]),
            rows=rows,
            num_pages=-(-kv_tokens // page_size),
            page_size=page_size,
        )

    @property
    def figures(self) -> Figures:
        return figures_of(self.backend.chip)

    @property
    def sizes(self) -> Sizes:
        """Of one chip's pages."""
        return page_sizes(self.config, self.num_pages, self.page_size, self.placement)

    @property
    def plan(self) -> Plan:
        """Of its attention kernel."""
        return self.backend.plan(self.rows, self.sizes, self.config.head_dim, DTYPE)

    @property
    def page_bytes(self) -> int:
        """What it has of a page of one layer."""
        of_all = bytes_per_page(self.backend, self.config, self.page_size, DTYPE, self.placement)
        return of_all // self.config.num_layers

    @property
    def kernels(self) -> Kernels:
        """What each of the chips has of a layer."""
        sizes = self.sizes
        return Kernels(
            topology=self.topology,
            rows=self.rows,
            num_pages=sizes.num_pages,
            page_size=sizes.page_size,
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            head_dim=self.config.head_dim,
        )

    def compile(self) -> StepProgram:
        """By the server's runner, as it compiles a bucket. Raises what the compiler refuses."""
        model = place_model(Decoder(self.config, DTYPE), self.placement)
        runner = Runner(
            model,
            RunnerConfig(
                num_pages=self.num_pages,
                page_size=self.page_size,
                buckets=(self.rows,),
                num_slots=2 * self.rows,
                backend=self.backend,
                placement=self.placement,
            ),
        )
        runner.memory(self.figures.usable)
        program, _ = runner.packed(runner.probe(self.rows, 1))
        return program


def memory(program: StepProgram, figures: Figures) -> dict[str, Any]:
    """Bytes of a chip: of the model's part of a step, and whether that fits together with any sampler."""
    forward: Any = program.forward.memory_analysis()
    samplers: list[Any] = [sampler.memory_analysis() for sampler in program.samplers.values()]
    # All of a sampler's arguments but its slots are the model's arguments, or are counted as its results.
    slots = max(sampler.alias_size_in_bytes for sampler in samplers)
    code = sum(part.generated_code_size_in_bytes for part in (forward, *samplers))
    needed = forward.argument_size_in_bytes + slots + program.working_bytes + code
    return {
        "argument_bytes_per_chip": forward.argument_size_in_bytes,
        "alias_bytes_per_chip": forward.alias_size_in_bytes,
        "temp_bytes_per_chip": forward.temp_size_in_bytes,
        "output_bytes_per_chip": forward.output_size_in_bytes,
        "needed_bytes_per_chip": needed,
        "usable_bytes_per_chip": figures.usable,
        "hbm_bytes_per_chip": figures.hbm,
        "fits": needed <= figures.usable,
    }


def attention_seconds(target: Target, shape: Shape, attend: AttentionCycles, rows_bytes: int = 0) -> float:
    """Of one layer, on each of the chips; `rows_bytes` as in Reading.seconds."""
    capacity = target.backend.capacity(target.rows, target.sizes)
    _, tiles = target.backend.lay_out(Reads.of(PageTables.of(shape, 0).reads()), capacity)
    reading = Reading.of(tiles, target.plan, attend)
    return reading.seconds(target.page_bytes, target.backend.chip, rows_bytes)


def estimate(
    target: Target,
    shape: Shape,
    told: Sequence[Collective],
    kernels: tuple[AttentionCycles, WriteCycles],
) -> dict[str, Any]:
    """Seconds of a decode step in which every branch of the shape has a row; its parts, and its floor."""
    config, placement, chip = target.config, target.placement, target.backend.chip
    attend, write = kernels
    weights = weight_bytes(config, DTYPE, placement)
    floor = (weights + kv_bytes(config, DTYPE, shape.kv_tokens, placement)) / chip.hbm
    sides = sides_of(device.coords for device in placement.devices)
    parts = {
        "products_seconds": products_seconds(weights, target.rows, chip, target.figures),
        "attention_seconds": config.num_layers * attention_seconds(target, shape, attend),
        "write_seconds": config.num_layers * write.once / chip.clock,
        "collectives_seconds": collectives_seconds(told, sides, target.figures),
    }
    total = sum(parts.values())
    return {
        "floor_seconds": floor,
        "estimate_seconds": total,
        "over_floor": total / floor,
        "parts": parts,
        "roofline_shares": roofline_shares(attend, target.plan, target.page_bytes, chip),
    }


def measure(target: Target, shape: Shape) -> dict[str, Any]:
    """All of the result but its head."""
    started = time.perf_counter()
    try:
        program = target.compile()
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"hbm_bytes_per_chip": target.figures.hbm, "fits": False, "refused": str(error)}
    seconds = time.perf_counter() - started
    kernels = cycles(target.kernels, target.backend)
    greedy = (program.forward, program.samplers[0])
    told = [each for part in greedy for each in collectives(part.as_text() or "")]
    return {
        "compile_seconds": seconds,
        **memory(program, target.figures),
        "collectives": dict(Counter(map(str, told))),
        "kernel_cycles": {ATTEND: asdict(kernels[0]), WRITE: asdict(kernels[1])},
        **estimate(target, shape, told, kernels),
    }


def text(result: dict[str, Any]) -> str:
    """What a reader wants to know first."""
    compiled = (
        f"{result['model']}, {result['layers']} layers, for {result['chips']} x {result['device']} "
        f"({result['topology']})"
    )
    if "refused" in result:
        return f"{compiled} DOES NOT FIT: {result['refused']}"
    gib = {
        name: result[f"{name}_bytes_per_chip"] / 2**30
        for name in ("argument", "alias", "temp", "needed", "usable")
    }
    told = ", ".join(f"{count} x {name}" for name, count in result["collectives"].items())
    shares = ", ".join(f"{lanes} lanes {share:.0%}" for lanes, share in result["roofline_shares"].items())
    parts = ", ".join(f"{name[:-8]} {1e3 * each:.2f}" for name, each in result["parts"].items())
    return (
        f"{compiled}, compiled in {result['compile_seconds']:.0f} s\n"
        f"GiB of a chip: arguments {gib['argument']:.2f}, of which {gib['alias']:.2f} updated in place; "
        f"temporary {gib['temp']:.3f}; needed {gib['needed']:.2f} of {gib['usable']:.2f}: "
        f"{'fits' if result['fits'] else 'DOES NOT FIT'}\n"
        f"collectives: {told or 'none'}\n"
        f"attention in full blocks, of the memory's rate: {shares}\n"
        f"estimated, not measured: a step takes {1e3 * result['estimate_seconds']:.2f} ms ({parts}), "
        f"{result['over_floor']:.2f} x its byte floor of {1e3 * result['floor_seconds']:.2f} ms"
    )


def command() -> Command:
    parser = Command("bench.tpu_aot", "Compiles a model's step for TPUs that are not here.")
    parser.add_argument("--topology", default="v5e:2x4", help="as libtpu calls it: v6e:2x4, v5p:2x2x1")
    parser.add_argument("--chips", type=int, help="the first so many of the topology; all unless given")
    parser.add_argument("--model", choices=sorted(PRESETS), default="qwen3-32b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for a quick look")
    parser.add_argument("--rows", type=int, default=64, help="of the bucket, and of the step in the estimate")
    parser.add_argument("--kv-tokens", type=int, default=200_000, help="positions that the pool has room for")
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument(
        "--case",
        type=ints,
        help="groups, branches, prefix and tail tokens of the step in the estimate: 8,8,2048,192 for 64 rows",
    )
    return parser


def main(arguments: Sequence[str]) -> dict[str, Any]:
    parser = command()
    options = parser.parse_args(arguments)
    config = PRESETS[options.model]
    config = replace(config, num_layers=options.layers or config.num_layers)
    chips = devices(options.topology, options.chips)
    pool = {"kv_tokens": options.kv_tokens, "page_size": options.page_size}
    target = Target.over(options.topology, config, options.rows, **pool, chips=chips)
    width = min(8, options.rows)
    groups, width, prefix, tail = options.case or (options.rows // width, width, 2048, 192)
    shape = Shape(
        suite="decode",
        groups=groups,
        width=width,
        prefix=prefix,
        tail=tail,
        page=options.page_size,
        q_heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    result = {
        **head(parser.typed(arguments), hardware.describe()),
        "topology": options.topology,
        "device": chips[0].device_kind,
        "chips": len(chips),
        "model": config.name,
        "layers": config.num_layers,
        "rows": options.rows,
        "kv_tokens": options.kv_tokens,
        "page": options.page_size,
        "case": {name: getattr(shape, name) for name in ("groups", "width", "prefix", "tail")},
        **measure(target, shape),
    }
    return conclude(result, text(result), options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
