"""What ends a sequence of tokens, and how that is told."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class FinishReason(enum.Enum):
    """Why a branch ended. Failures of a whole request are errors, not finish reasons."""

    EOS = "eos"
    STOP = "stop"
    MAX_TOKENS = "max_tokens"
    CONTEXT = "context"
    BRANCH_CLOSED = "branch_closed"  # the model closed it with its tag
    OUTRUN = "outrun"  # it cannot be among the first k branches that its stage joins
    FORKED = "forked"  # it ended in its branches: nothing follows their stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """What ends one stage of one branch.

    `stop_ids` are dropped from the output and from the context; text that matched one of `stop_strings`
    stays in the context (a token cannot be cut), and the server cuts it from the text that it shows. The
    strings are looked for in the text with special tokens spelled out, if `special_tokens`.
    """

    max_tokens: int
    eos_ids: frozenset[int] = frozenset()
    stop_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    special_tokens: bool = False
