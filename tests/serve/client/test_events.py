"""Messages are read into events, field by field."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration

from taper_client.events import Finished, StageBranch, StageStarted, Timing, Usage, events_of
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
