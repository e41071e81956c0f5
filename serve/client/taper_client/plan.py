"""What is to be decoded after a prompt: stages that a client lays out, or a model's own tags."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, Unpack

from .arguments import (
    instance,
    items,
    known,
    merged,
    message,
    one_of,
    text,
    token_ids,
    whole,
    wrong_type,
    wrong_value,
)
from .options import ELSEWHERE, StageOptions, StoppingOptions, sampling_of, stopping_of
from .v1 import inference_service_pb2 as pb

Join = Literal["kv", "reprefill", "none"]
"""What the stage after a parallel one sees of its branches: `kv`, their KV as it is, for models trained for
it; `reprefill`, their texts one after the other, read again; `none`, there is no such stage."""

_JOINS = {"kv": pb.JOIN_KV, "reprefill": pb.JOIN_REPREFILL, "none": pb.JOIN_NONE}


def serial(prefix: str | Sequence[int] = "", **options: Unpack[StageOptions]) -> pb.Stage:
    """One sequence, which goes on from `prefix`."""
    known(options, StageOptions.__annotations__, ELSEWHERE)
    stage = pb.SerialStage(
        prefix=_prefix(prefix), stopping=stopping_of(options), sampling=sampling_of(options)
    )
    return pb.Stage(serial=stage)


def branch(
    prefix: str | Sequence[int] = "",
    *,
    label: str = "",
    then: Sequence[pb.Stage] = (),
    **options: Unpack[StageOptions],
) -> pb.BranchSpec:
    """One of the sequences of a parallel stage, which goes on from `prefix`.

    label   its name, unique within the stage
    then    stages of its own after the first sequence, which may fork again; they inherit its sampling
    """
    known(options, StageOptions.__annotations__, ELSEWHERE)
    return pb.BranchSpec(
        label=text("label", label),
        prefix=_prefix(prefix),
        stopping=stopping_of(options),
        sampling=sampling_of(options),
        stages=stages_of("then", then),
    )


def parallel(
    branches: Sequence[pb.BranchSpec | str],
    *,
    join: Join | None = None,
    first_k: int | None = None,
    **options: Unpack[StageOptions],
) -> pb.Stage:
    """Sequences at once that share all text before them; a string is a branch that goes on from it.

    join      how the next stage sees them; the model's own way when None
    first_k   join only so many: those with the fewest tokens, of two with as many the earlier one. The others
              are stopped as soon as they cannot be among them; their `finish_reason` is "outrun"

    The options are for all that its branches decode, unless these say otherwise.
    """
    known(options, StageOptions.__annotations__, ELSEWHERE)
    how = None if join is None else _JOINS[one_of("join", join, _JOINS)]
    specs = _branches(branches)
    count = None if first_k is None else whole("first_k", first_k, 0, len(specs))
    stage = pb.Stage(parallel=pb.ParallelStage(branches=specs, join=how, first_k=count))
    _inherit_sampling(stage.parallel.branches, sampling_of(options))
    inherit_stopping([stage], stopping_of(options))
    return stage


def model_driven(
    tag_set: str | None = None,
    *,
    fork_tags: pb.ForkTags | None = None,
    branch_max_tokens: int | None = None,
    max_branches: int | None = None,
    max_depth: int | None = None,
    **options: Unpack[StoppingOptions],
) -> pb.ModelDriven:
    """Let tags in the model's own text open and close branches.

    tag_set            name of a built-in set of tags; the model's own unless given
    fork_tags          the tags themselves
    branch_max_tokens  most new tokens of each branch; `max_tokens` unless given
    max_branches       most branches that one fork may open; the branches of a larger one are decoded in turn
    max_depth          most forks inside one another

    `max_tokens` bounds the longest chain of tokens of the whole answer.
    """
    known(options, StoppingOptions.__annotations__, ELSEWHERE)
    if tag_set is not None and fork_tags is not None:
        raise ValueError("tag_set and fork_tags are both given: one of them says what the tags are")
    limits = {"branch_max_tokens": branch_max_tokens, "max_branches": max_branches, "max_depth": max_depth}
    driven = message(pb.ModelDriven, {"tag_set": tag_set, **limits})
    driven.stopping.CopyFrom(message(pb.StoppingCriteria, options))
    if fork_tags is not None:
        driven.fork_tags.CopyFrom(instance("fork_tags", fork_tags, pb.ForkTags, "ForkTags(...)"))
    return driven


# --- lists of stages ---------------------------------------------------------------------------------------


def stages_of(name: str, stages: Any) -> list[pb.Stage]:
    """Stages as they are written in a list."""
    listed = items(name, stages, "a list of stages, as in [serial(...), parallel([...])],")
    for index, stage in enumerate(listed):
        if not isinstance(stage, pb.Stage):
            needed = "a stage is needed, which serial(...) and parallel([...]) make"
            raise wrong_type(f"{name}[{index}]", stage, needed)
    return [*listed]


def inherit_stopping(stages: Iterable[pb.Stage], base: pb.StoppingCriteria) -> None:
    """Give all stages, and those of their branches, what `base` says and they do not."""
    if not base.ListFields():
        return
    for stage in stages:
        parts = [stage.serial] if stage.WhichOneof("kind") == "serial" else stage.parallel.branches
        for part in parts:
            part.stopping.CopyFrom(merged(base, part.stopping))
        for spec in stage.parallel.branches:
            inherit_stopping(spec.stages, base)


def _inherit_sampling(branches: Iterable[pb.BranchSpec], base: pb.SamplingParams | None) -> None:
    """Give branches what `base` says and they do not. The server passes it on to their stages."""
    for spec in branches:
        if base is not None:
            spec.sampling.CopyFrom(merged(base, spec.sampling))


def _branches(branches: Any) -> list[pb.BranchSpec]:
    example = "a list of branches, as in parallel(['Tea:', 'Coffee:']),"
    specs: list[pb.BranchSpec] = []
    for index, spec in enumerate(items("branches", branches, example)):
        if isinstance(spec, str):
            spec = branch(text(f"branches[{index}]", spec))
        elif not isinstance(spec, pb.BranchSpec):
            needed = "text, or what branch(...) returns, is needed; branch(then=[...]) holds stages"
            raise wrong_type(f"branches[{index}]", spec, needed)
        specs.append(spec)
    if not specs:
        raise wrong_value("branches", branches, "at least one branch is needed")
    return specs


def _prefix(prefix: Any) -> pb.Prefix | None:
    if isinstance(prefix, str):
        return pb.Prefix(text=text("prefix", prefix)) if prefix else None
    if isinstance(prefix, bytes | bytearray):
        raise wrong_type("prefix", prefix, "a str or token ids are needed; decode it first")
    return pb.Prefix(token_ids=pb.TokenIds(ids=token_ids("prefix", prefix)))
