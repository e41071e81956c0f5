"""Static cycles of a kernel: the schedule that libtpu's compiler makes for it, bundle by bundle.

A TPU core issues one bundle of instructions a cycle, in the order of the program, and the schedule has the
bundles that only wait, too: a region without loops takes as many cycles as it has bundles, if nothing that it
waits for comes late. libtpu writes its schedules to a folder (`dumped_to`); `Schedule.of_kernel` finds one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

_BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) ")
_STARTS, _ENDS = re.compile(r"Start region (\d+)"), re.compile(r"End region (\d+)")
_LOOP = re.compile(r"^ *(0x[0-9a-f]+) LB")
_EXIT = re.compile(r"scmp\.ge\.s32\.totalorder %(\w+), (\d+) /\* loop exit test \*/")


class ScheduleError(ValueError):
    """A schedule is not there, or not of the kernel that it should be of."""


def dumped_to(folder: str | Path) -> dict[str, str]:
    """What to put into the environment, before libtpu is first asked for, so that it writes its schedules."""
    return {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"}


@dataclass(frozen=True, slots=True, order=True)
class Region:
    """Bundles of a schedule, from `first` to before `end`."""

    first: int
    end: int

    @property
    def cycles(self) -> int:
        return self.end - self.first

    def holds(self, other: Region) -> bool:
        return self.first <= other.first and other.end <= self.end


@dataclass(frozen=True)
class Schedule:
    """The bundles of a kernel, a line of text each, and the regions of its control flow."""

    bundles: tuple[str, ...]
    regions: tuple[Region, ...]

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Of a file `*-packed-bundles-post-ra.txt`. Raises ScheduleError if there are no bundles."""
        bundles = tuple(line for line in text.splitlines() if _BUNDLE.match(line))
        if not bundles:
            raise ScheduleError("a schedule without bundles")
        starts: dict[str, int] = {}
        regions: set[Region] = set()
        for index, bundle in enumerate(bundles):
            starts |= dict.fromkeys(_STARTS.findall(bundle), index)
            regions |= {Region(starts[name], index + 1) for name in _ENDS.findall(bundle) if name in starts}
        return cls(bundles, tuple(sorted(regions)))

    @classmethod
    def of_kernel(cls, folder: Path, kernel: str) -> Schedule:
        """The one that was last written to a folder for a kernel of that name. Raises ScheduleError."""
        found = sorted(folder.glob(f"*-{kernel}*[0-9]-packed-bundles-post-ra.txt"))
        if not found:
            raise ScheduleError(f"libtpu wrote no schedule of a kernel {kernel}")
        return cls.parse(found[-1].read_text())

    @property
    def whole(self) -> Region:
        return Region(0, len(self.bundles))

    @cached_property
    def loops(self) -> list[Region]:
        """Bodies of loops: from where each begins to the end of the region that has the branch back."""
        found: list[Region] = []
        for first, bundle in enumerate(self.bundles):
            if match := _LOOP.match(bundle):
                back = [i for i in range(first, len(self.bundles)) if f"({match[1]})" in self.bundles[i]]
                if not back:
                    raise ScheduleError(f"a loop from bundle {match[1]} on that never comes back to it")
                ends = [r.end for r in self.regions if r.first == first and r.end > back[-1]]
                found.append(Region(first, min(ends, default=back[-1] + 1)))
        return found

    def times(self, loop: Region) -> int | None:
        """How often a loop runs that counts from zero to a number that the compiler knows; else None."""
        within = [each for each in self.loops if loop.holds(each) and each != loop]
        for index in range(loop.first, loop.end):
            test = _EXIT.search(self.bundles[index])
            if test and not any(each.first <= index < each.end for each in within):
                step = _step("\n".join(self.bundles[loop.first : loop.end]), test[1])
                return -(-int(test[2]) // step) if step else None
        return None

    def cycles(self, region: Region) -> int:
        """Of a region, with its loops as often as they run; once those of which that is not known."""
        cycles, at = 0, region.first
        for loop in self.loops:
            if loop != region and region.holds(loop) and loop.first >= at:
                cycles += loop.first - at + (self.times(loop) or 1) * self.cycles(loop)
                at = loop.end
        return cycles + region.end - at

    def count(self, instruction: str, region: Region) -> int:
        """How often an instruction is in a region; `instruction` is how its name begins."""
        name = re.compile(rf"(?<![\w.]){re.escape(instruction)}")
        return sum(len(name.findall(bundle)) for bundle in self.bundles[region.first : region.end])

    def innermost(self, instruction: str) -> list[Region]:
        """The regions that have an instruction, and within which no other has it."""
        kept: list[Region] = []
        for region in sorted(self.regions, key=lambda region: (region.cycles, region.first)):
            if self.count(instruction, region) and not any(region.holds(other) for other in kept):
                kept.append(region)
        return sorted(kept)

    def around(self, inner: Iterable[Region]) -> Region:
        """The smallest loop that holds all of these and more. Raises ScheduleError if there is none."""
        inner = [*inner]
        held = [loop for loop in self.loops if all(loop.holds(each) and loop != each for each in inner)]
        if not held:
            raise ScheduleError("a schedule without the loop that it should have")
        return min(held, key=lambda loop: loop.cycles)


def _step(text: str, counter: str) -> int | None:
    """What is added to a loop's counter each time, also where it is kept in memory meanwhile."""
    if added := re.search(rf"%{counter} = sadd\.s32 (\d+),", text):
        return int(added[1])
    if loaded := re.search(rf"%{counter} = sld \[smem:\[(#\w+)\]\]", text):
        stored = re.search(rf"sst \[smem:\[{loaded[1]}\]\] %(\w+)", text)
        return _step(text, stored[1]) if stored else None
    return None
