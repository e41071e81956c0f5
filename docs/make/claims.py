"""Which file holds which figure of a page: what `docs/claims/` says. Its README.md has the notation."""

from __future__ import annotations

import ast
import json
import re
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docs.make.figures import SIGNED

_HEADING = re.compile(r"(?P<why>(?:none|not measured): .+)|(?P<files>\S+ as \w+(?:, \S+ as \w+)*)")
_LET = re.compile(r"\w+(?:, \w+)* = .+")
_FOR = re.compile(r"for (?P<names>\w+(?:, \w+)*) in .+:")


class Record(dict[str, Any]):
    """An object of a JSON file; its members can be read as attributes."""

    def __getattribute__(self, name: str) -> Any:
        return self[name] if name in self else super().__getattribute__(name)


def only(records: Iterable[Record], **members: Any) -> Record:
    """The one with these members. Raises ValueError if there are none or several."""
    found = [each for each in records if all(each.get(name) == value for name, value in members.items())]
    if len(found) != 1:
        raise ValueError(f"{len(found)} records with {members}")
    return found[0]


def runs(files: Iterable[Record], **members: Any) -> list[Record]:
    """Rows of several files that have these members, by seed."""
    rows = (row for file in files for row in file.rows)
    found = [row for row in rows if all(row.get(name) == value for name, value in members.items())]
    if not found:
        raise ValueError(f"no row with {members}")
    return sorted(found, key=lambda row: row.seed)


def over(files: Iterable[Record], policy: str, name: str = "goodput_stage") -> float:
    """What taper has of a figure, over what another policy has of it, with the seeds that both have."""
    own, others = runs(files, policy="taper"), {row.seed: row for row in runs(files, policy=policy)}
    both = [(row[name], others[row.seed][name]) for row in own if row.seed in others]
    return sum(above for above, _ in both) / sum(below for _, below in both)


def each(values: Iterable[float], form: str, between: str = " / ") -> str:
    """Several figures in one place of a page."""
    return between.join(format(value, form) for value in values)


# What the expressions of docs/claims/ may call, beside what Python has built in.
NAMES: dict[str, Any] = {
    "only": only,
    "runs": runs,
    "over": over,
    "each": each,
    "mean": statistics.fmean,
    "median": statistics.median,
    "geometric_mean": statistics.geometric_mean,
}


@dataclass(frozen=True, slots=True)
class Claim:
    """A passage that a page has, with what its files say put in.

    origin   the files, or why no file holds it
    source   the file of `docs/claims/` and the line that say so
    text     the passage
    holes    where in the text figures were put in: what lies between them is claimed by somebody else. All of
             the text where no file holds it
    stale    matches the passage with other figures
    """

    page: str
    origin: str
    source: str
    text: str
    holes: tuple[tuple[int, int], ...]
    stale: re.Pattern[str]

    @property
    def held(self) -> bool:
        """Whether a file holds it."""
        return not self.origin.startswith(("none: ", "not measured: "))

    def places(self, page: str) -> list[int]:
        """Where a page has the passage, not as a part of longer numbers."""
        before = r"(?<![\d.,])" if self.text[0].isdigit() else ""
        after = r"(?!\d|[.,]\d)" if self.text[-1].isdigit() else ""
        return [found.start() for found in re.finditer(before + re.escape(self.text) + after, page)]

    def spans(self, page: str) -> list[tuple[int, int]]:
        """What of a page it covers."""
        return [(place + begin, place + end) for place in self.places(page) for begin, end in self.holes]


def claims(folder: Path, results: Path) -> list[Claim]:
    """All that a folder says of the files of another. Raises ValueError with the line that cannot be read."""
    return [claim for path in sorted(folder.glob("*.txt")) for claim in _of_file(path, results)]


def _of_file(path: Path, results: Path) -> Iterator[Claim]:
    page, section, shared = "", None, NAMES
    for number, line in enumerate(path.read_text().splitlines(), 1):
        source = f"docs/claims/{path.name}:{number}"
        try:
            if line.startswith("# "):
                page, section, shared = line[2:], None, {**NAMES}
            elif line.startswith("## "):
                section = _Section.of(page, line[3:], shared, results)
            elif line and section:
                yield from section.claims(line, source)
            elif page and _LET.fullmatch(line):
                exec(line, shared)
            elif line:
                raise ValueError("no heading above it says which page and which file")
        except Exception as error:  # of any expression
            raise ValueError(f"{source}: {error!r} in {line!r}") from error


@dataclass(slots=True)
class _Section:
    """What stands under a heading: definitions and passages.

    names    what expressions may use; None where no file holds the figures
    loop     what the indented lines below it are repeated for
    """

    page: str
    origin: str
    names: dict[str, Any] | None
    loop: str = ""

    @classmethod
    def of(cls, page: str, heading: str, shared: dict[str, Any], results: Path) -> _Section:
        """`shared`: names of all sections. Raises ValueError for a heading without files or reason."""
        found = _HEADING.fullmatch(heading)
        if not found:
            raise ValueError("a heading says `FILE as NAME`, `none: WHY` or `not measured: WHY`")
        if found["why"]:
            return cls(page, found["why"], None)
        files = re.findall(r"(\S+) as (\w+)", found["files"])
        names = shared | {name: _loaded(file, results) for file, name in files}
        return cls(page, ", ".join(f"`{file}`" for file, _ in files), names)

    def claims(self, line: str, source: str) -> Iterator[Claim]:
        """Of a line: of a loop one for each turn, of a definition none."""
        text = line.strip()
        if self.names is None:
            yield Claim(self.page, self.origin, source, text, ((0, len(text)),), _opened(text))
        elif _FOR.fullmatch(line):
            self.loop = line
        elif _LET.fullmatch(line):
            exec(line, self.names)
        elif line.startswith("    "):
            for own in self._turns():
                yield self._filled(text, source, self.names | own)
        else:
            yield self._filled(text, source, self.names)

    def _turns(self) -> list[dict[str, Any]]:
        found = _FOR.fullmatch(self.loop)
        if not found:
            raise ValueError("no loop above an indented line")
        own = ", ".join(f"{name}={name}" for name in found["names"].split(", "))
        return eval(f"[dict({own}) {self.loop[:-1]}]", self.names)

    def _filled(self, text: str, source: str, names: dict[str, Any]) -> Claim:
        """A passage is the inside of an f-string; `!s` marks a label, which no file makes stale."""
        parsed = ast.parse(f"f'''{text}'''", mode="eval").body
        parts = parsed.values if isinstance(parsed, ast.JoinedStr) else []
        filled, stale, holes = "", "", list[tuple[int, int]]()
        for part in parts:
            if isinstance(part, ast.Constant):
                shown = str(part.value)
                stale += re.escape(shown)
            else:
                assert isinstance(part, ast.FormattedValue)
                is_label = part.conversion == ord("s")
                shown = _shown(part, names)
                holes.append((len(filled), len(filled) + len(shown)))
                stale += re.escape(shown) if is_label else _opened(shown).pattern
            filled += shown
        if not holes:
            raise ValueError("nothing is put in: what no file holds stands under `none` or `not measured`")
        return Claim(self.page, self.origin, source, filled, tuple(holes), re.compile(stale))


def _loaded(file: str, results: Path) -> Record | list[Record]:
    """A list where a pattern may match several."""
    paths = sorted(results.glob(file))
    if not paths:
        raise ValueError(f"there is no file {file} in {results}")
    read = [json.loads(path.read_text(), object_hook=Record) for path in paths]
    return read if "*" in file else read[0]


def _shown(part: ast.FormattedValue, names: dict[str, Any]) -> str:
    """What an f-string shows there, with the minus of the pages."""
    passage = ast.fix_missing_locations(ast.Expression(ast.JoinedStr([part])))
    shown = eval(compile(passage, "a passage", "eval"), names)
    return shown if part.conversion == ord("s") else re.sub(r"-(?=\d)", "\N{MINUS SIGN}", shown)


def _opened(text: str) -> re.Pattern[str]:
    """Matches the text with any numbers in it."""
    return re.compile(SIGNED.join(map(re.escape, re.split(SIGNED, text))))
