"""Messages are read into events, field by field."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration

from serve.api.protos.taper.v1 import inference_service_pb2 as pb
from serve.client.answer import (
    BranchFinished,
    Completion,
    Delta,
    Finished,
    StageBranch,
    StageStarted,
    Timing,
    Usage,
    events_of,
)


def test_every_figure_of_the_end_is_read_from_its_own_field() -> None:
    usage = pb.Usage(
        prompt_tokens=1, cached_tokens=2, completion_tokens=3, critical_path_tokens=4, preemptions=5
    )
    timing = pb.Timing(
        queue_time=Duration(seconds=1),
        time_to_first_token=Duration(seconds=2),
        time_per_output_token=Duration(nanos=3_000_000),
        total_time=Duration(seconds=4),
        ttft_slo_met=True,
    )
    message = pb.GenerateResponse(events=[pb.Event(finished=pb.Finished(usage=usage, timing=timing))])
    assert [*events_of(message)] == [
        Finished(
            usage=Usage(
                prompt_tokens=1, cached_tokens=2, completion_tokens=3, critical_path_tokens=4, preemptions=5
            ),
            timing=Timing(queue=1.0, ttft=2.0, tpot=0.003, total=4.0, tpot_slo_met=False, ttft_slo_met=True),
        )
    ]


def test_a_stage_says_whose_branches_begin() -> None:
    branch = pb.Branch(branch_id=3, parent_branch_id=2, label="tea", prefix="Tea: ")
    message = pb.GenerateResponse(
        events=[pb.Event(stage_started=pb.StageStarted(stage=4, branches=[branch]))]
    )
    begun = StageBranch(branch=3, parent=2, label="tea", prefix="Tea: ")
    assert [*events_of(message)] == [StageStarted(stage=4, branches=(begun,))]


def test_an_event_of_a_newer_schema_is_left_out() -> None:
    newer = pb.Event.FromString(bytes([0x9A, 0x06, 0]))  # field 99, an empty message
    assert [*events_of(pb.GenerateResponse(events=[newer, pb.Event(joined=pb.Joined(stage=1))]))] != []
    assert [*events_of(pb.GenerateResponse(events=[newer]))] == []


def test_a_branch_that_was_outrun_is_kept_and_is_not_in_the_text() -> None:
    completion = Completion()
    racers = tuple(StageBranch(branch=b, parent=0, label="", prefix=f"{b}:") for b in (1, 2))
    nested = StageBranch(branch=3, parent=1, label="", prefix="3:")
    for event in (
        StageStarted(stage=0, branches=racers),
        Delta(branch=1, text="long", token_ids=(), logprobs=(), completion_tokens=4),
        Delta(branch=2, text="no", token_ids=(), logprobs=(), completion_tokens=2),
        StageStarted(stage=1, branches=(nested,)),
    ):
        completion.add(event)
    assert completion.text == "1:long3:2:no"
    completion.add(BranchFinished(branch=3, reason="outrun", stop=None, completion_tokens=0))
    completion.add(BranchFinished(branch=1, reason="outrun", stop=None, completion_tokens=4))
    completion.add(BranchFinished(branch=2, reason="eos", stop=None, completion_tokens=2))
    assert completion.text == "2:no"
    assert [branch.outrun for branch in completion.branches] == [True, False, True]
