"""Times shared-prefix attention against the bytes that it must move, and against FlashInfer in the same run.

    python -m bench.device.kernels --suite decode shared prefill --peers flashinfer --random 20 --json OUT

One pool of pages serves all shapes of a page size. A shape is measured on several sets of pages in turn, more
than the L2 cache holds together, under a random page table. Ours: one compiled program that calls the kernel
a fixed number of times, each call's output being the next one's queries; wall clock over many programs.
Peers: CUDA graphs over the same memory, between events. Results are written after every shape.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the device

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention import Pages, Sizes, Work, backend_named, default_backend
from bench import hardware
from bench.command import Command
from bench.device.peers import FlashInfer, peer_names
from bench.device.report import summary, table
from bench.device.shapes import RANDOM_DISTRIBUTION, PageTables, Shape, random_shapes, shrunk, suite_shapes
from bench.device.work import Planner, planner, row_order
from bench.plot import plot_cases
from bench.result import head, keep, say, write
from bench.timing import seconds_per_call

if TYPE_CHECKING:
    from jax import Array

SETS, TRIPS = 8, 4  # page sets that a program takes in turn, and how often
CEILINGS = {"cpu": (2**28, 1024), "others": (2**31, 8192)}  # bytes that are copied, side of the matrices
ROW_BUCKETS = (8, 16, 32, 64, 128, 256, 512, 1024)
ROTATED_BYTES = 4e8  # that a shape's page sets have together, so that none of it stays in a cache
VALUE_SCALE = 32.0  # of V: outputs of some thousand positions are then about as large as queries


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, and where the result goes; the defaults are the whole table without peers."""

    suite: Sequence[str] = ("decode", "shared", "prefill")
    peers: Sequence[str] = ()
    random: int = 0
    seed: int = 0
    page: Sequence[int] = (16, 64)
    heads: Sequence[int] = (64, 16)
    backend: str = "xla"
    scale: str = "full"
    json: str | None = None
    plot: Path | None = None
    budget_seconds: float = float("inf")
    profile: bool = False
    command: str = ""


@dataclass(frozen=True)
class Program:
    """One attention call, and the timed loop over SETS work lists, compiled for a bucket."""

    once: Callable[..., Any]
    loop: Callable[..., Any]


@dataclass(frozen=True)
class Prepared:
    """A shape with its page table, planned for the program of its bucket."""

    shape: Shape
    tables: PageTables
    rows: np.ndarray  # where each of the work list's rows lies in the order of the branches
    bucket: int
    plan: Planner
    work: Work
    plan_seconds: float


def suites(options: Options) -> list[Shape]:
    """The shapes that options ask for, the random ones last."""
    tables = [suite_shapes(suite, options.page, options.heads) for suite in options.suite]
    return [*chain(*tables), *random_shapes(options.random, options.seed, options.page)]


class KernelBench:
    """The pools, the programs and the results of one run: of the options' suites, or of these shapes."""

    def __init__(self, options: Options, shapes: Sequence[Shape] = ()) -> None:
        self.options, self.backend = options, backend_named(options.backend).fitted(128, jnp.bfloat16, 1)
        self.started = time.perf_counter()
        self.shapes = [*shapes] or suites(options)
        self.tiny = options.scale == "tiny"
        if self.tiny:
            self.shapes = [shrunk(shape) for shape in self.shapes]
        # A CPU starts a program at once, and each call takes it long.
        self.few = self.tiny or jax.default_backend() == "cpu"
        self.sets, self.trips = (2, 1) if self.few else (SETS, TRIPS)
        self.compilers = ThreadPoolExecutor(max_workers=os.cpu_count())
        self.programs: dict[Any, Future[Program]] = {}
        self.result: dict[str, Any] = {
            **head(options.command, hardware.describe()),
            "backend": options.backend,
            "seed": options.seed,
            "random_distribution": RANDOM_DISTRIBUTION if options.random else None,
            "cases": [],
        }

    def run(self) -> dict[str, Any]:
        prepared = [self.prepare(shape) for shape in self.shapes]
        for item in prepared:
            self.program(item)
        copied, multiplied = (2**20, 128) if self.tiny else CEILINGS["cpu" if self.few else "others"]
        flashinfer = FlashInfer() if "flashinfer" in self.options.peers else None
        wait(self.programs.values())
        self.log(f"{len(self.programs)} programs are compiled")
        self.result["copy_tb_s"] = hardware.copy_tb_s(size=copied)
        self.result["matmul_tflop_s"] = hardware.matmul_tflop_s(size=multiplied)
        self.measure_all(prepared, flashinfer)
        self.compilers.shutdown()
        self.result["seconds"] = time.perf_counter() - self.started
        write(self.result, self.options.json)
        return self.result

    def measure_all(self, prepared: Sequence[Prepared], flashinfer: FlashInfer | None) -> None:
        """Ours and the strong peers on every shape first, then the weak peers."""
        pools = {page: self.pool(page) for page in {item.shape.page for item in prepared}}
        stored = {page: self.backend.stored(*pool) for page, pool in pools.items()}
        outputs = []
        for item in prepared:
            if self.late():
                return
            case, out = self.measure(item, stored[item.shape.page])
            outputs.append(out)
            self.result["cases"].append(case)
            self.measure_peers(item, case, out, *pools[item.shape.page], flashinfer, weak=False)
            self.save()
            self.log(f"{item.shape.label}: {case.get('ours_us', float('nan')):.1f} us")
        for item, case, out in zip(prepared, self.result["cases"], outputs, strict=True):
            if self.late():
                return
            self.measure_peers(item, case, out, *pools[item.shape.page], flashinfer, weak=True)
            self.save()

    def prepare(self, shape: Shape) -> Prepared:
        tables = PageTables.of(shape, self.options.seed)
        reads = tables.reads()
        bucket = next(size for size in ROW_BUCKETS if shape.rows <= size)
        sizes = Sizes(
            num_pages=self.pool_pages(shape),
            page_size=shape.page,
            heads=shape.q_heads,
            kv_heads=shape.kv_heads,
        )
        longest = max(other.longest for other in self.same_pages(shape))
        plan = planner(self.backend, bucket, sizes, longest)
        start = time.perf_counter()
        order, work = plan(reads)
        seconds = time.perf_counter() - start
        return Prepared(shape, tables, row_order(reads, order), bucket, plan, work, seconds)

    def program(self, item: Prepared) -> Future[Program]:
        """The program of a shape's bucket, compiled in the background."""
        shape = item.shape
        arrays = jax.tree.map(lambda leaf: (np.shape(leaf), np.result_type(leaf)), item.work)
        key = (item.bucket, shape.page, shape.q_heads, shape.kv_heads, shape.head_dim, str(arrays))
        if key not in self.programs:
            q = jax.ShapeDtypeStruct((item.bucket, shape.q_heads, shape.head_dim), jnp.bfloat16)
            pages = (self.pool_pages(shape), shape.kv_heads, shape.page, shape.head_dim)
            pool = jax.ShapeDtypeStruct(pages, jnp.bfloat16)
            work = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jnp.int32), item.work)
            self.programs[key] = self.compilers.submit(self.compile, q, pool, work)
        return self.programs[key]

    def compile(self, q: Any, pool: Any, work: Any) -> Program:
        scale = q.shape[-1] ** -0.5

        # Jitted, so that the calls of the loop are traced and lowered once.
        @jax.jit
        def attend(q: Array, pages: Pages, work: Work) -> Array:
            return self.backend.attend(q, pages, work, scale=scale)[0]

        def loop(q: Array, pages: Pages, works: Sequence[Any]) -> Array:
            def body(_: Any, q: Array) -> Array:
                for work in works:
                    q = attend(q, pages, work)
                return q

            return lax.fori_loop(0, self.trips, body, q)

        pages = jax.eval_shape(self.backend.stored, pool, pool)
        once_program = attend.lower(q, pages, work).compile()
        loop_program = jax.jit(loop).lower(q, pages, [work] * self.sets).compile()
        return Program(once_program, loop_program)

    def pool_pages(self, shape: Shape) -> int:
        """Pages of the pool that all shapes of a page size share."""
        return max(other.pages * self.page_sets(other) for other in self.same_pages(shape))

    def same_pages(self, shape: Shape) -> list[Shape]:
        """The shapes that have this shape's page size, and so its pool."""
        return [other for other in self.shapes if other.page == shape.page]

    def page_sets(self, shape: Shape) -> int:
        """Different page sets that a shape is measured on."""
        return int(np.clip(np.ceil(ROTATED_BYTES / shape.unique_bytes), 2, self.sets))

    def pool(self, page: int) -> tuple[Array, Array]:
        """Keys and values for a page size, [pages, kv_heads, page, head_dim] each."""
        shape = next(shape for shape in self.shapes if shape.page == page)
        size = (self.pool_pages(shape), shape.kv_heads, shape.page, shape.head_dim)
        normal = jax.jit(lambda key, scale: jax.random.normal(key, size, jnp.bfloat16) * scale)
        k, v = jax.random.split(jax.random.key(self.options.seed))
        return normal(k, jnp.bfloat16(1)), normal(v, jnp.bfloat16(VALUE_SCALE))

    def queries(self, shape: Shape) -> np.ndarray:
        """[rows, heads, head_dim] in the order of the branches."""
        rng = np.random.default_rng(self.options.seed)
        q = rng.standard_normal((shape.rows, shape.q_heads, shape.head_dim), np.float32)
        return q.astype(jnp.bfloat16)

    def measure(self, item: Prepared, pages: Pages) -> tuple[dict[str, Any], np.ndarray | None]:
        """Our time on a shape; our output, [rows, heads, head_dim] in the order of the branches, float32."""
        shape = item.shape
        floor = shape.unique_bytes / self.result["copy_tb_s"] / 1e12
        case = shape.as_json() | {
            "floor_us": 1e6 * floor,
            "arithmetic_us": shape.flops / self.result["matmul_tflop_s"] / 1e6,
            "plan_us": 1e6 * item.plan_seconds,
            "bucket": item.bucket,
        }
        try:
            program = self.program(item).result()
        except Exception as error:
            self.log(f"{shape.label} does not compile: {error}"[:2000])
            return case | {"error": f"{type(error).__name__}: {error}"[:500]}, None
        q = self.queries(shape)
        ours = np.zeros((item.bucket, *q.shape[1:]), q.dtype)
        ours[: shape.rows] = q[item.rows]
        ours = jax.device_put(ours)
        sets = self.page_sets(shape)
        moved = [item.tables.moved(index % sets * shape.pages) for index in range(self.sets)]
        works = [jax.device_put(item.plan(tables.reads())[1]) for tables in moved]
        out = np.zeros(q.shape, np.float32)
        out[item.rows] = np.asarray(program.once(ours, pages, works[0]))[: shape.rows]
        return case | self.time_ours(program, ours, pages, works, floor), out

    def time_ours(
        self, program: Program, q: Array, pages: Pages, works: Sequence[Any], floor: float
    ) -> dict[str, float]:
        """Microseconds of one attention call; with `profile`, of its kernels alone too."""
        attentions = self.sets * self.trips

        def call(q: Array) -> Array:
            return program.loop(q, pages, works)

        first, q = seconds_per_call(call, call(q), calls=1, repeats=1)
        calls = 1 if self.few else int(np.clip(0.04 / first, 2, 200))
        seconds, q = seconds_per_call(call, q, calls=calls, repeats=1 if self.tiny else 5)
        case = {"ours_us": 1e6 * seconds / attentions, "ours_over_floor": seconds / attentions / floor}
        if self.options.profile:
            from jax.experimental.mosaic.gpu import profiler

            try:
                _, milliseconds = profiler.measure(call)(q)
                case["ours_kernels_us"] = 1e3 * (milliseconds or np.nan) / attentions
            except Exception as error:
                self.log(f"no kernel times: {error}")
        return case

    def measure_peers(
        self,
        item: Prepared,
        case: dict[str, Any],
        ours: np.ndarray | None,
        k_pages: Array,
        v_pages: Array,
        flashinfer: FlashInfer | None,
        *,
        weak: bool,
    ) -> None:
        """Adds each variant's time and its distance from our output; a variant that fails, as its error."""
        if flashinfer is None:
            return
        shape = item.shape
        q = jax.device_put(self.queries(shape))
        query, k, v = map(flashinfer.tensor, (q, k_pages, v_pages))
        cuts = [slice(i * shape.pages, (i + 1) * shape.pages) for i in range(self.page_sets(shape))]
        pages = [(k[cut], v[cut]) for cut in cuts]
        for name in peer_names(shape, weak=weak):
            try:
                run = flashinfer.plan(name, item.tables, query, shape.head_dim**-0.5)
                if ours is not None:
                    theirs = run(*pages[0]).float().cpu().numpy()
                    error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
                    case[f"flashinfer_{name}_error"] = float(error)
                    if not error < 1e-2:
                        self.log(f"{shape.label}: ours and {name} differ by {error:.2g}")
                seconds = flashinfer.graph_seconds(run, pages, 2 * case["floor_us"] / 1e6)
                case[f"flashinfer_{name}_us"] = 1e6 * seconds
            except Exception as error:
                case.setdefault("errors", {})[name] = f"{type(error).__name__}: {error}"[:500]
                self.log(f"{shape.label}: {name} failed: {error}"[:300])
        composed = [case.get(f"flashinfer_composed_{backend}_us") for backend in ("fa2", "fa3")]
        if any(composed):
            case["flashinfer_composed_us"] = min(us for us in composed if us)

    def late(self) -> bool:
        return time.perf_counter() - self.started > self.options.budget_seconds

    def log(self, text: str) -> None:
        say(f"[{time.perf_counter() - self.started:6.1f} s] {text}", self.options.json)

    def save(self) -> None:
        keep(self.result, self.options.json)


def parse_options(arguments: Sequence[str]) -> Options:
    parser = Command("bench.device.kernels", "Times shared-prefix attention.")
    add = parser.add_argument
    add("--suite", nargs="+", choices=["decode", "shared", "prefill"], default=Options.suite)
    add("--peers", nargs="+", choices=["flashinfer"], default=())
    add("--random", type=int, default=0, help="how many random shapes to add")
    add(
        "--seed",
        type=int,
        default=time.time_ns() % 2**31,
        help="of the shapes, tables and data; default: a new one",
    )
    add("--page", type=int, nargs="+", choices=[16, 64], default=Options.page)
    add(
        "--heads",
        type=int,
        nargs="+",
        choices=[64, 16],
        default=Options.heads,
        help="query heads of the suites",
    )
    add("--backend", default=default_backend(128, jnp.bfloat16).name)
    add("--scale", choices=["full", "tiny"], default="full", help="tiny: shapes that a CPU can run")
    add("--plot", type=Path, help="an image file (needs matplotlib)")
    add("--budget-seconds", type=float, default=float("inf"), help="no new measurement starts after this")
    add("--profile", action="store_true", help="also the kernels' own time, through CUPTI")
    return Options(**vars(parser.parse_args(arguments)), command=parser.typed(arguments))


def main(options: Options) -> dict[str, Any]:
    result = KernelBench(options).run()
    say(f"{table(result['cases'])}\n{summary(result)}", options.json)
    if options.plot is not None:
        plot_cases(result, options.plot)
    return result


if __name__ == "__main__":
    main(parse_options(sys.argv[1:]))
