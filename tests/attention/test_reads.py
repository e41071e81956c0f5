"""What is known of reads before they are cut."""

from __future__ import annotations

from attention.reads import PageRun, Read, Reads, ReadTree


def test_full_pages_end_at_a_reads_own_partial_page_and_not_at_that_of_the_next_context() -> None:
    contexts: tuple[list[PageRun], list[PageRun]] = ([], [])
    for whole, part in (contexts, contexts[::-1]):  # whichever of the two is laid out first
        whole[:], part[:] = [PageRun([0], 4)], [PageRun([1], 2)]
        reads = [
            Read(whole, PageRun([2, 3], 8), rows=1, ordinal=7),
            Read(part, PageRun([4, 5], 8), rows=1, ordinal=7),
        ]
        order, tree = ReadTree.of(Reads.of(reads), 4)
        assert dict(zip(order.tolist(), tree.leading_full.tolist(), strict=True)) == {0: 3, 1: 0}
