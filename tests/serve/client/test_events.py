"""Messages are read into events, field by field."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from taper_client.events import (
    BranchFinished,
    Delta,
    Event,
    Finished,
    Joined,
    Logprob,
    StageBranch,
    StageStarted,
    Started,
    Timing,
    Usage,
    WidthChanged,
    events_of,
)
from taper_client.v1 import inference_service_pb2 as pb


def test_every_figure_of_the_end_is_read_from_its_own_field() -> None:
    usage = pb.Usage(
        prompt_tokens=1, cached_tokens=2, completion_tokens=3, critical_path_tokens=4, preemptions=5
    )
    timing = pb.Timing(
        queue_time=Duration(seconds=1, nanos=1),
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
            timing=Timing(
                queue=1.000000001, ttft=2.0, tpot=0.003, total=4.0, tpot_slo_met=False, ttft_slo_met=True
            ),
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


@pytest.mark.parametrize(
    ("kind", "message", "read"),
    [
        (
            "started",
            pb.Started(request_id="r", prompt_tokens=9, cached_tokens=4, prompt_token_ids=[7, 8], server="s"),
            Started(request_id="r", prompt_tokens=9, cached_tokens=4, prompt_token_ids=(7, 8), server="s"),
        ),
        (
            "delta",
            pb.BranchDelta(
                branch_id=3,
                text="a",
                token_ids=[5],
                logprobs=[
                    pb.TokenLogprob(token_id=5, logprob=-0.5, top=[pb.TopLogprob(token_id=6, logprob=-2.0)])
                ],
                completion_tokens=12,
            ),
            Delta(
                branch=3,
                text="a",
                token_ids=(5,),
                logprobs=(Logprob(token=5, logprob=-0.5, top=((6, -2.0),)),),
                completion_tokens=12,
            ),
        ),
        ("width_changed", pb.WidthChanged(width=2, wanted=5), WidthChanged(width=2, wanted=5)),
        ("joined", pb.Joined(stage=4, branch_ids=[3, 1]), Joined(stage=4, branches=(3, 1))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_field_is_read_from_its_own(kind: str, message: Any, read: Event) -> None:
    assert [*events_of(pb.GenerateResponse(events=[pb.Event(**{kind: message})]))] == [read]


@pytest.mark.parametrize(
    ("matched", "stop"), [({}, None), ({"stop_string": ""}, ""), ({"stop_token_id": 0}, 0)]
)
def test_what_stopped_a_branch_is_a_string_an_id_or_nothing(
    matched: dict[str, Any], stop: str | int | None
) -> None:
    ended = pb.BranchFinished(
        branch_id=3, finish_reason=pb.FINISH_REASON_STOP, completion_tokens=8, **matched
    )
    (read,) = events_of(pb.GenerateResponse(events=[pb.Event(branch_finished=ended)]))
    assert read == BranchFinished(branch=3, reason="stop", stop=stop, completion_tokens=8)
