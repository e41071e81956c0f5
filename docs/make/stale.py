"""Figures of the pages that are not those of their files.

`python -m docs.make.stale` prints what is wrong, and `--write` mends it where a file says what is right.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from docs.make.claims import Claim, claims
from docs.make.figures import NUMBER, figures

ROOT = Path(__file__).parents[2]
MADE = ("docs/reference/", "docs/files.md", "docs/claims/")  # of the code, and of the claims themselves


@dataclass(frozen=True, slots=True)
class Wrong:
    """What is wrong with a page; `span` of it is to become `new` where a file says what is right."""

    page: str
    what: str
    span: tuple[int, int] = (0, 0)
    new: str = ""

    def __str__(self) -> str:
        return f"{self.page}: {self.what}"


def pages(root: Path = ROOT) -> dict[str, str]:
    """The text of each page whose figures are claimed, by its path."""
    found = [*root.glob("*.md"), *root.glob("docs/**/*.md")]
    names = sorted(path.relative_to(root).as_posix() for path in found)
    return {name: (root / name).read_text() for name in names if not name.startswith(MADE)}


def claimed(root: Path = ROOT) -> list[Claim]:
    """What `docs/claims/` says. Raises ValueError with the line that cannot be read."""
    return claims(root / "docs/claims", root / "bench/results")


def compared(pages: dict[str, str], claims: Iterable[Claim]) -> Iterator[Wrong]:
    """What is wrong: figures that are not those of their files, and figures that nobody claims."""
    by_page: dict[str, list[Claim]] = defaultdict(list)
    for claim in claims:
        by_page[claim.page].append(claim)
    for name in by_page.keys() - pages.keys():
        yield Wrong(name, f"there is no such page ({by_page[name][0].source})")
    for name, text in pages.items():
        yield from _of_page(name, text, by_page[name])


def _of_page(name: str, text: str, claims: list[Claim]) -> Iterator[Wrong]:
    right: list[tuple[int, int]] = []
    missing: dict[str, list[Claim]] = defaultdict(list)
    for claim in claims:
        spans = claim.spans(text)
        right += spans
        if not spans:
            missing[claim.stale.pattern].append(claim)
    stale: list[tuple[int, int]] = []
    for alike in missing.values():
        # Passages like these with a number that nobody claims, in their order if they are as many.
        found = [other for other in alike[0].stale.finditer(text) if not _explained(other, right)]
        stale += [other.span() for other in found]
        others = found if len(found) == len(alike) else [None] * len(alike)
        yield from (_missing(name, claim, other) for claim, other in zip(alike, others, strict=True))
    for begin, end in figures(text):
        if not _in([*right, *stale], (begin, end)):
            line = text.count("\n", 0, begin) + 1
            around = text[max(begin - 40, 0) : end + 20].replace("\n", " ")
            what = f"docs/claims/ does not say where {text[begin:end]!r} is from, in …{around}…"
            yield Wrong(f"{name}:{line}", what)


def _missing(name: str, claim: Claim, other: re.Match[str] | None) -> Wrong:
    if other is None:
        return Wrong(name, f"does not have what {claim.source} says: {claim.text}")
    if not claim.held:
        what = f"{claim.source} has another figure, and no file holds it:"
        return Wrong(name, f"{what}\n  {other[0]} (the page)\n  {claim.text} (the claim)")
    what = f"{claim.origin} says something else ({claim.source}):\n  - {other[0]}\n  + {claim.text}"
    return Wrong(name, what, other.span(), claim.text)


def _explained(passage: re.Match[str], spans: Iterable[tuple[int, int]]) -> bool:
    """Whether all numbers of a passage lie in these."""
    begin = passage.start()
    numbers = re.finditer(NUMBER, passage[0])
    return all(_in(spans, (begin + number.start(), begin + number.end())) for number in numbers)


def _in(spans: Iterable[tuple[int, int]], inner: tuple[int, int]) -> bool:
    """Whether one of them overlaps it."""
    return any(begin < inner[1] and inner[0] < end for begin, end in spans)


def table(pages: dict[str, str], claims: Iterable[Claim]) -> str:
    """How many figures of each page are from which files, and how many from none."""
    covered: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for claim in claims:
        covered[claim.page, claim.origin] += claim.spans(pages[claim.page])
    rows = ["| page | where its figures are from | figures |", "|---|---|---|"]
    for (page, origin), spans in sorted(covered.items(), key=lambda item: item[0][0]):
        count = sum(_in(spans, figure) for figure in figures(pages[page]))
        rows.append(f"| [{page}](../../{page}) | {origin} | {count} |")
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> bool:
    """The command. Whether something is wrong, and was not mended."""
    parser = argparse.ArgumentParser(description="Compares the figures of the pages with their files.")
    parser.add_argument("--write", action="store_true", help="mends the lines whose files say something else")
    write = parser.parse_args(arguments).write
    texts = pages(root)
    found = sorted(compared(texts, claimed(root)), key=lambda wrong: wrong.span, reverse=True)
    written: dict[str, int] = {}  # from where on a page is already another
    mended = 0
    for wrong in found:
        print(wrong)
        begin, end = wrong.span
        if write and wrong.new and end <= written.get(wrong.page, end):
            texts[wrong.page] = texts[wrong.page][:begin] + wrong.new + texts[wrong.page][end:]
            (root / wrong.page).write_text(texts[wrong.page])
            written[wrong.page] = begin
            mended += 1
    return mended < len(found)


if __name__ == "__main__":
    sys.exit(main())
