"""What is published of each kind of TPU, with its source. What the kernels' planner needs is in
`attention.tpu_chips`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from attention.tpu_chips import Chip

GIB = 2**30
GBIT = 1e9 / 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of one chip.

    hbm     bytes of its memory
    usable  bytes of it that one program may take; not published: what libtpu says when it refuses one
    flops   bfloat16 operations a second
    ici     bytes a second that it can send to its neighbours, by all of its links together
    links   how many neighbours that is
    source  where hbm, flops, ici and links are from
    """

    hbm: int
    usable: int
    flops: float
    ici: float
    links: int
    source: str

    @property
    def link(self) -> float:
        """Bytes a second that it can send to one neighbour."""
        return self.ici / self.links


_DOCS = "https://cloud.google.com/tpu/docs/"

FIGURES: Mapping[str, Figures] = MappingProxyType(
    {
        "v5e": Figures(
            hbm=16 * GIB,
            usable=int(15.75 * GIB),
            flops=197e12,
            ici=1600 * GBIT,
            links=4,
            source=f"{_DOCS}v5e",
        ),
        "v5p": Figures(
            hbm=95 * GIB,
            usable=int(95.74 * GIB),
            flops=459e12,
            ici=4800 * GBIT,
            links=6,  # of a three-dimensional torus
            source=f"{_DOCS}v5p",
        ),
        "v6e": Figures(
            hbm=32 * GIB,
            usable=int(31.25 * GIB),
            flops=918e12,
            ici=3584 * GBIT,
            links=4,
            source=f"{_DOCS}v6e",
        ),
    }
)


def figures_of(chip: Chip) -> Figures:
    """Raises ValueError for a chip without them: what a step takes there cannot be estimated."""
    if chip.name not in FIGURES:
        raise ValueError(f"no published figures of {chip.name} are known here, but of {', '.join(FIGURES)}")
    return FIGURES[chip.name]
