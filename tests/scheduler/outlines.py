"""Outlines as regular expressions, whose first group is the label: what they mean, however long it takes."""

from __future__ import annotations

import re

from scheduler.outline import Line, Numbered, Outline


def pattern(outline: Outline) -> re.Pattern[str]:
    match outline:
        case Numbered(opens=opens, closes=closes, number=number):
            label = rf"\s*({number})\s*"
        case Line(opens=opens, closes=closes):
            label = r"[ \t]{0,8}([^\n]{1,128}?)[ \t]{0,8}"
        case _:
            raise TypeError(outline)
    return re.compile(re.escape(opens) + label + re.escape(closes))
