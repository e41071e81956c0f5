"""Times whole decode steps of a model with random weights: groups of branches over shared prefixes.

    python -m bench.device.step --json OUT                    # Qwen3-32B on one GPU of 139 GiB
    python -m bench.device.step --backend xla --scale tiny    # anywhere

Each step is compared with the same step compiled with attention left out (queries pass through; keys and
values are still written), and with the byte floor: every weight and every different KV position read once.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

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
from bench.device.shapes import PageTables, Shape, shrunk
from bench.result import conclude, head, keep, say
from bench.timing import seconds_per_call
from model.config import PRESETS, ModelConfig
from model.decoder import Decoder
from model.kv_cache import KVCache, bytes_per_page
from model.sampling import SampleInputs, SlotState
from model.sharding import ON_ONE_DEVICE
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


class StepBench:
    """A model, its cache, and the step programs of every row count among the cases."""

    def __init__(self, config: ModelConfig, shapes: Sequence[Shape], backend: Backend, seed: int) -> None:
        self.config, self.shapes, self.seed = config, shapes, seed
        self.backend, self.without = backend, WithoutAttention(backend)
        self.page = shapes[0].page
        self.num_pages = max(shape.pages for shape in shapes)
        self.rows = sorted({shape.rows for shape in shapes})
        self.num_slots = max(self.rows)
        # One after the other, on an idle device: XLA times matrix products there to choose among them.
        keys = [(rows, each) for rows in self.rows for each in (backend, self.without)]
        self.programs = {key: self.compile(*key) for key in keys}
        model = random_weights(Decoder(config, DTYPE), seed, ON_ONE_DEVICE)
        self.structure, self.weights = model.split()
        self.state = self.random_cache(), SlotState.create(self.num_slots, config.vocab_size, 1)
        self.weight_bytes = weight_bytes(config, DTYPE)

    def layout(self, rows: int, backend: Backend) -> StepLayout:
        return StepLayout.for_bucket(
            self.config,
            backend,
            rows,
            num_pages=self.num_pages,
            page_size=self.page,
            samples=rows,
            pages_per_read=max(shape.longest for shape in self.shapes),
        )

    def compile(self, rows: int, backend: Backend) -> StepProgram:
        structure, weights = place_model(Decoder(self.config, DTYPE), ON_ONE_DEVICE).split()
        return compile_step(
            structure,
            weights,
            KVCache.abstract(self.backend, self.config, self.num_pages, self.page, DTYPE),
            SlotState.abstract(self.num_slots, self.config.vocab_size, 1),
            layout=self.layout(rows, backend),
            max_top_logprobs=1,
            samplers=(0,),
        )

    def random_cache(self) -> KVCache:
        shapes = KVCache.abstract(self.backend, self.config, self.num_pages, self.page, DTYPE)
        leaves, treedef = jax.tree.flatten(shapes)
        normal = jax.jit(lambda key: jax.random.normal(key, leaves[0].shape, DTYPE))
        keys = jax.random.split(jax.random.key(self.seed), len(leaves))
        return jax.tree.unflatten(treedef, [normal(key) for key in keys])

    def inputs(self, shape: Shape) -> np.ndarray:
        """The packed step: every branch feeds its slot's last token, writes it and chooses the next."""
        tables, rows = PageTables.of(shape, self.seed), np.arange(shape.rows, dtype=np.int32)
        layout = self.layout(shape.rows, self.backend)
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

    def seconds(self, shape: Shape, backend: Backend, calls: int, repeats: int) -> float:
        """Median wall time of a step in a queue of `calls` steps."""
        program, packed = self.programs[shape.rows, backend], self.inputs(shape)

        def call(state: tuple[Any, Any]) -> tuple[Any, Any]:
            return program(self.weights, *state, packed)[:2]

        seconds, self.state = seconds_per_call(call, call(self.state), calls, repeats)
        return seconds

    def measure(self, shape: Shape, copy_tb_s: float, calls: int, repeats: int) -> dict[str, Any]:
        read = kv_bytes(self.config, DTYPE, shape.kv_tokens)
        kv, weights = (1e3 * size / copy_tb_s / 1e12 for size in (read, self.weight_bytes))
        step, without = (
            1e3 * self.seconds(shape, backend, calls, repeats) for backend in (self.backend, self.without)
        )
        return {
            **{name: getattr(shape, name) for name in ("groups", "width", "prefix", "tail", "rows", "page")},
            "kv_bytes": read,
            "step_ms": step,
            "without_attention_ms": without,
            "kv_floor_ms": kv,
            "floor_ms": kv + weights,
            "limit_ms": without + 1.25 * kv,
            "over_floor": step / (kv + weights),
            "attention_over_kv_floor": (step - without) / kv,
        }

    def memory(self) -> list[dict[str, Any]]:
        """What each compiled step allocates, and how much of it is the donated cache, in bytes."""
        cache = self.num_pages * bytes_per_page(self.backend, self.config, self.page, DTYPE)
        rows: list[dict[str, Any]] = []
        for (count, backend), program in self.programs.items():
            analysis = program.forward.memory_analysis()
            rows.append(
                {
                    "rows": count,
                    "backend": backend.name,
                    "cache_bytes": cache,
                    "aliased_bytes": getattr(analysis, "alias_size_in_bytes", None),
                    "temporary_bytes": getattr(analysis, "temp_size_in_bytes", None),
                }
            )
        return rows


def text(cases: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{'groups x width, lengths':<28}{'rows':>5}{'step ms':>9}{'without':>9}{'limit':>8}{'x floor':>9}"
        f"{'attention / KV floor':>22}"
    ]
    for case in cases:
        name = f"{case['groups']} x {case['width']}, {case['prefix']} + {case['tail']}"
        lines.append(
            f"{name:<28}{case['rows']:>5}{case['step_ms']:>9.2f}{case['without_attention_ms']:>9.2f}"
            f"{case['limit_ms']:>8.2f}{case['over_floor']:>9.2f}{case['attention_over_kv_floor']:>22.2f}"
        )
    return "\n".join(lines)


def command() -> Command:
    parser = Command("bench.device.step", "Times whole decode steps.")
    parser.add_argument("--model", choices=sorted(PRESETS), default="qwen3-32b")
    parser.add_argument("--backend", default=None, help="default: the device's")
    parser.add_argument("--page", type=int, default=64)
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for a smaller device")
    parser.add_argument("--scale", choices=["full", "tiny"], default="full")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(arguments: Sequence[str]) -> dict[str, Any]:
    options = command().parse_args(arguments)
    start = time.perf_counter()
    config = PRESETS[options.model]
    config = replace(config, num_layers=options.layers or config.num_layers)
    shapes = [
        Shape("decode", *lengths, options.page, config.num_heads, config.num_kv_heads, config.head_dim)
        for lengths in CASES
    ]
    small = options.scale == "tiny"
    if small:
        config, shapes = tiny(config), [shrunk(shape) for shape in shapes]
    named = options.backend and backend_named(options.backend)
    backend = named or default_backend(config.head_dim, DTYPE)
    result: dict[str, Any] = {
        **head(command().typed(arguments), hardware.describe()),
        "model": config.name,
        "layers": config.num_layers,
        "backend": backend.name,
        "copy_tb_s": hardware.copy_tb_s(**({"size": 2**20} if small else {})),
        "cases": [],
    }
    bench = StepBench(config, shapes, backend, options.seed)
    result |= {"weight_bytes": bench.weight_bytes, "memory": bench.memory()}
    say(f"compiled and made weights in {time.perf_counter() - start:.0f} s", options.json)
    for shape in shapes:
        calls, repeats = (2, 1) if small else (10, 3)
        result["cases"].append(bench.measure(shape, result["copy_tb_s"], calls, repeats))
        keep(result, options.json)
    return conclude(result, text(result["cases"]), options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
