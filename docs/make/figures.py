"""The figures of a page: numbers that somebody may have measured."""

from __future__ import annotations

import re
from collections.abc import Iterator

NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"
SIGNED = rf"[+\u2212]?{NUMBER}"  # the minus of the pages
_UNIT = (
    r"(?:\s?(?:%|/s(?!\w)|[KMGT]i?B/s|[KMG]iB|[kKMGT]B|TFLOP/s|[a-z]+/s|ns|[uµ\u03bcm]?s|W|seconds?|minutes?"
    r"|hours?|percent|times|points|CPU seconds|of a core|(?:\w+ )?a second|per second)(?!\w)"
    r"|-?fold|[xkM](?!\w)|\s?\u00d7(?!\s?[\d(]))"
)
_FIGURE = rf"~?{SIGNED}(?:{_UNIT}|(?=e-\d)|(?!\w|\.\d|:\d))"  # what has an exponent (1.5e-2) has it behind
_CHAIN = re.compile(rf"(?<![\w.:/#-]){_FIGURE}(?:(?:,| /| to| and| or| of|\u2013)\s?{_FIGURE})*")
_EVIDENT = re.compile(rf"\d[.,]\d|\d{_UNIT}|\d of \d")
_VERSION = re.compile(r"\b(?:Python|jax|TLS|FlashInfer|transformers|Ray|Ray Serve|SMG|arXiv) $")
_CELL = re.compile(r"^\|.*\|[ *]*$")
_CODE = (
    re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE),
    re.compile(r"<!-- made: .*?<!-- end -->", re.DOTALL),
    re.compile(r"^#.*$", re.MULTILINE),
    re.compile(r"`[^`\n]+`"),
    re.compile(r"(?<=\])\([^)\n]*\)"),
    re.compile(r"https?://\S+"),
)


def figures(page: str) -> Iterator[tuple[int, int]]:
    """Where its figures begin and end.

    A figure is a number with a unit, a decimal point or a comma of thousands; or the first of a cell of a
    table, but for the first column; or one that is joined with such a number, as in `3 to 5 s` and `7 of 9`.
    Code, headings, the targets of links, what is made from the code, and versions of programs have none.
    """
    for line in re.finditer(r"[^\n]+", _without_code(page)):
        for chain in _CHAIN.finditer(line[0]):
            before = line[0][: chain.start()]
            if _VERSION.search(before) or not (_EVIDENT.search(chain[0]) or _CELL.match(before)):
                continue
            for number in re.finditer(rf"(?<![\d.,]){NUMBER}", chain[0]):
                begin = line.start() + chain.start()
                yield begin + number.start(), begin + number.end()


def _without_code(page: str) -> str:
    """As long as the page, and with its lines."""
    for code in _CODE:
        page = code.sub(lambda found: re.sub(r"[^\n]", "\0", found[0]), page)
    return page
