"""Whether a file is what it was when it was read."""

from __future__ import annotations

import os


def look(path: str | os.PathLike[str]) -> tuple[int, ...] | None:
    """What differs once the file has been replaced or written to, also where a link leads elsewhere now; None
    if there is none."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
