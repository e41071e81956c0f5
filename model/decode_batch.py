"""What a generation of model.decode is told: its prompts and branches, laid out on pages, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from attention import Backend, PageRun, Read, Reads, Work
from model.config import ModelConfig
from model.kv_cache import page_sizes
from model.sampling import branch_key
from model.sharding import Placement

if TYPE_CHECKING:
    from jaxtyping import Int32

# Tokens between two looks at whether all branches have ended: at each, a GPU waits for its host.
STRIDE = 16


class PromptRows(NamedTuple):
    """Rows of the pass that reads the prompts: where their KV goes, and what they read."""

    tokens: Int32[Any, " rows"]
    positions: Int32[Any, " rows"]
    write_page: Int32[Any, " rows"]
    write_offset: Int32[Any, " rows"]
    work: Work


class Arrays(NamedTuple):
    """What the device is told.

    prompts     all prompt tokens but each prompt's last
    start       rotary position of each branch's first row
    tail_pages  the branches' own pages
    work        what the branches' rows read at the end
    tail_begin  of each page: the first position of its branch that is on it, or -1 if it is a prompt's
    branch_key  model.sampling.branch_key of each branch
    eos_ids     tokens that end a branch, padded with -1
    tokens      all -1: where the tokens go; their number is rounded up to a multiple of STRIDE
    """

    prompts: PromptRows
    start: Int32[Any, " branches"]
    tail_pages: Int32[Any, "branches tail_pages"]
    work: Work
    tail_begin: Int32[Any, " pages"]
    branch_key: Int32[Any, " branches"]
    eos_ids: Int32[Any, " eos"]
    tokens: Int32[Any, "max_tokens branches"]


@dataclass(frozen=True, slots=True)
class Batch:
    """All prompts and branches of a generation: what the device is told, and the pages that they need."""

    arrays: Arrays
    num_pages: int


def lay_out_batch(
    prompts: Sequence[Sequence[int]],
    branches: int,
    max_tokens: int,
    page_size: int,
    eos_ids: Sequence[int],
    config: ModelConfig,
    backend: Backend,
    placement: Placement,
) -> Batch:
    """Lays out the pages of a generation, once, for its final lengths."""
    shared = [len(prompt) - 1 for prompt in prompts]
    # Padded to a power of two, so that prompts of other lengths can use the same program.
    rows = 1 << (max(sum(shared), 32) - 1).bit_length()
    max_tokens += -max_tokens % STRIDE
    count, tail = len(prompts) * branches, -(-max_tokens // page_size)
    num_pages = rows // page_size + len(prompts) + count * tail
    sizes = page_sizes(config, num_pages, page_size, placement)
    prompt_reads, branch_reads, tail_pages = _reads(shared, branches, tail, page_size)

    def laid_out(reads: list[Read], rows: int) -> tuple[np.ndarray, Work]:
        return backend.lay_out(Reads.of(reads), backend.capacity(rows, sizes))

    order, branch_work = laid_out(branch_reads, count)
    assert (order == np.arange(count)).all(), "page ids ascend, so single rows keep their order"
    begin = np.full(num_pages, -1, np.int32)
    begin[tail_pages] = page_size * np.arange(tail)
    keys = [branch_key(((0, branch),) if branches > 1 else ()) for branch in range(branches)]
    arrays = Arrays(
        prompts=_prompt_rows(
            prompts, rows, prompt_reads, *laid_out(prompt_reads, rows), num_pages, page_size
        ),
        start=np.repeat(np.array(shared, np.int32), branches),
        tail_pages=tail_pages,
        work=branch_work,
        tail_begin=begin,
        branch_key=np.array(keys * len(prompts), np.int32),
        eos_ids=np.pad(np.array(eos_ids, np.int32), (0, 8 - len(eos_ids) % 8), constant_values=-1),
        tokens=np.full((max_tokens, count), -1, np.int32),
    )
    return Batch(arrays, num_pages)


def _reads(
    shared: Sequence[int], branches: int, tail: int, page_size: int
) -> tuple[list[Read], list[Read], Int32[np.ndarray, "branches tail_pages"]]:
    """What prompts of `shared` tokens read, what their branches read at the end, and the branches' own pages.

    Pages 0, 1, … go to a prompt and then to its branches, `tail` to each, one prompt after the other. Each
    page of a branch is a segment of its own that counts as almost full, which keeps its references apart
    from those that all rows of a tile see whole.
    """
    prompt_reads: list[Read] = []
    branch_reads: list[Read] = []
    tail_pages = np.zeros((len(shared) * branches, tail), np.int32)
    almost_full = max(1, page_size - 1)
    page = 0
    for number, length in enumerate(shared):
        end = page - (-length // page_size)
        prompt, page = PageRun(range(page, end), length), end
        if length:
            prompt_reads.append(Read((), prompt, rows=length, ordinal=0))
        for branch in range(number * branches, (number + 1) * branches):
            tail_pages[branch] = np.arange(page, page + tail)
            page += tail
            *before, own = (PageRun((own,), almost_full) for own in tail_pages[branch].tolist())
            context = (prompt, *before) if length else tuple(before)
            branch_reads.append(Read(context, own, rows=1, ordinal=almost_full - 1))
    return prompt_reads, branch_reads, tail_pages


def _prompt_rows(
    prompts: Sequence[Sequence[int]],
    size: int,
    reads: Sequence[Read],
    order: np.ndarray,
    work: Work,
    nowhere: int,
    page_size: int,
) -> PromptRows:
    """The rows past the prompts', of `size`, write to `nowhere`."""
    tokens, positions, page, offset = (np.zeros(size, np.int32) for _ in range(4))
    page[:] = nowhere
    row = 0
    read_prompts = [prompt for prompt in prompts if len(prompt) > 1]
    for index in order.tolist():
        prompt, read = read_prompts[index], reads[index]
        ordinal, rows = np.arange(read.rows), slice(row, row + read.rows)
        tokens[rows], positions[rows] = prompt[:-1], ordinal
        page[rows], offset[rows] = np.array(read.own.pages)[ordinal // page_size], ordinal % page_size
        row += read.rows
    return PromptRows(tokens, positions, page, offset, work)
