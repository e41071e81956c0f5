"""A request's program as it comes over the wire: stages, or the tags of a model that forks by itself."""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.grammars import MULTIVERSE, TagGrammar
from scheduler.outline import Line
from scheduler.program import (
    BranchSpec,
    ParallelStage,
    Plan,
    SerialStage,
    Stage,
    TagProgram,
    fault_of_beginning,
    fault_of_first_k,
    fault_of_following,
)
from scheduler.sampling import SamplingParams
from scheduler.stopping import Stopping
from serve.reading.faults import Faults
from serve.reading.sampling import read_sampling
from taper_client.v1 import inference_service_pb2 as pb

JOINS = {pb.JOIN_KV: "kv", pb.JOIN_REPREFILL: "reprefill", pb.JOIN_NONE: "none"}
MAX_STAGES = 64  # in one list of stages
MAX_SEQUENCES = 512  # serial stages and branches of one request
MAX_STOPS = 16
MAX_STOP_BYTES = 256
MAX_TAG_BYTES = 256
MAX_LABEL_BYTES = 256
MAX_LABELS = 4  # in what opens a branch: it is tokenized while others wait, for each branch of a fork


class ProgramReader:
    """Reads one program. `sampling` is what its stages have unless they say otherwise."""

    def __init__(self, faults: Faults, sampling: SamplingParams, *, keep_special_tokens: bool) -> None:
        self._faults = faults
        self._model = faults.model
        self._sampling = sampling
        self._keep_special_tokens = keep_special_tokens
        self._branches = 0
        self._sequences = 0
        self._forced = 0  # tokens of all prefixes

    def program(self, message: pb.GenerateRequest, position: int) -> Plan | TagProgram:
        """What the request does after its prompt, which ends at `position`."""
        kind = message.WhichOneof("program")
        if kind == "plan":
            if not message.plan.stages:
                self._faults.add("plan.stages", "at least one stage is needed")
            stages, _ = self._stages(message.plan.stages, "plan.stages", position, 0, self._sampling)
            return Plan(stages=stages)
        if kind == "model_driven":
            return self._model_driven(message.model_driven, "model_driven")
        return Plan(stages=(SerialStage(stopping=self._stopping(message.stopping, "stopping")),))

    def _stages(
        self, stages: Sequence[pb.Stage], path: str, position: int, depth: int, base: SamplingParams
    ) -> tuple[tuple[Stage, ...], int]:
        """The stages, and the least position after them: what they force into the context counts."""
        read: list[Stage] = []
        if len(stages) > MAX_STAGES:
            self._faults.add(path, f"at most {MAX_STAGES} stages are possible, got {len(stages)}")
            return (), position
        self._sequences += sum(len(stage.parallel.branches) or 1 for stage in stages)
        if self._sequences > MAX_SEQUENCES:
            self._faults.add(path, f"a request can have {MAX_SEQUENCES} serial stages and branches at most")
            return (), position
        for index, stage in enumerate(stages):
            name = f"{path}[{index}]"
            before = read[-1] if read else None
            if fault := fault_of_following(before):
                self._faults.add(name, fault)
            if stage.WhichOneof("kind") == "serial":
                serial = self._serial(stage.serial, f"{name}.serial", position, base)
                position += len(serial.prefix)
                read.append(serial)
            elif stage.WhichOneof("kind") == "parallel":
                name = f"{name}.parallel"
                parallel, position = self._parallel(stage.parallel, name, position, depth + 1, base)
                read.append(parallel)
            else:
                self._faults.add(name, "one of serial and parallel is needed")
                continue
            if fault := fault_of_beginning(read[-1], before):
                self._faults.add(name, fault)
        return tuple(read), position

    def _serial(self, stage: pb.SerialStage, path: str, position: int, base: SamplingParams) -> SerialStage:
        sampling = read_sampling(self._faults, stage.sampling, base, f"{path}.sampling")
        return SerialStage(
            prefix=self._prefix(stage, f"{path}.prefix", position),
            stopping=self._stopping(stage.stopping, f"{path}.stopping"),
            sampling=self._unless_default(sampling),
        )

    def _parallel(
        self, stage: pb.ParallelStage, path: str, position: int, depth: int, base: SamplingParams
    ) -> tuple[ParallelStage, int]:
        if depth > self._model.max_depth:
            self._faults.add(path, f"forks can be nested {self._model.max_depth} deep at most")
            return ParallelStage(branches=()), position
        self._branches += len(stage.branches)
        if self._branches > self._model.max_branches:
            self._faults.add(
                f"{path}.branches", f"a request can have {self._model.max_branches} branches at most"
            )
            return ParallelStage(branches=()), position
        if not stage.branches:
            self._faults.add(f"{path}.branches", "at least one branch is needed")
        join = self._join(stage.join, f"{path}.join")
        branches: list[BranchSpec] = []
        ends: list[int] = []
        labels: set[str] = set()
        for index, spec in enumerate(stage.branches):
            name = f"{path}.branches[{index}]"
            label = self._faults.size(spec.label, f"{name}.label", MAX_LABEL_BYTES)
            if label and label in labels:
                self._faults.add(f"{name}.label", f"another branch of the stage is labelled {label!r}")
            labels.add(label)
            branch, end = self._branch(spec, name, position, depth, base)
            branches.append(branch)
            ends.append(end - position)
        first_k = self._first_k(stage, path)
        first = sorted(ends)[: first_k or None]
        after = {"kv": max(first, default=0), "reprefill": sum(first), "none": 0}[join]
        self._faults.check_room(position + after, path)
        return ParallelStage(branches=tuple(branches), join=join, first_k=first_k), position + after

    def _first_k(self, stage: pb.ParallelStage, path: str) -> int:
        if fault := fault_of_first_k(stage.first_k, len(stage.branches)):
            self._faults.add(f"{path}.first_k", fault)
            return 0
        return stage.first_k

    def _branch(
        self, spec: pb.BranchSpec, path: str, position: int, depth: int, base: SamplingParams
    ) -> tuple[BranchSpec, int]:
        prefix = self._prefix(spec, f"{path}.prefix", position)
        sampling = read_sampling(self._faults, spec.sampling, base, f"{path}.sampling")
        stages, end = self._stages(spec.stages, f"{path}.stages", position + len(prefix), depth, sampling)
        branch = BranchSpec(
            label=spec.label,
            prefix=prefix,
            stopping=self._stopping(spec.stopping, f"{path}.stopping"),
            sampling=self._unless_default(sampling),
            stages=stages,
        )
        return branch, end

    def _model_driven(self, driven: pb.ModelDriven, path: str) -> TagProgram:
        stopping = self._stopping(driven.stopping, f"{path}.stopping")
        branch_tokens = driven.branch_max_tokens if driven.HasField("branch_max_tokens") else None
        if branch_tokens == 0:
            self._faults.add(f"{path}.branch_max_tokens", "must be at least 1")
        grammar = self._grammar(driven, path)
        self._check_forced(grammar, driven, path)
        return TagProgram(
            grammar=grammar,
            stopping=stopping,
            branch_max_tokens=min(branch_tokens or stopping.max_tokens, self._model.max_context),
            max_branches=self._limit(driven, "max_branches", path, self._model.max_branches),
            max_depth=self._limit(driven, "max_depth", path, self._model.max_depth),
        )

    def _limit(self, driven: pb.ModelDriven, name: str, path: str, most: int) -> int:
        value = getattr(driven, name) if driven.HasField(name) else most
        if not 1 <= value <= most:
            self._faults.add(f"{path}.{name}", f"1 to {most} are possible, got {value}")
        return value

    def _grammar(self, driven: pb.ModelDriven, path: str) -> TagGrammar:
        model = self._model
        if driven.WhichOneof("tags") == "fork_tags":
            return self._fork_tags(driven.fork_tags, f"{path}.fork_tags")
        name = driven.tag_set or model.own_grammar
        if name is None:
            self._faults.add(
                f"{path}.tag_set", f"{model.name!r} has no tags of its own: name a tag set, or send tags"
            )
        elif name not in model.grammars:
            self._faults.add(f"{path}.tag_set", f"{name[:160]!r} is not one of {', '.join(model.grammars)}")
        return model.grammars.get(name or "", MULTIVERSE)  # any will do beside a violation

    def _fork_tags(self, tags: pb.ForkTags, path: str) -> TagGrammar:
        for name in ("plan_open", "label_open", "label_close", "plan_close", "branch_open", "branch_close"):
            if not getattr(tags, name):
                self._faults.add(f"{path}.{name}", "is needed")
        for descriptor, value in tags.ListFields():
            if isinstance(value, str):
                self._faults.size(value, f"{path}.{descriptor.name}", MAX_TAG_BYTES)
        if tags.branch_open.count("{label}") > MAX_LABELS:
            self._faults.add(f"{path}.branch_open", f"{{label}} can stand {MAX_LABELS} times at most")
        join = self._join(tags.join, f"{path}.join")
        if join == "none":
            self._faults.add(f"{path}.join", "the branches of a model-driven fork are always joined")
        return TagGrammar(
            name="request",
            plan_open=tags.plan_open,
            outline=Line(tags.label_open, tags.label_close),
            plan_close=tags.plan_close,
            branch_open=tags.branch_open,
            branch_close=tags.branch_close,
            join_open=tags.join_open,
            join=join,
        )

    def _check_forced(self, grammar: TagGrammar, driven: pb.ModelDriven, path: str) -> None:
        """The tags that are forced into the context become tokens of the model; a kv join needs some."""
        for name in ("branch_open", "join_open"):
            where = f"{path}.fork_tags.{name}" if driven.HasField("fork_tags") else f"{path}.tag_set"
            text = getattr(grammar, name).replace("{label}", "")
            ids = self._faults.encoded(self._model.tokenizer.encode_continuation, text, where)
            if name == "join_open" and grammar.join == "kv" and not ids:
                self._faults.add(where, "a join_open that has tokens is needed after a kv join")

    # --- parts of a stage ------------------------------------------------------------------------------

    def _join(self, join: pb.Join, path: str) -> str:
        if join != pb.JOIN_UNSPECIFIED and join not in JOINS:
            self._faults.add(path, f"{join} is not a Join of this server")
        return JOINS.get(join, self._model.join)

    def _prefix(self, part: pb.SerialStage | pb.BranchSpec, path: str, position: int) -> tuple[int, ...]:
        prefix, ids = part.prefix, []
        if part.HasField("prefix") and not prefix.WhichOneof("kind"):
            self._faults.add(path, "one of text and token_ids is needed")
        elif prefix.WhichOneof("kind") == "text":
            ids = self._faults.encoded(self._model.tokenizer.encode_continuation, prefix.text, f"{path}.text")
        elif prefix.WhichOneof("kind") == "token_ids":
            ids = self._faults.ids(prefix.token_ids.ids, f"{path}.token_ids.ids")
        self._faults.check_room(position + len(ids), path)
        self._check_forced_tokens(len(ids), path)
        return tuple(ids)

    def _check_forced_tokens(self, more: int, path: str) -> None:
        """All prefixes together: those of branches do not stand one after the other."""
        most = self._model.max_context
        if self._forced <= most < self._forced + more:
            self._faults.add(path, f"all prefixes together can have at most {most} tokens")
        self._forced += more

    def _stopping(self, stopping: pb.StoppingCriteria, path: str) -> Stopping:
        model = self._model
        most = stopping.max_tokens if stopping.HasField("max_tokens") else model.default_max_tokens
        if most < 1:
            self._faults.add(f"{path}.max_tokens", "must be at least 1")
        for name in ("stop", "stop_token_ids"):
            count = len(getattr(stopping, name))
            if count > MAX_STOPS:
                self._faults.add(f"{path}.{name}", f"at most {MAX_STOPS} are possible, got {count}")
        stops = stopping.stop[:MAX_STOPS]
        for index, text in enumerate(stops):
            if not 1 <= len(text.encode()) <= MAX_STOP_BYTES:
                self._faults.add(f"{path}.stop[{index}]", f"1 to {MAX_STOP_BYTES} bytes are possible")
        named = self._named(stops, f"{path}.stop")
        return Stopping(
            max_tokens=min(most, model.max_context),  # the context ends it first
            eos_ids=frozenset() if stopping.ignore_eos else frozenset(model.eos_ids),
            stop_ids=frozenset(
                [*self._faults.ids(stopping.stop_token_ids[:MAX_STOPS], f"{path}.stop_token_ids"), *named]
            ),
            stop_strings=tuple(stops),
            special_tokens=self._keep_special_tokens,
        )

    def _named(self, stops: Sequence[str], path: str) -> list[int]:
        """The special tokens that stop strings name. They have no text unless they are kept."""
        special, named = self._model.tokenizer.spelling.special, []
        if self._keep_special_tokens:
            return []
        for index, text in enumerate(stops):
            if text in special:
                named.append(special[text])
            elif inside := next((token for token in special if token in text), None):
                fault = (
                    f"{inside!r} is a special token, which text does not hold: set output.keep_special_tokens"
                )
                self._faults.add(f"{path}[{index}]", fault)
        return named

    def _unless_default(self, sampling: SamplingParams) -> SamplingParams | None:
        return None if sampling == self._sampling else sampling
