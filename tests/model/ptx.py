"""Enough of PTX to run the kernel that two GPUs add up with: one thread, word by word."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

LOW = 0xFFFFFFFF


def bf16_pairs_sum(a: int, one: int, b: int) -> int:
    """Two bfloat16 in a word each: a x 1 + b."""
    assert one == 0x3F803F80
    first, second = (np.array([word], np.uint32).view(jnp.bfloat16) for word in (a, b))
    return int((first + second).view(np.uint32)[0])


OPERATIONS: dict[str, Callable[..., int]] = {
    "mov.u32": lambda a: a,
    "mov.b32": lambda a: a,
    "mov.b64": lambda pair: pair,
    "cvt.u64.u32": lambda a: a,
    "add.s64": lambda a, b: a + b,
    "add.u32": lambda a, b: (a + b) & LOW,
    "and.b32": lambda a, b: a & b,
    "mul.lo.u32": lambda a, b: (a * b) & LOW,
    "mad.lo.u32": lambda a, b, c: (a * b + c) & LOW,
    "setp.ne.u32": lambda a, b: a != b,
    "setp.ne.or.u32": lambda a, b, or_: a != b or or_,
    "setp.gt.and.u32": lambda a, b, and_: a > b and and_,
    "fma.rn.bf16x2": bf16_pairs_sum,
}


class TrapError(Exception):
    """The thread stopped its GPU."""


class Thread:
    """A thread that runs `text`, from what its registers hold; memory is 32-bit words by address."""

    def __init__(self, text: str, registers: dict[str, int], memory: dict[int, int]) -> None:
        lines = [line.strip().rstrip(";") for line in text.splitlines()]
        self.lines = [line for line in lines if line[:1] not in ("{", "}", ".", "")]
        self.labels = {line[:-1]: at for at, line in enumerate(self.lines) if line.endswith(":")}
        self.registers: dict[str, Any] = dict(registers)
        self.memory = memory

    def run(self) -> Iterator[None]:
        """Yields before and after it touches memory: another thread may run meanwhile."""
        at = 0
        while at < len(self.lines):
            line, at = self.lines[at], at + 1
            predicate, _, rest = line.partition(" ")
            if line.startswith("@"):
                if not self.registers[predicate[1:]]:
                    continue
                line = rest
            if line.endswith(":"):
                continue
            operation, _, operands = line.partition(" ")
            if operation == "bra":
                at = self.labels[operands]
            elif operation == "trap":
                raise TrapError
            elif operation.startswith(("ld.", "st.")):
                yield from self.touch(operation, split(operands))
            else:
                into, *of = split(operands)
                self.put(into, OPERATIONS[operation](*map(self.get, of)))

    def touch(self, operation: str, operands: list[str]) -> Iterator[None]:
        """A vector is stored and loaded in 64-bit parts, between which others may run."""
        load = operation.startswith("ld.")
        registers, place = operands if load else reversed(operands)
        name, _, shift = place.strip("[]").partition("+")
        address = self.registers[name] + int(shift or 0)
        size = 8 if operation.endswith("b64") else 4
        for i, register in enumerate(registers.strip("{}").split(",")):
            yield
            at = address + i * size
            words = range(at, at + size, 4)
            if load:
                self.registers[register.strip()] = sum(self.memory[w] << 8 * (w - at) for w in words)
            else:
                self.memory |= {w: self.registers[register.strip()] >> 8 * (w - at) & LOW for w in words}

    def get(self, operand: str) -> int:
        if operand.startswith("{"):
            low, high = (self.get(part.strip()) for part in operand.strip("{}").split(","))
            return low | high << 32
        return self.registers[operand] if operand in self.registers else int(operand, 0)

    def put(self, operand: str, value: int) -> None:
        if operand.startswith("{"):
            low, high = (part.strip() for part in operand.strip("{}").split(","))
            self.registers |= {low: value & LOW, high: value >> 32}
        else:
            self.registers[operand] = value


def split(operands: str) -> list[str]:
    return [found.strip() for found in re.findall(r"\{[^}]*\}|[^,{}]+", operands) if found.strip()]
