"""Step-time profiles: what steps take on a device with a model, measured beforehand and shipped.

`python -m bench.device.calibrate` writes them. A profile fits a server whose devices, attention, type of
numbers and shape of model are those it was measured with; weights and names make no difference.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scheduler.predictor import StepLatencyModel

if TYPE_CHECKING:
    from model.config import ModelConfig
    from model.sharding import Placement
    from serve.engine.runner import Runner

FOLDER = Path(__file__).parent / "profiles"
MOST_OFF = 0.25  # by which a profile may miss a bucket's time on this machine and still be believed


def load_profile(name: str) -> dict[str, Any]:
    """The profile at the path `name`, or the one shipped under that name. Raises ValueError, OSError."""
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    if not path.exists():
        raise ValueError(f"there is no profile {name!r}: give a .json file, or one of {', '.join(shipped())}")
    try:
        profile = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not (isinstance(profile, dict) and {"name", "forms"} <= profile.keys()):
        raise ValueError(f"{path} is no profile: python -m bench.device.calibrate writes them")
    return profile


def shipped() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def conditions(
    device: str, model: ModelConfig, dtype: str, backend: str, placement: Placement
) -> dict[str, Any]:
    """What a step's time depends on besides its load: a device's kind, how many share the model, and how they
    add up what each of them has."""
    sizes = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")
    shape = {size: getattr(model, size) for size in (*sizes, "vocab_size", "tie_embeddings", "architecture")}
    return {
        "device": device,
        "dtype": dtype,
        "backend": backend,
        "tensor_parallel": placement.count,
        "peer_memory": placement.memory is not None,
        "shape": shape,
    }


def matching(wanted: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The shipped profiles that were measured under these conditions; none for a CPU: all go by one name."""
    for name in shipped() if wanted["device"] != "cpu" else ():
        profile = load_profile(name)
        if all(profile.get(key) == value for key, value in wanted.items()):
            yield profile


def misses(model: StepLatencyModel, measured: StepLatencyModel, runner: Runner) -> dict[int, float]:
    """For each bucket, by what share its probe was measured to take longer than `model` says."""
    return {
        bucket: measured.rows_seconds(bucket) / model.predict(runner.probe_load(bucket, 1)) - 1.0
        for bucket in runner.buckets
    }
