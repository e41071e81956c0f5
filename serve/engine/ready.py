"""What getting ready came to: the table that `taper-serve` prints before it serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from model.config import ModelConfig
from model.kv_cache import bytes_per_page
from model.sharding import Placement
from scheduler.predictor import StepLatencyModel
from serve.engine.memory import IN_FLIGHT, SHARES, MemoryPlan
from serve.engine.runner import RunnerConfig

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A started server's sizes and times.

    latency_source   where the step times are from
    memory           how the pool was sized; None where the number of pages was given, or no limit is known
    load_seconds     until the weights were on the device, while programs compiled
    compile_seconds  of each bucket, several at a time
    seconds          all of it
    """

    model: ModelConfig
    dtype: str
    device: str
    runner: RunnerConfig
    memory: MemoryPlan | None
    latency: StepLatencyModel
    latency_source: str
    load_seconds: float
    compile_seconds: Mapping[int, float]
    seconds: float

    def __str__(self) -> str:
        """The table, as lines of text."""
        runner = self.runner
        placement, count = runner.placement, runner.placement.count
        page = bytes_per_page(runner.backend, self.model, runner.page_size, self.dtype, placement)
        tokens = runner.num_pages * runner.page_size
        device, each = (f"{count} x {self.device}", " on each device") if count > 1 else (self.device, "")
        lines = [
            f"{self.model.name}, {self.dtype}, on {device}, attention by {runner.backend.name}",
            *_division(placement),
            f"  weights    on the device after {self.load_seconds:.1f} s",
            f"  KV pool    {runner.num_pages} pages of {runner.page_size} tokens: {tokens} tokens, "
            f"{page * runner.num_pages / GIB:.1f} GiB{each}",
            *self._memory(),
            f"  steps      {self.latency_source}",
            "  bucket  compiled, s  step, ms",
        ]
        for bucket, seconds in sorted(self.compile_seconds.items()):
            step = 1e3 * self.latency.rows_seconds(bucket)
            lines.append(f"  {bucket:>6}  {seconds:>11.1f}  {step:>8.2f}")
        return "\n".join([*lines, f"  ready after {self.seconds:.1f} s"])

    def _memory(self) -> list[str]:
        if self.memory is None:
            return []
        plan, each = self.memory, " of each device" if self.runner.placement.count > 1 else ""
        parts = {
            "weights": plan.weights,
            "slots": plan.slots,
            f"{IN_FLIGHT} steps of {max(self.compile_seconds)} rows": IN_FLIGHT * plan.step,
            "reserve": plan.reserve,
        }
        split = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
        return [
            f"  memory     {plan.limit / GIB:.1f} GiB{each} less {split};",
            f"             what is left, in whole {SHARES}ths of the memory, is the pool",
        ]


def _division(placement: Placement) -> list[str]:
    """What devices that share a model divide, and what each of them has whole."""
    if placement.count == 1:
        return []
    parts = {axis: placement.parts(axis) for axis in ("heads", "kv_heads", "vocab")}
    whole = "divided" if parts["vocab"] > 1 else "whole on each"
    lines = [
        f"  devices    heads and MLP in {parts['heads']} parts, KV heads in {parts['kv_heads']}; "
        f"vocabulary {whole}"
    ]
    if placement.memory:
        lines.append("             that add up a layer's parts through each other's memory")
    return lines
