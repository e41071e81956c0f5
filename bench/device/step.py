"""Times whole decode steps of a model with random weights: groups of branches over shared prefixes.

    python -m bench.device.step --json OUT                    # Qwen3-32B on one GPU of 139 GiB
    python -m bench.device.step --tensor-parallel 2           # or on two of 80 GiB
    python -m bench.device.step --backend xla --scale tiny    # anywhere

Each step is compared with the same step compiled with attention left out (queries pass through; keys and
values are still written), and with the byte floor: every weight and every different KV position read once.
Where several devices share the model, it is also compared with itself without the all-reduces of its layers
(what comes out is wrong, and as much work). Bytes, of the floor and of memory, are then those of each device.
The differences divide a step: products and the rest, attention, all-reduces.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax
import jax.numpy as jnp
import numpy as np

from attention import Backend, Reads, backend_named, default_backend
from attention.wrapped import Wrapped
from bench import hardware
from bench.command import Command
from bench.device.floor import kv_bytes, weight_bytes
from bench.device.shapes import PageTables, Shape, lengths, shrunk
from bench.result import conclude, head, keep, say
from bench.timing import seconds_per_call
from model.config import PRESETS, ModelConfig
from model.decoder import Decoder
from model.kv_cache import KVCache
from model.sampling import SampleInputs, SlotState
from model.sharding import Peers, Placement, bytes_each
from model.step import StepInputs, StepLayout, StepProgram, compile_step
from model.weights import place_model, random_weights

if TYPE_CHECKING:
    from jax import Array

# groups, width, prefix and tail tokens.
CASES = ((8, 8, 2048, 192), (16, 8, 2048, 192), (32, 4, 2048, 192), (32, 8, 1024, 192), (64, 1, 2048, 192))
DTYPE = jnp.bfloat16


def tiny(config: ModelConfig) -> ModelConfig:
    """The same kind of model at a size that a CPU runs."""
    return replace(
        config,
        name=f"{config.name}-tiny",
        vocab_size=64,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        intermediate_size=64,
    )


class WithoutAttention(Wrapped):
    """Gives every row its query, and writes keys and values as the wrapped backend does."""

    __slots__ = ()

    @property
    def name(self) -> str:
        return "without attention"

    def attend(self, q: Array, pages: Any, work: Any, *, scale: float) -> tuple[Array, Array]:
        del pages, work, scale
        return q, jnp.zeros(q.shape[:2], jnp.float32)


class WithoutAllReduces(Placement):
    """Lets every device go on with its own part of what its layers' peers should sum."""

    __slots__ = ()

    @property
    def peers(self) -> Peers:
        """As many, so that products are computed in the same way, but nobody to tell anything."""
        return Peers(count=self.count)


class Variant(NamedTuple):
    """A way to compile the same step."""

    backend: Backend
    placement: Placement


def variants(backend: Backend, placement: Placement) -> dict[str, Variant]:
    """The whole step, and those that leave something out that it has, by the names of their times."""
    found = {
        "step": Variant(backend, placement),
        "without_attention": Variant(WithoutAttention(backend), placement),
    }
    if placement.count > 1:
        keeping = WithoutAllReduces(placement.mesh, placement.rules, placement.device)
        found["without_all_reduces"] = Variant(backend, keeping)
    return found


class StepBench:
    """A model, its cache, and the step programs of every row count among the cases."""

    def __init__(
        self,
        config: ModelConfig,
        shapes: Sequence[Shape],
        backend: Backend,
        placement: Placement,
        seed: int,
        *,
        whole: bool = False,
    ) -> None:
        """With `whole`, the step alone, without its variants."""
        self.config, self.shapes, self.seed = config, shapes, seed
        self.backend, self.placement = backend, placement
        self.variants = {"step": Variant(backend, placement)} if whole else variants(backend, placement)
        self.page = shapes[0].page
        self.num_pages = max(shape.pages for shape in shapes)
        self.rows = sorted({shape.rows for shape in shapes})
        self.num_slots = max(self.rows)
        # One after the other, on an idle device: XLA times matrix products there to choose among them.
        keys = [(rows, name) for rows in self.rows for name in self.variants]
        self.programs = {key: self.compile(*key) for key in keys}
        model = random_weights(Decoder(config, DTYPE), seed, placement)
        self.structure, self.weights = model.split()
        slots = SlotState.create(self.num_slots, config.vocab_size, 1, placement=placement)
        self.state = self.random_cache(), slots
        self.weight_bytes = weight_bytes(config, DTYPE, placement)

    @property
    def cache_shapes(self) -> KVCache:
        return KVCache.abstract(self.backend, self.config, self.num_pages, self.page, DTYPE, self.placement)

    def layout(self, rows: int, variant: str) -> StepLayout:
        backend, placement = self.variants[variant]
        return StepLayout.for_bucket(
            self.config,
            backend,
            rows,
            num_pages=self.num_pages,
            page_size=self.page,
            samples=rows,
            pages_per_read=max(shape.longest for shape in self.shapes),
            placement=placement,
        )

    def compile(self, rows: int, variant: str) -> StepProgram:
        structure, weights = place_model(Decoder(self.config, DTYPE), self.placement).split()
        return compile_step(
            structure,
            weights,
            self.cache_shapes,
            SlotState.abstract(self.num_slots, self.config.vocab_size, 1, self.placement),
            layout=self.layout(rows, variant),
            max_top_logprobs=1,
            samplers=(0,),
        )

    def random_cache(self) -> KVCache:
        """Made in place: every device makes its own part."""
        leaves, treedef = jax.tree.flatten(self.cache_shapes)
        draw = partial(jax.random.normal, shape=leaves[0].shape, dtype=DTYPE)
        normal = jax.jit(draw, out_shardings=leaves[0].sharding)
        keys = jax.random.split(jax.random.key(self.seed), len(leaves))
        return jax.tree.unflatten(treedef, [normal(key) for key in keys])

    def inputs(self, shape: Shape) -> np.ndarray:
        """The packed step: every branch feeds its slot's last token, writes it and chooses the next."""
        tables, rows = PageTables.of(shape, self.seed), np.arange(shape.rows, dtype=np.int32)
        layout = self.layout(shape.rows, "step")
        order, work = self.backend.lay_out(Reads.of(tables.reads()), layout.capacity)
        slot = order.astype(np.int32)
        position = (shape.prefix + shape.tails[order] - 1).astype(np.int32)
        return layout.pack(
            StepInputs(
                tokens=-1 - slot,
                positions=position,
                write_page=np.array([tables.tails[i][-1] for i in order], np.int32),
                write_offset=tables.last_valid[order] - 1,
                work=work,
                sample=SampleInputs(
                    row=rows,
                    slot=slot,
                    branch_key=slot,
                    position=position + 1,
                    count_fed=np.ones(shape.rows, np.int32),
                ),
            )
        )

    def seconds(self, shape: Shape, variant: str, calls: int, repeats: int) -> float:
        """Median wall time of a step in a queue of `calls` steps, until all devices have ended."""
        program, packed = self.programs[shape.rows, variant], self.inputs(shape)
        packed = jax.device_put(packed, program.inputs)

        def call(state: tuple[Any, Any]) -> tuple[Any, Any]:
            return program(self.weights, *state, packed)[:2]

        seconds, self.state = seconds_per_call(call, call(self.state), calls, repeats)
        return seconds

    def measure(self, shape: Shape, copy_tb_s: float, calls: int, repeats: int) -> dict[str, Any]:
        read = kv_bytes(self.config, DTYPE, shape.kv_tokens, self.placement)
        kv, weights = (1e3 * size / copy_tb_s / 1e12 for size in (read, self.weight_bytes))
        times = {f"{name}_ms": 1e3 * self.seconds(shape, name, calls, repeats) for name in self.variants}
        step, without = times["step_ms"], times["without_attention_ms"]
        return {
            **{name: getattr(shape, name) for name in ("groups", "width", "prefix", "tail", "rows", "page")},
            "kv_bytes": read,
            **times,
            **divided(times),
            "kv_floor_ms": kv,
            "floor_ms": kv + weights,
            "limit_ms": without + 1.25 * kv,
            "over_floor": step / (kv + weights),
            "attention_over_kv_floor": (step - without) / kv,
        }

    def memory(self) -> list[dict[str, Any]]:
        """Bytes of a device that each compiled step allocates, and how many of them are the donated cache."""
        cache = bytes_each(self.cache_shapes)
        rows: list[dict[str, Any]] = []
        for (count, variant), program in self.programs.items():
            analysis = program.forward.memory_analysis()
            rows.append(
                {
                    "rows": count,
                    "program": variant,
                    "cache_bytes": cache,
                    "aliased_bytes": getattr(analysis, "alias_size_in_bytes", None),
                    "temporary_bytes": getattr(analysis, "temp_size_in_bytes", None),
                }
            )
        return rows


def divided(times: Mapping[str, float]) -> dict[str, float]:
    """What a step's time, `step_ms`, is the sum of: differences to the steps that leave something out."""
    step = times["step_ms"]
    parts = {"attention_ms": step - times["without_attention_ms"]}
    if "without_all_reduces_ms" in times:
        parts["all_reduces_ms"] = step - times["without_all_reduces_ms"]
    return {"products_ms": step - sum(parts.values()), **parts}


def text(cases: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{'groups x width, lengths':<28}{'rows':>5}{'step ms':>9}{'products':>10}{'attention':>11}"
        f"{'all-reduces':>13}{'limit':>8}{'x floor':>9}{'attention / KV floor':>22}"
    ]
    for case in cases:
        lines.append(
            f"{lengths(case):<28}{case['rows']:>5}{case['step_ms']:>9.2f}{case['products_ms']:>10.2f}"
            f"{case['attention_ms']:>11.2f}{case.get('all_reduces_ms', 0.0):>13.2f}"
            f"{case['limit_ms']:>8.2f}{case['over_floor']:>9.2f}{case['attention_over_kv_floor']:>22.2f}"
        )
    return "\n".join(lines)


def command() -> Command:
    parser = Command("bench.device.step", "Times whole decode steps.")
    parser.add_argument("--model", choices=sorted(PRESETS), default="qwen3-32b")
    parser.add_argument("--backend", default=None, help="default: the device's")
    parser.add_argument("--page", type=int, default=64)
    parser.add_argument("--cases", type=int, default=len(CASES), help="the first so many")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for a smaller device")
    parser.add_argument("--scale", choices=["full", "tiny"], default="full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_tensor_parallel()
    return parser


def main(arguments: Sequence[str]) -> dict[str, Any]:
    options = command().parse_args(arguments)
    start = time.perf_counter()
    config = PRESETS[options.model]
    config = replace(config, num_layers=options.layers or config.num_layers)
    shapes = [
        Shape("decode", *case, options.page, config.num_heads, config.num_kv_heads, config.head_dim)
        for case in CASES[: options.cases]
    ]
    small = options.scale == "tiny"
    if small:
        config, shapes = tiny(config), [shrunk(shape) for shape in shapes]
    placement = hardware.placement(config, options.tensor_parallel, peer_memory=options.peer_memory)
    named = options.backend and backend_named(options.backend)
    backend = named or default_backend(config.head_dim, DTYPE)
    backend = backend.fitted(config.head_dim, DTYPE, placement.count)
    result: dict[str, Any] = {
        **head(command().typed(arguments), hardware.describe(placement.count)),
        "model": config.name,
        "layers": config.num_layers,
        "backend": backend.name,
        "copy_tb_s": hardware.copy_tb_s(**({"size": 2**20} if small else {})),
        "cases": [],
    }
    bench = StepBench(config, shapes, backend, placement, options.seed)
    result |= {"weight_bytes": bench.weight_bytes, "memory": bench.memory()}
    say(f"compiled and made weights in {time.perf_counter() - start:.0f} s", options.json)
    for shape in shapes:
        calls, repeats = (2, 1) if small else (10, 3)
        result["cases"].append(bench.measure(shape, result["copy_tb_s"], calls, repeats))
        keep(result, options.json)
    return conclude(result, text(result["cases"]), options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
