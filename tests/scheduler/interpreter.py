"""What a request should say, by direct recursion over its program: no pages, no steps, no batch.

An independent oracle for the scheduler. A strand is one sequence as it is decoded: what it sees, its own
tokens since its last fork or join, and its text. Positions follow Multiverse: branches start where they fork,
a `kv` join goes on after the longest branch, any other text has ordinary positions.

In a race (first k), every branch runs to its end here; then the branches are sorted by their tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler.program import BranchSpec, ParallelStage, Plan, SerialStage, Stage, TagProgram
from scheduler.request import Request
from scheduler.sampling import SamplingParams
from scheduler.search import Match
from scheduler.stopping import FinishReason, Stopping
from tests.scheduler.alphabet import Alphabet
from tests.scheduler.outlines import pattern
from tests.scheduler.symbolic import Path, SymbolicModel

Key = tuple[
    tuple[int, int], ...
]  # a branch: (how many forks its parent made before, which child), from the root
Record = tuple[object, ...]
Answer = dict[Key, list[Record]]


@dataclass(frozen=True, slots=True)
class Token:
    """One token in somebody's context; copies of a fork's shared token have the same `origin`."""

    id: int
    position: int
    sampled: bool
    value: int
    origin: object


@dataclass(slots=True, eq=False)
class Strand:
    key: Key
    path: Path
    seen: list[Token]
    position: int
    own: list[Token] = field(default_factory=list)
    text: list[Token] = field(default_factory=list)  # of earlier `own`, with what was joined into it
    forks: int = 0
    completion: int = 0
    critical: int = 0
    races: bool = False
    ended: tuple[FinishReason, object] | None = None


class Interpreter:
    def __init__(self, request: Request, model: SymbolicModel, max_context: int) -> None:
        self.request = request
        self.answer: Answer = {}
        self.losers: set[Key] = set()
        self.tokens = 0
        self.critical = 0
        self.trunk = Strand((), (), [], 0)
        self._model = model
        self._codec = Alphabet()
        self._max_context = max_context

    def run(self) -> Answer:
        trunk = self.trunk
        self._feed(trunk, self.request.prompt)
        self.answer[()] = []
        program = self.request.program
        if isinstance(program, Plan):
            self._stages(trunk, program.stages)
        else:
            self._tags(trunk, program, 0, trunk.position + program.stopping.max_tokens)
        self.critical = trunk.critical
        return self.answer

    # --- tokens ----------------------------------------------------------------------------------------

    def _feed(
        self, strand: Strand, tokens: tuple[int, ...], sampled: bool = False, origin: object = None
    ) -> None:
        for token in tokens:
            attended = sum(t.value for t in strand.seen) + sum(t.value for t in strand.own)
            value = self._model.kv(token, strand.position, attended)
            strand.own.append(Token(token, strand.position, sampled, value, origin or object()))
            strand.position += 1

    def _sample(self, strand: Strand, sampling: SamplingParams | None) -> int:
        last = strand.own[-1]
        once = {token.origin: token for token in (*strand.seen, *strand.own)}.values()
        return self._model.choose(
            last.value,
            last.id,
            strand.path,
            strand.position,
            sampling or self.request.sampling,
            [token.id for token in once if not token.sampled],
            [token.id for token in once if token.sampled],
        )

    def _say(self, strand: Strand, *record: object) -> None:
        self.answer[strand.key].append(record)

    def _end(self, strand: Strand, reason: FinishReason, stop: object = None, *, final: bool) -> None:
        if final:
            strand.ended = reason, stop
        self._say(strand, "end", reason, stop, strand.completion, final and not strand.races)

    def _decode(
        self,
        strand: Strand,
        prefix: tuple[int, ...],
        stopping: Stopping,
        sampling: SamplingParams | None,
        interrupt: _Tags | None = None,
    ) -> tuple[object, int | str | None]:
        """Why the stage ended (a reason, or what `interrupt` says), and at which stop."""
        self._feed(strand, prefix)
        limit = min(strand.position + stopping.max_tokens, self._max_context)
        if strand.position >= self._max_context:
            return "full", None
        generated: list[int] = []
        while strand.position < limit:
            position = strand.position
            token = self._sample(strand, sampling)
            if token in stopping.eos_ids:
                return FinishReason.EOS, token
            if token in stopping.stop_ids:
                return FinishReason.STOP, token
            self._feed(strand, (token,), sampled=True)
            generated.append(token)
            strand.completion += 1
            strand.critical += 1
            self.tokens += 1
            self._say(strand, "token", token, position, strand.path)
            verdict = interrupt.look(generated, strand.position) if interrupt else None
            if verdict is not None:
                return verdict, None
            text = self._codec.decode(generated)
            found = [(text.find(stop), stop) for stop in stopping.stop_strings if stop in text]
            if found:
                at, stop = min(found)
                return FinishReason.STOP, Match(stop, len(text) - at)
        full = strand.position >= self._max_context
        return FinishReason.CONTEXT if full else FinishReason.MAX_TOKENS, None

    # --- plans -----------------------------------------------------------------------------------------

    def _stages(self, strand: Strand, stages: tuple[Stage, ...]) -> None:
        for index, stage in enumerate(stages):
            last = index == len(stages) - 1
            if isinstance(stage, SerialStage):
                if not self._serial(strand, stage, last):
                    return
            elif not self._parallel(strand, stage, index, last):
                return

    def _serial(self, strand: Strand, stage: SerialStage | BranchSpec, last: bool) -> bool:
        """Whether the strand goes on."""
        self._say(strand, "stage", stage.prefix)
        reason, stop = self._decode(strand, stage.prefix, stage.stopping, stage.sampling)
        if reason == "full":
            self._end(strand, FinishReason.CONTEXT, final=True)
            return False
        assert isinstance(reason, FinishReason)
        self._end(strand, reason, stop, final=last)
        return not last

    def _parallel(self, strand: Strand, stage: ParallelStage, index: int, last: bool) -> bool:
        children, lead = self._fork(strand, index, [spec.prefix for spec in stage.branches])
        first_k = stage.first_k or len(children)
        for child, spec in zip(children, stage.branches, strict=True):
            child.races = first_k < len(children)
            if self._serial(child, spec, not spec.stages):
                self._stages(child, spec.stages)
        self._join(strand, self._first(children, first_k), stage.join, lead)
        if stage.join != "none" and not last and strand.position < self._max_context:
            return True
        full = stage.join != "none" and strand.position >= self._max_context
        self._end(strand, FinishReason.CONTEXT if full else FinishReason.FORKED, final=True)
        return False

    def _first(self, children: list[Strand], first_k: int) -> list[Strand]:
        """Those with the fewest tokens, in branch order."""
        ranked = sorted(children, key=lambda child: child.critical)  # stable: ties stay in branch order
        self.losers |= {child.key for child in ranked[first_k:]}
        winners = [child for child in children if child in ranked[:first_k]]
        for child in winners if len(winners) < len(children) else ():
            assert child.ended is not None
            self._say(child, "end", *child.ended, child.completion, True)
        return winners

    # --- forks and joins -------------------------------------------------------------------------------

    def _fork(
        self, strand: Strand, index: int, prefixes: list[tuple[int, ...]]
    ) -> tuple[list[Strand], Token | None]:
        """Children; where one has nothing to begin with, all of them begin with the parent's last token."""
        lead = strand.own.pop() if not all(prefixes) else None
        start = lead.position if lead else strand.position
        children: list[Strand] = []
        for number in range(len(prefixes)):
            child = Strand(
                (*strand.key, (strand.forks, number)),
                (*strand.path, (index, number)),
                [*strand.seen, *strand.own],
                start,
                critical=strand.critical,
            )
            if lead:
                self._feed(child, (lead.id,), lead.sampled, lead.origin)
            self.answer[child.key] = []
            children.append(child)
        strand.forks += 1
        return children, lead

    def _join(self, strand: Strand, children: list[Strand], join: str, lead: Token | None) -> None:
        strand.critical = max(child.critical for child in children)
        texts = [[*child.text, *child.own] for child in children]
        if join == "none":
            if lead:
                strand.own.append(lead)
            return
        strand.seen += strand.own
        strand.text += strand.own
        strand.own = []
        if join == "kv":
            for text in texts:
                strand.seen += text
                strand.text += text
            strand.position = max(child.position for child in children)
        else:
            strand.position = lead.position if lead else strand.position
            once = {token.origin: token for text in texts for token in text}
            for token in once.values():
                self._feed(strand, (token.id,), token.sampled, token.origin)
        self._say(strand, "joined", tuple(child.key for child in children))

    # --- tags ------------------------------------------------------------------------------------------

    def _tags(self, strand: Strand, program: TagProgram, depth: int, limit: int, prefix: str = "") -> None:
        grammar = program.grammar
        while True:
            tokens = tuple(self._codec.encode(prefix))
            left = limit - strand.position - len(tokens)
            if left <= 0:
                self._end(strand, FinishReason.MAX_TOKENS, final=True)
                return
            self._say(strand, "stage", tokens)
            stopping = Stopping(
                max_tokens=left,
                eos_ids=program.stopping.eos_ids,
                stop_ids=program.stopping.stop_ids,
                stop_strings=program.stopping.stop_strings,
            )
            tags = _Tags(program, self._codec, depth, limit)
            verdict, stop = self._decode(strand, tokens, stopping, None, tags)
            if verdict == "full":
                self._end(strand, FinishReason.CONTEXT, final=True)
                return
            if isinstance(verdict, FinishReason):
                self._end(strand, verdict, stop, final=True)
                return
            assert isinstance(verdict, list)
            self._end(strand, FinishReason.FORKED, final=False)
            opened = [grammar.branch_open.replace("{label}", label) for label in verdict]
            start = strand.position
            children, lead = self._fork(
                strand, strand.forks, [tuple(self._codec.encode(text)) for text in opened]
            )
            for child, text in zip(children, opened, strict=True):
                self._tags(child, program, depth + 1, min(limit, start + program.branch_max_tokens), text)
            self._join(strand, children, grammar.join, lead)
            if strand.position >= self._max_context:
                self._end(strand, FinishReason.CONTEXT, final=True)
                return
            prefix = grammar.join_open


class _Tags:
    """Looks for tags in a stage's text, the whole of it."""

    def __init__(self, program: TagProgram, codec: Alphabet, depth: int, limit: int) -> None:
        self._program = program
        self._codec = codec
        self._depth = depth
        self._limit = limit

    def look(self, generated: list[int], position: int) -> list[str] | FinishReason | None:
        """The labels of a fork, the end of the branch, or None."""
        grammar, text = self._program.grammar, self._codec.decode(generated)
        before = self._codec.decode(generated[:-1])
        if self._depth and text.count(grammar.branch_close) > before.count(grammar.branch_close):
            return FinishReason.BRANCH_CLOSED
        if self._depth == self._program.max_depth:
            return None
        if text.count(grammar.plan_close) == before.count(grammar.plan_close):
            return None
        if grammar.plan_open not in text:
            return None
        labels = pattern(grammar.outline).findall(text[text.rindex(grammar.plan_open) :])
        if not 0 < len(labels) <= self._program.max_branches:
            return None
        limit = min(self._limit, position + self._program.branch_max_tokens)
        for label in labels:
            opened = self._codec.encode(grammar.branch_open.replace("{label}", label))
            if position + len(opened) >= limit:
                return None
        return labels
