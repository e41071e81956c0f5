"""GB/s of writing and restoring an Orbax checkpoint of a preset's shapes, beside plain reads of its files.

    python -m bench.device.checkpoint --model qwen3-8b --folder DIR --json OUT

Random weights on the device are written by what taper-convert writes with and restored by what taper-serve
loads with, straight into arrays of the device: once from the disk, after the files were dropped from the page
cache, and once more from the page cache. What was written is removed.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import hardware
from bench.command import Command
from bench.device.step import tiny
from bench.result import conclude, head
from bench.timing import seconds
from model.checkpoint import load_model, save_orbax
from model.config import PRESETS, ModelConfig
from model.decoder import Decoder
from model.sharding import ON_ONE_DEVICE
from model.weights import random_weights

DTYPE = jnp.bfloat16
BLOCK = 2**24  # bytes of a plain read
READERS = 8  # of several files at once
COMPARED = 16  # arrays whose values are compared, spread over the model


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def drop_from_cache(folder: Path) -> float | None:
    """Takes the folder's files out of the page cache; the share that is still there, or None if unknown."""
    os.sync()
    cached = blocks = 0
    try:
        for path in files_of(folder):
            with path.open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                for offset in range(0, path.stat().st_size, BLOCK):
                    blocks += 1
                    cached += _is_cached(file.fileno(), offset)
    except OSError:
        return None
    return cached / blocks


def _is_cached(file: int, offset: int) -> bool:
    try:
        os.preadv(file, [bytearray(1)], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    return True


def read_plainly(folder: Path, readers: int) -> None:
    """Reads the folder's files from beginning to end, `readers` blocks at a time."""

    def read(block: tuple[Path, int]) -> None:
        path, offset = block
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            file.readinto(bytearray(BLOCK))

    blocks = [(path, at) for path in files_of(folder) for at in range(0, path.stat().st_size, BLOCK)]
    with ThreadPoolExecutor(readers) as pool:
        list(pool.map(read, blocks))


def some_arrays(model: Decoder) -> list[np.ndarray]:
    leaves = model.split()[1]
    return [np.asarray(leaf) for leaf in leaves[:: max(1, len(leaves) // COMPARED)]]


def write_random(config: ModelConfig, folder: Path, seed: int) -> tuple[float, int, list[np.ndarray]]:
    """Seconds of writing, bytes of the arrays, and some of them."""
    model = random_weights(Decoder(config, DTYPE), seed, ON_ONE_DEVICE)
    weights = jax.block_until_ready(model.split()[1])
    took = seconds(lambda: save_orbax(model, folder))
    return took, sum(leaf.nbytes for leaf in weights), some_arrays(model)


def measure(config: ModelConfig, folder: Path, seed: int) -> dict[str, Any]:
    """Writes to `folder`, which must be empty, and reads it back."""
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    writing, size, written = write_random(config, folder, seed)
    stored = sum(path.stat().st_size for path in files_of(folder))
    restored = None

    def restore() -> None:
        nonlocal restored
        restored = None  # so that the device never holds two
        restored = load_model(str(folder), DTYPE, "orbax")
        jax.block_until_ready(restored.split()[1])

    still_cached = [drop_from_cache(folder)]
    cold, warm = seconds(restore), seconds(restore)
    assert restored is not None
    same = all(np.array_equal(a, b) for a, b in zip(written, some_arrays(restored), strict=True))
    plain = {}
    for readers in (1, READERS):
        still_cached.append(drop_from_cache(folder))
        plain[str(readers)] = stored / seconds(lambda count=readers: read_plainly(folder, count)) / 1e9
    return {
        "array_bytes": size,
        "file_bytes": stored,
        "files": len(files_of(folder)),
        "cached_before_reads": still_cached,
        "write_gb_s": size / writing / 1e9,
        "restore_cold_gb_s": size / cold / 1e9,
        "restore_warm_gb_s": size / warm / 1e9,
        "plain_read_gb_s": plain,
        "compared_arrays": len(written),
        "same": same,
    }


def text(result: dict[str, Any]) -> str:
    lines = [
        f"{result['model']}: {result['array_bytes'] / 1e9:.2f} GB of arrays, "
        f"{result['file_bytes'] / 1e9:.2f} GB in {result['files']} files"
    ]
    left = result["cached_before_reads"]
    if None in left:
        lines.append("the files could not be dropped from the page cache: what is called cold may not be")
    elif max(left) > 0.01:
        lines.append(f"up to {max(left):.0%} of the files stayed in the page cache: cold is not quite cold")
    for name, rate in (
        ("write", result["write_gb_s"]),
        ("restore, cold", result["restore_cold_gb_s"]),
        ("restore, from the page cache", result["restore_warm_gb_s"]),
        *((f"plain read, {n} at a time, cold", rate) for n, rate in result["plain_read_gb_s"].items()),
    ):
        lines.append(f"  {name:<32}{rate:>8.2f} GB/s")
    says = "equal what was written" if result["same"] else "DIFFER FROM WHAT WAS WRITTEN"
    return "\n".join([*lines, f"{result['compared_arrays']} restored arrays {says}"])


def main(arguments: Sequence[str]) -> dict[str, Any]:
    parser = Command("bench.device.checkpoint", "GB/s of an Orbax checkpoint.")
    parser.add_argument("--model", choices=sorted(PRESETS), default="qwen3-8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for a smaller disk")
    parser.add_argument("--scale", choices=["full", "tiny"], default="full")
    parser.add_argument(
        "--folder", type=Path, required=True, help="where to write; a folder of its own is made"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    config = PRESETS[options.model]
    config = tiny(config) if options.scale == "tiny" else config
    config = replace(config, num_layers=options.layers or config.num_layers)
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        result = {
            **head(parser.typed(arguments), hardware.describe()),
            "model": config.name,
            "layers": config.num_layers,
            "seed": options.seed,
            **measure(config, Path(name), options.seed),
        }
    return conclude(result, text(result), options.json)


if __name__ == "__main__":
    sys.exit(0 if main(sys.argv[1:])["same"] else 1)
