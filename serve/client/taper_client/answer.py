"""The answer that events build: its branches, its text in reading order, and its figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from .events import (
    BranchFinished,
    Delta,
    Event,
    Finished,
    Joined,
    Logprob,
    StageStarted,
    Started,
    Timing,
    Usage,
    WidthChanged,
)


@dataclass(slots=True, kw_only=True)
class Branch:
    """One sequence of an answer: what it was given to go on from, and what it went on with.

    id                 0 is the trunk
    parent             the id of the branch that it forked from
    label              its name, from the client or from the model
    prefix             the text that its first stage forced into its context
    text               what was sampled
    token_ids          if they were asked for
    logprobs           if they were asked for
    completion_tokens  how many were sampled
    finish_reason      eos, stop, max_tokens, context, branch_closed, forked or outrun; empty until it ends
    stop               the stop string, or the id, that ended it
    """

    id: int
    parent: int
    label: str = ""
    prefix: str = ""
    text: str = ""
    token_ids: list[int] = field(default_factory=list, repr=False)
    logprobs: list[Logprob] = field(default_factory=list, repr=False)
    completion_tokens: int = 0
    finish_reason: str = ""
    stop: str | int | None = None
    parts: list[str | tuple[int, ...]] = field(default_factory=list, repr=False)
    """In reading order: texts, forced ones included, and the ids of branches that it forked."""

    @property
    def outrun(self) -> bool:
        """Its stage joins the first k branches, and it is not one of them: nothing goes on from its text."""
        return self.finish_reason == "outrun"


_REPR_TEXT = 60
_TOLD = ("id", "parent", "label", "prefix", "text", "finish_reason", "stop", "completion_tokens")


def _told(branch: Branch) -> dict[str, Any]:
    """A branch as JSON has it; ids and log-probabilities only if they were asked for."""
    told = {name: getattr(branch, name) for name in _TOLD}
    if branch.token_ids:
        told["token_ids"] = [*branch.token_ids]
    if branch.logprobs:
        told["logprobs"] = [asdict(logprob) for logprob in branch.logprobs]
    return told


class Completion:
    """An answer that is built from its events; complete when `finished`. It prints as its text.

    request_id        the request's id
    server            which server answered, by the name that it has for itself
    prompt_token_ids  if they were asked for
    trunk             branch 0
    branches          all other branches, by id; those that were outrun, too
    text              everything in reading order: forced text included, branches where they forked, but for
                      those that were outrun
    choices           each of the answers of a request that asked for `n`; else the text alone
    widths            (width, wanted) of every WidthChanged
    finish_reason     why the trunk ended; empty until it has
    usage             how many tokens there were. Raises ValueError before the end
    timing            how long it took. Raises ValueError before the end
    finished          the last event; None before the end
    """

    def __init__(self) -> None:
        self.request_id = ""
        self.server = ""
        self.prompt_token_ids: tuple[int, ...] = ()
        self.trunk = Branch(id=0, parent=0)
        self.widths: list[tuple[int, int]] = []
        self.finished: Finished | None = None
        self._branches = {0: self.trunk}
        self._joined_ids: set[int] = set()

    def __str__(self) -> str:
        return "\n\n".join(self.choices)

    def __repr__(self) -> str:
        text = self.text
        if len(text) > _REPR_TEXT:
            text = text[: _REPR_TEXT - 1] + "…"
        tokens = sum(branch.completion_tokens for branch in self._branches.values())
        return (
            f"<Completion {text!r}: {self.finish_reason or 'not finished'}, {tokens} tokens,"
            f" {len(self.branches)} branches>"
        )

    @property
    def branches(self) -> tuple[Branch, ...]:
        return tuple(branch for branch in self._branches.values() if branch is not self.trunk)

    @property
    def text(self) -> str:
        return self._read(self.trunk)

    @property
    def choices(self) -> tuple[str, ...]:
        """The texts of branches that the prompt itself forked into, if nothing joined them; else the text."""
        parts = self.trunk.parts
        if len(parts) == 1 and isinstance(parts[0], tuple) and self._joined_ids.isdisjoint(parts[0]):
            return tuple(map(self._read, self._joined(parts[0])))
        return (self.text,)

    @property
    def finish_reason(self) -> str:
        return self.trunk.finish_reason

    @property
    def usage(self) -> Usage:
        return self._end().usage

    @property
    def timing(self) -> Timing:
        return self._end().timing

    def add(self, event: Event) -> None:
        """Take the event that comes next: they come in the order in which the server sends them."""
        match event:
            case Started():
                self.request_id, self.server = event.request_id, event.server
                self.prompt_token_ids = event.prompt_token_ids
            case StageStarted():
                self._stage(event)
            case Delta():
                branch = self._branches[event.branch]
                branch.text += event.text
                branch.parts.append(event.text)
                branch.token_ids += event.token_ids
                branch.logprobs += event.logprobs
                branch.completion_tokens = event.completion_tokens
            case BranchFinished():
                branch = self._branches[event.branch]
                branch.finish_reason, branch.stop = event.reason, event.stop
            case WidthChanged():
                self.widths.append((event.width, event.wanted))
            case Finished():
                self.finished = event
            case Joined():
                self._joined_ids.update(event.branches)

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON has it, under the names that it has here. Raises ValueError before the end."""
        return {
            "request_id": self.request_id,
            "server": self.server,
            "text": self.text,
            "choices": [*self.choices],
            "finish_reason": self.finish_reason,
            "trunk": _told(self.trunk),
            "branches": [_told(branch) for branch in self.branches],
            "usage": asdict(self.usage),
            "timing": asdict(self.timing),
        }

    def _stage(self, stage: StageStarted) -> None:
        new = [begun for begun in stage.branches if begun.branch not in self._branches]
        for begun in new:
            self._branches[begun.branch] = Branch(
                id=begun.branch, parent=begun.parent, label=begun.label, prefix=begun.prefix
            )
        if new:
            self._branches[new[0].parent].parts.append(tuple(begun.branch for begun in new))
        for begun in stage.branches:
            self._branches[begun.branch].parts.append(begun.prefix)

    def _read(self, branch: Branch) -> str:
        return "".join(
            part if isinstance(part, str) else "".join(map(self._read, self._joined(part)))
            for part in branch.parts
        )

    def _joined(self, ids: tuple[int, ...]) -> Iterator[Branch]:
        return (branch for branch in map(self._branches.__getitem__, ids) if not branch.outrun)

    def _end(self) -> Finished:
        if self.finished is None:
            raise ValueError("the answer is not complete")
        return self.finished
