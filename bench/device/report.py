"""A kernel benchmark's result as text: one line per shape, and how it stands against the aims."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

FLASHINFER = ("flat", "cascade", "composed_fa2", "composed_fa3", "prefill_fa2", "prefill_fa3")
LARGE = 1e8  # bytes from which a shared shape should be near the byte floor
NOISE = 0.05


def best_peer(case: Mapping[str, Any]) -> tuple[str, float] | None:
    """The fastest variant measured on a case and its microseconds."""
    times = {name: case[f"flashinfer_{name}_us"] for name in FLASHINFER if f"flashinfer_{name}_us" in case}
    return min(times.items(), key=lambda item: item[1]) if times else None


def speedup(case: Mapping[str, Any]) -> float | None:
    """The best peer's time over ours."""
    best = best_peer(case)
    return best[1] / case["ours_us"] if best and "ours_us" in case else None


def label(case: Mapping[str, Any]) -> str:
    tail = f"{case['tail']}{'~' if case['ragged'] is not None else ''}"
    heads = f"{case['q_heads']}/{case['kv_heads']}"
    return (
        f"{case['suite']:8}{case['groups']:3} x {case['width']:<4}{case['prefix']:5}+{tail:<6}"
        f"{heads:>5} p{case['page']:<3}"
    )


def table(cases: Sequence[Mapping[str, Any]]) -> str:
    """Times in microseconds; "x floor" is ours over the byte floor, "speedup" the best peer over ours."""
    lines = [
        f"{'suite     groups, lengths, heads, page':<38}{'MB':>6}{'floor':>7}{'ours':>8}{'kernels':>8}"
        f"{'x floor':>8}{'mma':>7}  {'best peer':<20}{'speedup':>8}"
    ]
    for case in cases:
        if "ours_us" not in case:
            lines.append(f"{label(case):<38} {case.get('error', 'not measured')}"[:120])
            continue
        best = best_peer(case)
        peer = f"  {best[1]:7.1f} {best[0]:<12}{best[1] / case['ours_us']:8.2f}" if best else ""
        lines.append(
            f"{label(case):<38}{case['unique_bytes'] / 1e6:6.0f}{case['floor_us']:7.1f}{case['ours_us']:8.1f}"
            f"{case.get('ours_kernels_us', math.nan):8.1f}{case['ours_us'] / case['floor_us']:8.2f}"
            f"{case['arithmetic_us']:7.1f}{peer}"
        )
    return "\n".join(lines)


def summary(result: Mapping[str, Any]) -> str:
    """How the result stands against the aims for each suite."""
    cases = [case for case in result["cases"] if "ours_us" in case]
    lines = [
        f"{result['hardware']['device']}, jax {result['versions']['jax']}, backend {result['backend']}: "
        f"copy {result['copy_tb_s']:.2f} TB/s, matmul {result['matmul_tflop_s']:.0f} TFLOP/s, "
        f"seed {result['seed']}, {len(cases)} of {len(result['cases'])} cases"
    ]
    by_suite = {suite: [case for case in cases if case["suite"] == suite] for suite in _suites(cases)}
    for suite, members in by_suite.items():
        speedups = [ratio for case in members if (ratio := speedup(case)) is not None]
        if speedups:
            mean = math.exp(sum(map(math.log, speedups)) / len(speedups))
            level = sum(ratio >= 1 - NOISE for ratio in speedups)
            lines.append(
                f"{suite}: {mean:.2f} x the best peer (geometric mean), lowest {min(speedups):.2f}, "
                f"at least level (5 % noise) on {level} of {len(speedups)}"
            )
    for lanes, limit in (((0, 64), 1.20), ((65, 128), 1.50)):
        ratios = [
            case["ours_us"] / case["floor_us"]
            for case in by_suite.get("shared", [])
            if case["unique_bytes"] >= LARGE
            and lanes[0] <= case["width"] * case["q_heads"] // case["kv_heads"] <= lanes[1]
        ]
        if ratios:
            lines.append(
                f"shared, 100 MB and more, {lanes[0]}..{lanes[1]} query lanes: up to {max(ratios):.2f} x the "
                f"floor (aim {limit}), {sum(ratio <= limit for ratio in ratios)} of {len(ratios)}"
            )
    for case in by_suite.get("prefill", []):
        best = best_peer(case)
        peer = f", {best[0]} {case['arithmetic_us'] / best[1]:.0%}" if best else ""
        lines.append(
            f"prefill {case['q_heads']}/{case['kv_heads']} p{case['page']}: "
            f"{case['arithmetic_us'] / case['ours_us']:.0%} of the matmul rate{peer}"
        )
    return "\n".join(lines)


def _suites(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(case["suite"] for case in cases))
