"""Compares an attention backend with dense attention over the whole matrix of shapes, on the device at hand.

    python -m bench.checks.kernels --json OUT             # all of it; minutes on a GPU
    python -m bench.checks.kernels --sample 50 --scale small

The reference is computed in float32 from the same bfloat16 inputs: for groups with tails, from gathered dense
prefixes and tails; for random trees with prompt chunks, over the whole pool with a mask that counts how often
a row sees a position. Neither uses a planner. Slots of the pool that no row is given hold NaN. All cases of a
configuration run through one or two programs, so nothing is compiled per case.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    # The reference's matrix products need no tuning, and dozens of programs would wait for it.
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    )

import jax
import jax.numpy as jnp
import numpy as np

from attention import Backend, Sizes, backend_named, default_backend
from attention.gpu import Gpu
from bench import hardware
from bench.checks.forests import LARGE_LOGITS, SMALL, Forest, Grid, Matrix, Tree
from bench.command import Command
from bench.device.work import Planner, planner, row_order
from bench.result import conclude, head, keep, say

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float, Int

OUT_LIMIT = 3e-3  # of ||out - reference|| / ||reference||
LSE_LIMIT = 1e-2  # absolute, in nats
CHUNK = 16  # cases planned at a time
DIMENSIONS = ("groups", "width", "prefix", "tail", "group_size", "page", "head_dim", "large_logits", "kind")


@dataclass(frozen=True, slots=True)
class Case:
    """One forest under one configuration. Of a "tree" only the seed matters, of a "forest" all of it."""

    kind: str
    group_size: int
    page: int
    head_dim: int
    groups: int = 0
    width: int = 0
    prefix: int = 0
    tail: int = 0
    seed: int = 0

    @property
    def large_logits(self) -> bool:
        return self.seed % 3 == 0


@dataclass(frozen=True, slots=True)
class Setup:
    """What the cases of one program have in common. Hashable; sent to the planning processes."""

    kind: str
    group_size: int
    page: int
    head_dim: int
    kv_heads: int
    grid: Grid
    backend: Backend

    @property
    def rows(self) -> int:
        return Tree.ROWS if self.kind == "tree" else self.grid.rows

    @property
    def pool_pages(self) -> int:
        return Tree.POSITIONS // self.page if self.kind == "tree" else self.grid.pool_pages

    def planner(self) -> Planner:
        sizes = Sizes(
            num_pages=self.pool_pages,
            page_size=self.page,
            heads=self.kv_heads * self.group_size,
            kv_heads=self.kv_heads,
        )
        longest = self.pool_pages if self.kind == "tree" else self.grid.pages_per_read
        return planner(self.backend, self.rows, sizes, longest)


def inputs_of(case: Case, setup: Setup, plan: Planner) -> dict[str, Any]:
    """Everything a program is told about a case, NumPy arrays of the setup's sizes."""
    if case.kind == "tree":
        tree = Tree.of(case.page, case.seed)
        order, work = plan(tree.reads)
        rows = row_order(tree.reads, order)
        dense = {"counts": tree.counts}
    else:
        forest = Forest.of(setup.grid, case.groups, case.width, case.prefix, case.tail, case.seed)
        order, work = plan(forest.reads)
        rows = forest.rows[order]
        dense = {
            "prefix_ids": forest.prefix_ids,
            "tail_ids": forest.tail_ids,
            "prefix_length": np.int32(forest.prefix_length),
            "tail_length": forest.tail_length.astype(np.int32),
        }
    row_of = np.full(setup.rows, setup.rows, np.int32)
    row_of[: len(rows)] = rows
    magnitude = np.float32(LARGE_LOGITS if case.large_logits else 1)
    return {"work": work, "row_of": row_of, "magnitude": magnitude, **dense}


def plan_chunk(cases: Sequence[Case], setup: Setup, plan: Planner) -> list[dict[str, Any]]:
    """`inputs_of` several cases; what the planning processes run."""
    return [inputs_of(case, setup, plan) for case in cases]


def check(
    q: Float[Array, "rows heads head_dim"],
    k_pages: Float[Array, "pages kv_heads page head_dim"],
    v_pages: Float[Array, "pages kv_heads page head_dim"],
    inputs: Mapping[str, Any],
    *,
    setup: Setup,
) -> Float[Array, " 4"]:
    """(squared error, squared norm, largest LSE error, faults): one case against its reference.

    Faults are rows without work that are not zeros and -inf, and anything that is not finite elsewhere.
    """
    q = (q * inputs["magnitude"]).astype(q.dtype)
    filled = filled_slots(inputs, setup)
    k_pages, v_pages = (jnp.where(filled[:, None, :, None], x, jnp.nan) for x in (k_pages, v_pages))
    row_of = inputs["row_of"]
    used = row_of < setup.rows
    scale = setup.head_dim**-0.5
    queries = q.at[row_of].get(mode="fill", fill_value=1)
    pages = setup.backend.stored(k_pages, v_pages)
    out, lse = setup.backend.attend(queries, pages, inputs["work"], scale=scale)
    reference = tree_reference if setup.kind == "tree" else forest_reference
    wide_k, wide_v = (
        jnp.where(filled[:, None, :, None], x, 0).astype(jnp.float32) for x in (k_pages, v_pages)
    )
    right, right_lse = reference(q.astype(jnp.float32) * scale, wide_k, wide_v, inputs, setup)
    right = right.reshape(q.shape).at[row_of].get(mode="clip")
    right_lse = right_lse.reshape(q.shape[:2]).at[row_of].get(mode="clip")

    out = out.astype(jnp.float32)
    faults = jnp.sum(~used[:, None, None] & (out != 0)) + jnp.sum(~used[:, None] & (lse != -jnp.inf))
    faults += jnp.sum(used[:, None] & ~jnp.isfinite(lse)) + jnp.sum(~jnp.isfinite(out))
    error = jnp.where(used[:, None, None], out - right, 0)
    norm = jnp.where(used[:, None, None], right, 0)
    lse_error = jnp.where(used[:, None], jnp.abs(lse - right_lse), 0)
    return jnp.stack([jnp.sum(error**2), jnp.sum(norm**2), lse_error.max(), faults.astype(jnp.float32)])


def filled_slots(inputs: Mapping[str, Any], setup: Setup) -> Bool[Array, "pages page"]:
    """Slots of the pool that some row is given."""
    if setup.kind == "tree":
        return inputs["counts"].any(0).reshape(setup.pool_pages, setup.page)
    valid = jnp.zeros(setup.pool_pages, jnp.int32)
    groups = jnp.full(inputs["prefix_ids"].shape[:1], inputs["prefix_length"])
    for ids, length in ((inputs["prefix_ids"], groups), (inputs["tail_ids"], inputs["tail_length"])):
        valid = valid.at[ids].max(length[:, None] - setup.page * jnp.arange(ids.shape[1]))
    nothing = jnp.arange(setup.pool_pages) == setup.pool_pages - 1
    return (jnp.arange(setup.page) < valid[:, None]) & ~nothing[:, None]


def forest_reference(
    q: Array, k_pages: Array, v_pages: Array, inputs: Mapping[str, Any], setup: Setup
) -> tuple[Array, Array]:
    """Softmax over [prefix, tail] of every row of the grid, both gathered into dense arrays.

    Subscripts: n group, w branch, h KV head, g query head of it, p position, d head_dim.
    """
    grid = setup.grid
    q = q.reshape(grid.groups, grid.width, setup.kv_heads, setup.group_size, setup.head_dim)
    prefix_k, prefix_v = (dense(x, inputs["prefix_ids"]) for x in (k_pages, v_pages))
    tail_k, tail_v = (
        dense(x, inputs["tail_ids"]).reshape(grid.groups, grid.width, setup.kv_heads, -1, setup.head_dim)
        for x in (k_pages, v_pages)
    )
    prefix = product("nwhgd,nhpd->nwhgp", q, prefix_k)
    tail = product("nwhgd,nwhpd->nwhgp", q, tail_k)
    tail_length = inputs["tail_length"].reshape(grid.groups, grid.width, 1, 1, 1)
    prefix = jnp.where(jnp.arange(prefix.shape[-1]) < inputs["prefix_length"], prefix, -jnp.inf)
    tail = jnp.where(jnp.arange(tail.shape[-1]) < tail_length, tail, -jnp.inf)
    weights, lse = softmax(jnp.concatenate([prefix, tail], axis=-1))
    of_prefix, of_tail = jnp.split(weights, [prefix.shape[-1]], axis=-1)
    out = product("nwhgp,nhpd->nwhgd", of_prefix, prefix_v)
    return out + product("nwhgp,nwhpd->nwhgd", of_tail, tail_v), lse


def tree_reference(
    q: Array, k_pages: Array, v_pages: Array, inputs: Mapping[str, Any], setup: Setup
) -> tuple[Array, Array]:
    """Softmax over the whole pool, a position weighted by how often the row sees it."""
    counts: Int[Array, "rows positions"] = inputs["counts"]
    q = q.reshape(setup.rows, setup.kv_heads, setup.group_size, setup.head_dim)
    k, v = (x.swapaxes(0, 1).reshape(setup.kv_heads, -1, setup.head_dim) for x in (k_pages, v_pages))
    scores = product("rhgd,hpd->rhgp", q, k) + jnp.log(counts.astype(jnp.float32))[:, None, None]
    weights, lse = softmax(scores)
    return product("rhgp,hpd->rhgd", weights, v), lse


def dense(pages: Array, ids: Array) -> Array:
    """[lists, kv_heads, positions, head_dim] of page lists [lists, pages]."""
    taken = pages[ids].swapaxes(1, 2)
    return taken.reshape(*taken.shape[:2], -1, taken.shape[-1])


def product(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, precision="highest")


def softmax(scores: Array) -> tuple[Array, Array]:
    """Weights over the last axis, zero where there is nothing; and the log-sum-exp."""
    lse = jax.nn.logsumexp(scores, axis=-1)
    return jnp.exp(scores - jnp.where(jnp.isfinite(lse), lse, 0)[..., None]), lse


def all_cases(matrix: Matrix, seed: int) -> Iterator[Case]:
    """The whole matrix under every configuration, and random trees."""
    numbers = itertools.count(seed)
    for configuration in matrix.configurations():
        for groups, width, prefix, tail in matrix.lengths():
            yield Case("forest", *configuration, groups, width, prefix, tail, seed=next(numbers))
        for _ in range(matrix.mixed):
            yield Case("tree", *configuration, seed=next(numbers))


def setup_of(case: Case, matrix: Matrix, backend: Backend) -> Setup:
    grid = Grid.of(matrix, case.page, narrow=case.width <= matrix.narrow)
    backend = backend.fitted(case.head_dim, jnp.bfloat16, 1)
    if isinstance(backend, Gpu) and backend.tall_step:
        backend = replace(backend, tall_step=1)  # so that steps of any size have tall tiles
    return Setup(case.kind, case.group_size, case.page, case.head_dim, matrix.kv_heads, grid, backend)


def compile_check(
    setup: Setup, example: Mapping[str, Any]
) -> tuple[Callable[..., Array], Callable[..., Any]]:
    """`check` for a setup's arrays, and what makes its (q, k_pages, v_pages)."""
    q, pool = shapes_of(setup)
    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype), dict(example))

    def check_case(q: Array, k_pages: Array, v_pages: Array, inputs: Mapping[str, Any]) -> Array:
        return check(q, k_pages, v_pages, inputs, setup=setup)

    def random_data(seed: Array) -> list[Array]:
        keys = jax.random.split(jax.random.key(seed), 3)
        return [
            jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, (q, pool, pool), strict=True)
        ]

    return (
        jax.jit(check_case).lower(q, pool, pool, inputs).compile(),
        jax.jit(random_data).lower(np.uint32(0)).compile(),
    )


def shapes_of(setup: Setup) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Of the queries and of a pool."""
    heads = setup.kv_heads * setup.group_size
    q = (setup.rows, heads, setup.head_dim)
    pool = (setup.pool_pages, setup.kv_heads, setup.page, setup.head_dim)
    return jax.ShapeDtypeStruct(q, jnp.bfloat16), jax.ShapeDtypeStruct(pool, jnp.bfloat16)


def run_cases(
    cases: Sequence[Case], matrix: Matrix, backend: Backend, processes: int
) -> Iterator[tuple[list[int], np.ndarray]]:
    """What `check` gives, [n, 4], of the cases with these indices; one program's cases after another's."""
    by_setup: dict[Setup, list[int]] = {}
    for index, case in enumerate(cases):
        by_setup.setdefault(setup_of(case, matrix, backend), []).append(index)
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(os.cpu_count()))
        planning: Any = threads
        if processes:
            context = multiprocessing.get_context("spawn")
            planning = stack.enter_context(ProcessPoolExecutor(processes, mp_context=context))
        programs: dict[Setup, Future[Any]] = {}
        planned: dict[Setup, list[Future[Any]]] = {}
        for setup, members in by_setup.items():
            plan = setup.planner()
            programs[setup] = threads.submit(compile_check, setup, inputs_of(cases[members[0]], setup, plan))
            mine = [cases[index] for index in members]
            planned[setup] = [
                planning.submit(plan_chunk, mine[start : start + CHUNK], setup, plan)
                for start in range(0, len(mine), CHUNK)
            ]
        for setup, members in by_setup.items():
            program, random_data = programs.pop(setup).result()
            yield members, run_setup(program, random_data, planned.pop(setup))


def run_setup(
    program: Callable[..., Array], random_data: Callable[..., Any], planned: Sequence[Future[Any]]
) -> np.ndarray:
    data = random_data(np.uint32(0))
    results: list[Array] = []
    for chunk in planned:
        for inputs in chunk.result():
            results.append(program(*data, jax.device_put(inputs)))
        jax.block_until_ready(results[-1])  # so that inputs do not pile up
    return np.array(results)


def report(cases: Sequence[Case], results: np.ndarray) -> dict[str, Any]:
    """Worst errors of each slice of the matrix, and the cases beyond the limits (the worst 30)."""
    squared, norm, lse_error, faults = results.T
    error = np.sqrt(squared / np.where(norm > 0, norm, 1))
    bad = ~((error < OUT_LIMIT) & (lse_error < LSE_LIMIT) & (faults == 0))
    slices: dict[str, dict[str, Any]] = {}
    for dimension in DIMENSIONS:
        members: dict[str, list[int]] = {}
        for index, case in enumerate(cases):
            if case.kind == "forest" or dimension not in ("groups", "width", "prefix", "tail"):
                members.setdefault(str(getattr(case, dimension)), []).append(index)
        slices[dimension] = {
            value: {
                "cases": len(rows),
                "error": float(error[rows].max()),
                "lse_error": float(lse_error[rows].max()),
                "bad": int(bad[rows].sum()),
            }
            for value, rows in members.items()
        }
    order = np.argsort(-np.nan_to_num(error, nan=np.inf) - 1e3 * (faults > 0))
    worst = [
        asdict(cases[i]) | {"error": error[i], "lse_error": lse_error[i], "faults": faults[i]}
        for i in order[:30]
        if bad[i]
    ]
    return {
        "cases": len(cases),
        "bad": int(bad.sum()),
        "error": float(error.max()),
        "lse_error": float(lse_error.max()),
        "limits": {"error": OUT_LIMIT, "lse_error": LSE_LIMIT},
        "slices": slices,
        "worst": worst,
    }


def text(result: Mapping[str, Any]) -> str:
    lines: list[str] = []
    for dimension, values in result["slices"].items():
        cells = (f"{name}: {cell['error']:.2e} ({cell['bad']} bad)" for name, cell in values.items())
        lines.append(f"{dimension:12} {'  '.join(cells)}")
    lines += [f"{case}" for case in result["worst"][:8]]
    lines.append(
        f"{result['cases']} cases, {result['bad']} beyond the limits; error up to {result['error']:.1e} "
        f"(limit {OUT_LIMIT:.0e}), log-sum-exp error up to {result['lse_error']:.1e} "
        f"(limit {LSE_LIMIT:.0e}), {result['seconds']:.0f} s"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str], backend: Backend | None = None) -> int:
    """`backend`: one that has no name, instead of the command's."""
    parser = Command("bench.checks.kernels", "Checks attention.")
    parser.add_argument("--backend", default=default_backend(128, jnp.bfloat16).name)
    parser.add_argument("--sample", type=int, help="that many cases, drawn at random, instead of all")
    parser.add_argument("--scale", choices=["full", "small"], default="full")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**24)
    parser.add_argument("--processes", type=int, default=0, help="that plan beside this one")
    options = parser.parse_args(arguments)
    backend = backend or backend_named(options.backend)
    start = time.perf_counter()
    matrix = SMALL if options.scale == "small" else Matrix()
    cases = list(all_cases(matrix, options.seed))
    if options.sample is not None:
        cases = random.Random(options.seed).sample(cases, options.sample)
    found = head(parser.typed(arguments), hardware.describe())
    found |= {"backend": backend.name, "seed": options.seed, "planned_cases": len(cases)}
    done: list[Case] = []
    results = np.zeros((0, 4))
    result: dict[str, Any] = {}
    for members, values in run_cases(cases, matrix, backend, options.processes):
        done += [cases[index] for index in members]
        results = np.concatenate([results, values])
        seconds = time.perf_counter() - start
        say(f"[{seconds:6.1f} s] {len(done)} of {len(cases)} cases", options.json)
        result = found | {"seconds": seconds} | report(done, results)
        keep(result, options.json)
    conclude(result, text(result), options.json)
    return int(result["bad"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
