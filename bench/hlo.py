"""What the HLO of a compiled program says of it: its text, as `jax.stages.Compiled.as_text` gives it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_COLLECTIVE = re.compile(
    r" = ([^=\n]*?) "
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast)"
    r"(-start)?\("
)
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Collective:
    """What devices tell each other at one place of a program: the kind, and the arrays that each has then.

    shapes  (dtype, sizes) of each array
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    def __str__(self) -> str:
        """Such as `all-reduce bf16[64,5120]`."""
        return " ".join(
            [self.kind, *(f"{dtype}[{','.join(map(str, sizes))}]" for dtype, sizes in self.shapes)]
        )

    @property
    def numbers(self) -> int:
        """How many the largest of its arrays has."""
        return max(math.prod(sizes) for _, sizes in self.shapes)

    @property
    def nbytes(self) -> int:
        return sum(_bytes_of(dtype) * math.prod(sizes) for dtype, sizes in self.shapes)


def collectives(text: str) -> list[Collective]:
    """Every collective of a program, in the order of its text; one in a loop is one."""
    found: list[Collective] = []
    for result, kind, started in _COLLECTIVE.findall(text):
        shapes = [
            (dtype, tuple(map(int, filter(None, sizes.split(",")))))
            for dtype, sizes in _SHAPE.findall(result)
        ]
        # What is started has its operands first, except for a sum, which takes their place.
        both = started and kind != "all-reduce"
        found.append(Collective(kind, tuple(shapes[len(shapes) // 2 :] if both else shapes)))
    return found


def _bytes_of(dtype: str) -> int:
    """Of one number: `bf16`, `f32`, `s32`; a `pred` is a byte."""
    bits = _BITS.search(dtype)
    return max(8, int(bits.group())) // 8 if bits else 1
