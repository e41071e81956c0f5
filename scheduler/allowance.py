"""Which forks of a model have room: every branch has an allowance of pages, which its forks divide evenly.

So the answer depends on the branch's own tokens, and never on how far its siblings happen to be.
"""

from __future__ import annotations

from collections.abc import Callable

from scheduler.branch import Branch
from scheduler.cursor import Fork

PagesFor = Callable[[int], int]
"""The pages that so many positions of one segment take."""


def fits(branch: Branch, fork: Fork, pages_for: PagesFor) -> bool:
    """Whether the worst case of a model-driven fork fits what the branch may hold."""
    firsts = [child.first for child in fork.children]
    lead = int(not all(first.prefix for first in firsts))
    wanted = max(lead + len(first.prefix) + first.stopping.max_tokens for first in firsts)
    return share(branch, len(firsts), pages_for) >= pages_for(wanted)


def share(branch: Branch, children: int, pages_for: PagesFor) -> int:
    """Pages for each branch of a fork, after what its parent holds and may need when they have joined."""
    held = sum(pages_for(len(segment.tokens)) for segment in branch.trail)
    after = pages_for(max(0, branch.limit - branch.segment.end)) + 1
    return (branch.allowance - held - after) // children
