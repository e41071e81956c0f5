"""What a server says of itself on its Prometheus page, between two times."""

from __future__ import annotations

import math
import re
import urllib.request
from collections.abc import Mapping

from serve.lateness import CAUSES

_MODEL = re.compile(r'\{model_name="[^"]*"\}')  # of which a server has one


def scrape(url: str | None) -> dict[str, float]:
    """The values of a Prometheus page by name and labels, but for the model's name; none without a page."""
    if url is None:
        return {}
    with urllib.request.urlopen(url, timeout=30) as page:
        lines = page.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {_MODEL.sub("", name).removeprefix("taper_"): float(value) for name, value in pairs}


def server_row(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float | None]:
    """Of each histogram the mean, of each counter the increase between two scrapes; gauges as they ended."""
    found: dict[str, float | None] = {}
    for name, value in after.items():
        family, brace, labels = name.partition("{")
        change = value - before.get(name, 0.0)
        if family.endswith("_sum"):
            base = family.removesuffix("_sum")
            count = f"{base}_count{brace}{labels}"
            observed = after[count] - before.get(count, 0.0)
            found[base + brace + labels] = change / observed if observed else None
        elif family.endswith(("_total", "_count")):
            found[name] = change
        elif not family.endswith(("_bucket", "_created")):
            found[name] = value if math.isfinite(value) else None
    return found


def late_shares(row: Mapping[str, float | None]) -> dict[str, float | None]:
    """Of a server's row: which share of its steps was late, by cause; None where it does not say."""
    steps = row.get("step_seconds_count")
    late = {cause: row.get(f'late_steps_total{{cause="{cause}"}}') for cause in CAUSES}
    return {
        f"late_{cause}": count / steps if steps and count is not None else None
        for cause, count in late.items()
    }
