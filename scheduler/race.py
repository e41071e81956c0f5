"""A race: a fork of which only the first k branches are joined. Which of them are out already?

The first are the branches with the fewest tokens, ties by their place in the fork. What counts is the longest
chain of sampled tokens (`critical`), so that a branch which forks again counts as long as its reader waits.
That number only grows, so a branch is out as soon as k others have ended ahead of it. Which branches are left
at the end does not depend on the schedule.
"""

from __future__ import annotations

from scheduler.branch import Branch, Standing


def outrun(branch: Branch) -> Branch | None:
    """Who is out by the newest token of `branch`: the outermost of itself and those that it comes from."""
    found = None
    while branch.parent is not None:
        bar = branch.parent.bar
        if bar is not None and _standing(branch) > bar:
            found = branch
        branch = branch.parent
    return found


def settle(parent: Branch) -> list[Branch]:
    """One of the branches of `parent` has ended: those that are out by now, be they ended or not."""
    fork = parent.fork
    if fork is None or not fork.is_race:
        return []
    ended = sorted(_standing(branch) for branch in parent.forked if branch.ended is not None)
    if len(ended) < fork.first_k:
        return []
    parent.bar = ended[fork.first_k - 1]
    return [branch for branch in parent.forked if _standing(branch) > parent.bar]


def _standing(branch: Branch) -> Standing:
    return _fewest(branch), branch.path[-1][1]


def _fewest(branch: Branch) -> int:
    """The fewest tokens that the longest chain of `branch` can come to.

    While it waits for branches of its own, the longest of those that will be joined is the k-th shortest.
    """
    if branch.fork is None:
        return branch.critical
    return sorted(map(_fewest, branch.forked))[branch.fork.first_k - 1]
