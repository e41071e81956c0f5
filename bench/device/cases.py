"""The cases that `bench.backends` compares on every device, and a row of that comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal, Self

from bench.device.shapes import Shape, lengths
from bench.result import device_of
from model.config import ModelConfig
from model.sharding import ON_ONE_DEVICE, Placement

PAGE = 64
CHUNK, STEP = "prompt chunk", "whole step"
# Suite, groups, width, prefix and tail tokens. The first three are attention of one layer.
CASES: Mapping[str, tuple[str, int, int, int, int]] = MappingProxyType(
    {
        "decode, unshared": ("decode", 64, 1, 2048, 192),
        "decode, shared": ("decode", 8, 8, 2048, 192),
        CHUNK: ("prefill", 1, 1, 8192, 512),
        STEP: ("decode", 8, 8, 2048, 192),
    }
)
# Shapes of bench.device.kernels that come next to a case of the same rows.
LIKE: Mapping[str, tuple[str, int, int, int, int]] = MappingProxyType(
    {
        "decode, unshared": ("decode", 64, 1, 0, 4096),
        "decode, shared": ("shared", 4, 16, 4096, 256),
    }
)


def shape_of(case: str, config: ModelConfig, placement: Placement = ON_ONE_DEVICE) -> Shape:
    """What is read in a case, by one of the devices that share the model's heads."""
    heads = config.num_heads // placement.parts("heads")
    kv_heads = config.num_kv_heads // placement.parts("kv_heads")
    return Shape(*CASES[case], PAGE, heads, kv_heads, config.head_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What a case takes with a backend.

    shape               what was read: groups of branches, tokens of their prefixes and tails
    devices             that share the model: an attention's row is one of them, with its share of the heads
    layers              of the step; 1 of an attention
    how                 "estimated": by a compiler and published figures, where there is no such device
    seconds             None if it could not run; `error` says why
    floor_seconds       one device's bytes, each moved once, at `tb_s`
    tb_s                terabytes a second: of a copy where it was measured, else published
    arithmetic_seconds  of an attention's products, at a measured or published rate
    ran_on              when, and with which versions
    """

    case: str
    shape: str
    backend: str
    device: str
    devices: int
    model: str
    layers: int
    how: Literal["measured", "estimated"]
    seconds: float | None
    floor_seconds: float
    tb_s: float
    arithmetic_seconds: float | None = None
    ran_on: str
    error: str | None = None

    @property
    def over_floor(self) -> float | None:
        return None if self.seconds is None else self.seconds / self.floor_seconds

    @property
    def series(self) -> str:
        """What its points are called in a picture."""
        on = device_of({"device": self.device, "devices": self.devices})
        return f"{on}, {self.backend}, {self.model}{', estimated' * (self.how == 'estimated')}"

    @property
    def differs(self) -> bool:
        """Whether what was read is not what the case has."""
        return self.shape != lengths_of(self.case)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "over_floor": self.over_floor}

    @classmethod
    def of_json(cls, row: Mapping[str, Any]) -> Self:
        """Raises TypeError if it is not one."""
        return cls(**{name: value for name, value in row.items() if name != "over_floor"})


def when_and_with(result: Mapping[str, Any]) -> str:
    """When a result was made, and with which versions of what decides."""
    versions = result["versions"]
    named = [f"{name} {versions[name]}" for name in ("jax", "libtpu") if name in versions]
    return ", ".join([result["time"], *named])


def earlier(result: Mapping[str, Any], config: ModelConfig) -> list[Row]:
    """The rows of a result of bench.backends, or those that results of bench.device.kernels and
    bench.device.step are worth, for a model's heads. Raises ValueError for another result."""
    if "rows" in result:
        return [Row.of_json(row) for row in result["rows"]]
    cases = result.get("cases", [])
    if any("step_ms" in case for case in cases):
        return _of_steps(result)
    if any("ours_us" in case for case in cases):
        return _of_kernels(result, config)
    raise ValueError(f"not a result of bench.backends, bench.device.kernels or step: {result['command']}")


def _of_steps(result: Mapping[str, Any]) -> list[Row]:
    return [
        Row(
            **measured(result, STEP, case),
            model=result["model"],
            layers=result["layers"],
            seconds=case["step_ms"] / 1e3,
            floor_seconds=case["floor_ms"] / 1e3,
        )
        for case in result["cases"]
        if _read(case) == CASES[STEP][1:]
    ]


def _of_kernels(result: Mapping[str, Any], config: ModelConfig) -> list[Row]:
    """Of shapes that are a case's own, or else like one."""
    heads = (PAGE, config.num_heads, config.num_kv_heads, config.head_dim)
    timed = {
        (case["suite"], *_read(case)): case
        for case in result["cases"]
        if "ours_us" in case
        and case["ragged"] is None
        and (case["page"], case["q_heads"], case["kv_heads"], case["head_dim"]) == heads
    }
    rows: list[Row] = []
    for name, own in CASES.items():
        found = timed.get(own) or timed.get(LIKE.get(name, own))
        if name != STEP and found is not None:
            rows.append(attention_row(found, **measured(result, name, found), model=config.name))
    return rows


def attention_row(case: Mapping[str, Any], /, **of_row: Any) -> Row:
    """Of a case of bench.device.kernels."""
    took = case.get("ours_us")
    return Row(
        **of_row,
        layers=1,
        seconds=None if took is None else took / 1e6,
        floor_seconds=case["floor_us"] / 1e6,
        arithmetic_seconds=case["arithmetic_us"] / 1e6,
        error=case.get("error"),
    )


def measured(result: Mapping[str, Any], name: str, case: Mapping[str, Any]) -> dict[str, Any]:
    """What a row of a result's case has from its head."""
    hardware = result["hardware"]
    return {
        "case": name,
        "shape": lengths(case),
        "backend": result["backend"],
        "device": hardware["device"],
        "devices": hardware.get("devices", 1),
        "how": "measured",
        "tb_s": result["copy_tb_s"],
        "ran_on": when_and_with(result),
    }


def _read(case: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(case[name] for name in ("groups", "width", "prefix", "tail"))


def table(rows: Sequence[Row]) -> str:
    """A line for each row, case by case: of every row, whether it was measured or estimated.

    "x products": over the time of an attention's matrix products alone.
    """
    lines: list[str] = []
    for case in CASES:
        of_case = [row for row in rows if row.case == case]
        if of_case:
            unit, factor = ("ms", 1e3) if case == STEP else ("us", 1e6)
            lines.append(
                f"{case:<40}{'model, layers':<21}{'how':<11}{f'floor {unit}':>11}{unit:>11}{'x floor':>9}"
                f"{'x products':>12}  {lengths_of(case)}"
            )
            lines += [_line(row, factor) for row in of_case]
    return "\n".join(lines)


def _line(row: Row, factor: float) -> str:
    on = f"  {device_of({'device': row.device, 'devices': row.devices})}, {row.backend}"
    model = f"{row.model}, {row.layers}"
    start = f"{on:<40}{model:<21}{row.how:<11}{factor * row.floor_seconds:>11.2f}"
    if row.seconds is None:
        return f"{start}  did not run: {' '.join((row.error or '').split())[:60]}"
    products = f"{row.seconds / row.arithmetic_seconds:.2f}" if row.arithmetic_seconds else ""
    other = f"  {row.shape}" if row.differs else ""
    line = f"{start}{factor * row.seconds:>11.2f}{row.over_floor:>9.2f}{products:>12}{other}"
    return line.rstrip()


def lengths_of(case: str) -> str:
    return lengths(dict(zip(("groups", "width", "prefix", "tail"), CASES[case][1:], strict=True)))
