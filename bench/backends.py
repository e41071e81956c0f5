"""The same cases on every backend at hand, each against the byte floor of its device, in one table.

    python -m bench.backends --json OUT --plot PNG
    python -m bench.backends --tensor-parallel 2                          # GPUs or TPUs that share the model
    python -m bench.backends --backend --estimate --with FILE ... --plot PNG    # of earlier results alone

Attention of one layer (decode rows that share nothing, those of groups that share a prefix, a prompt chunk)
and a model's whole decode step: `bench.device.cases` has their lengths. What is here is measured. For TPUs
that are not, libtpu compiles the same programs, if it is installed; what they would take is estimated from
that and from published figures, and every such row says so. Where there is only a CPU, the model that is
measured is a small one, unless another is asked for.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax
from jax.errors import JaxRuntimeError

from attention import backend_named, default_backend
from bench import hardware
from bench.command import Command
from bench.device import kernels
from bench.device.cases import CASES, STEP, Row, attention_row, earlier, measured, shape_of, table
from bench.device.floor import floor_seconds
from bench.device.kernels import KernelBench
from bench.device.shapes import shrunk
from bench.device.step import DTYPE, StepBench, tiny
from bench.plot import plot_backends
from bench.result import conclude, head, keep, say
from bench.tpu import cases as tpu_cases
from bench.tpu.topology import installed
from model.config import PRESETS, ModelConfig
from model.sharding import Placement, ask_for_devices

MODEL = "qwen3-32b"
CPU_MODEL, CPU_LAYERS = "qwen3-0.6b", 2
TOPOLOGIES = ("v5e:2x4", "v6e:2x4", "v5p:2x2x1")


class Measuring:
    """One backend on the devices that are here."""

    def __init__(self, backend: str, config: ModelConfig, placement: Placement, *, small: bool) -> None:
        self.backend, self.config, self.placement, self.small = backend, config, placement, small
        self.few = small or jax.default_backend() == "cpu"

    def rows(self) -> list[Row]:
        names = [case for case in CASES if case != STEP]
        options = kernels.Options(backend=self.backend, scale="tiny" if self.small else "full")
        shapes = [shape_of(name, self.config, self.placement) for name in names]
        result = KernelBench(options, shapes).run()
        result["hardware"]["devices"] = self.placement.count
        rows = [
            attention_row(case, **measured(result, name, case), model=self.config.name)
            for name, case in zip(names, result["cases"], strict=True)
        ]
        return [*rows, self.step(result)]

    def step(self, result: dict[str, Any]) -> Row:
        """The model's whole step, on the device of a result of its kernels, and at its rate."""
        shape = shape_of(STEP, self.config)
        shape = shrunk(shape) if self.small else shape
        rate, seconds, error = result["copy_tb_s"], None, None
        try:
            named = backend_named(self.backend)
            bench = StepBench(self.config, [shape], named, self.placement, seed=0, whole=True)
            seconds = bench.seconds(shape, "step", *((2, 3) if self.few else (10, 3)))
        except JaxRuntimeError as raised:
            error = f"{raised}"[:500]
        return Row(
            **measured(result, STEP, shape.as_json()),
            model=self.config.name,
            layers=self.config.num_layers,
            seconds=seconds,
            floor_seconds=floor_seconds(self.config, DTYPE, shape.kv_tokens, rate, self.placement),
            error=error,
        )


def measure(options: Namespace) -> Iterator[list[Row]]:
    """Rows of each backend that was asked for, or else of the device's own and the one that runs anywhere."""
    on_cpu = jax.default_backend() == "cpu"
    config = PRESETS[options.model or (CPU_MODEL if on_cpu else MODEL)]
    layers = options.layers or (CPU_LAYERS if on_cpu and not options.model else config.num_layers)
    config = replace(config, num_layers=layers)
    small = options.scale == "tiny"
    config = tiny(config) if small else config
    placement = hardware.placement(config, options.tensor_parallel, peer_memory=options.peer_memory)
    names = options.backend
    if names is None:
        names = dict.fromkeys((default_backend(config.head_dim, DTYPE).name, "xla"))
    for name in names:
        yield Measuring(name, config, placement, small=small).rows()


def estimate(options: Namespace) -> list[Row]:
    """For the topologies that were asked for, or else for all, where libtpu is and no TPU."""
    topologies = options.estimate
    if topologies is None:
        topologies = TOPOLOGIES if installed() and jax.default_backend() != "tpu" else ()
        if not installed():
            say("no TPU is estimated: that needs libtpu (pip install -e '.[tpu]')", options.json)
    rows: list[Row] = []
    for topology in topologies:
        say(f"compiling for {topology}", options.json)
        result = tpu_cases.estimated(topology, options.model or MODEL, options.layers)
        rows += [Row.of_json(row) for row in result["rows"]]
    return rows


def command() -> Command:
    parser = Command("bench.backends", "Compares backends, each with the byte floor of its device.")
    parser.add_argument("--model", choices=sorted(PRESETS), help=f"default: {MODEL}; on a CPU {CPU_MODEL}")
    parser.add_argument("--layers", type=int, help=f"default: the model's; on a CPU {CPU_LAYERS}")
    parser.add_argument(
        "--backend", nargs="*", help="what to measure here; default: the device's own backend, and xla"
    )
    parser.add_argument(
        "--estimate",
        nargs="*",
        metavar="TOPOLOGY",
        help=f"TPUs that are not here; default: {' '.join(TOPOLOGIES)}, with libtpu and without a TPU",
    )
    parser.add_argument(
        "--with",
        dest="others",
        nargs="*",
        default=(),
        type=Path,
        help="results of this benchmark from elsewhere, or of bench.device.kernels and bench.device.step",
    )
    parser.add_argument("--scale", choices=["full", "tiny"], default="full")
    parser.add_argument("--plot", type=Path, help="an image file (needs matplotlib)")
    parser.add_tensor_parallel()
    return parser


def main(arguments: Sequence[str]) -> dict[str, Any]:
    options = command().parse_args(arguments)
    of = PRESETS[options.model or MODEL]
    ask_for_devices(options.tensor_parallel)
    rows = [row for path in options.others for row in earlier(json.loads(path.read_text()), of)]
    with contextlib.redirect_stdout(sys.stderr):
        result = head(command().typed(arguments), hardware.describe(options.tensor_parallel))
        for measured_rows in measure(options) if options.backend != [] else ():
            rows += measured_rows
            keep({**result, "rows": [row.as_json() for row in rows]}, options.json)
        rows += estimate(options)
    result["rows"] = [row.as_json() for row in rows]
    if options.plot is not None:
        plot_backends(rows, options.plot)
    return conclude(result, table(rows), options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
