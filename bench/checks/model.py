"""Checks what a model computes on the device at hand: greedy tokens, logits, and what a row's bits depend on.

    python -m bench.checks.model --json OUT           # a minute on a GPU
    python -m bench.checks.model --tensor-parallel 2  # the models divided over two of them
    python -m bench.checks.model --scale tiny         # anywhere

greedy    float32: the tokens of `model.decode` equal those of taper-decode on the CPU, in a process of its
          own, and of transformers (optional: torch, on its own device), all from one Hugging Face folder.
logits    bfloat16: every position of forked sequences, fed in random chunks through one step program,
          against a dense float32 forward pass of the same weights that knows nothing of pages.
schedule  bfloat16: one request through the same program alone, with others, elsewhere among the rows, in
          other chunks. Which of these keep its logits bit for bit is reported, not judged.

Exits with 1 if the tokens differ or the logits miss a bar.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs some memory too

import jax.numpy as jnp

from attention import Backend, backend_named, default_backend
from bench import hardware
from bench.checks.greedy import check_greedy
from bench.checks.logits import AGREEMENT_BAR, ERROR_BAR, LEAD, Served, check_logits
from bench.checks.scale import SCALES
from bench.checks.schedules import check_schedules
from bench.command import Command
from bench.result import conclude, head


def passed(result: Mapping[str, Any]) -> bool:
    """Whether everything that could be compared is as it should be."""
    compared = [case[peer] for case in result["greedy"] for peer in ("cpu", "transformers") if case[peer]]
    return all(each["ok"] for each in [*compared, result["logits"]])


def text(result: Mapping[str, Any]) -> str:
    lines = [f"float32, backend {result['backends']['float32']}: greedy tokens as those of"]
    for case in result["greedy"]:
        for peer in ("cpu", "transformers"):
            found = case[peer]
            says = (
                f"{found['same']} of {found['tokens']} {_verdict(found['ok'])}" if found else "not installed"
            )
            lines.append(f"  {case['model']:<24}{peer:<14}{says}")
    logits = result["logits"]
    lines += [
        f"bfloat16, backend {result['backends']['bfloat16']}: {logits['positions']} positions of "
        f"{logits['model']} against float32: error {logits['error']:.2e} (bar {ERROR_BAR}), same top token "
        f"in {logits['same_top_token']:.2%} of the {logits['clear_positions']} that lead by {LEAD} "
        f"(bar {AGREEMENT_BAR:.0%}) {_verdict(logits['ok'])}",
        f"one request in a bucket of {result['rows']} rows, compared with itself alone:",
        f"  {'':<24}{'bit-equal rows':>16}{'largest difference':>20}{'same top token':>16}",
    ]
    for row in result["schedules"]:
        lines.append(
            f"  {row['schedule']:<24}{row['bit_equal_rows']:>16.1%}{row['largest_difference']:>20.2e}"
            f"{row['same_top_token']:>16.2%}"
        )
    return "\n".join(lines)


def _verdict(ok: bool) -> str:
    return "(ok)" if ok else "(MISSED)"


def main(arguments: Sequence[str], backend: Backend | None = None) -> dict[str, Any]:
    """`backend`: one that has no name, instead of the command's."""
    parser = Command("bench.checks.model", "Checks what a model computes on this device.")
    parser.add_argument("--backend", default=None, help="default: the device's")
    parser.add_argument("--scale", choices=sorted(SCALES), default="full")
    parser.add_argument("--without-greedy", action="store_true", help="check logits and schedules only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_tensor_parallel()
    options = parser.parse_args(arguments)
    scale, devices = SCALES[options.scale], options.tensor_parallel
    over = partial(hardware.placement, devices=devices, peer_memory=options.peer_memory)
    placement = over(scale.logits)
    backend = backend or (backend_named(options.backend) if options.backend else None)
    backends = {
        jnp.dtype(dtype).name: (backend or default_backend(config.head_dim, dtype)).name
        for dtype, config in ((jnp.float32, scale.greedy[0]), (jnp.bfloat16, scale.logits))
    }
    result: dict[str, Any] = {
        **head(parser.typed(arguments), hardware.describe(devices)),
        "backends": backends,
        "rows": scale.rows,
        "seed": options.seed,
        "greedy": [
            check_greedy(scale, config, options.seed, backend, over(config))
            for config in (() if options.without_greedy else scale.greedy)
        ],
    }
    served = Served(scale, options.seed, backend, placement)
    result["logits"] = check_logits(served, options.seed)
    result["schedules"] = check_schedules(served, options.seed)
    result["ok"] = passed(result)
    return conclude(result, text(result), options.json)


if __name__ == "__main__":
    sys.exit(0 if main(sys.argv[1:])["ok"] else 1)
