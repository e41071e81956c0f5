"""Plans as their users write them."""

from __future__ import annotations

import pytest

from taper_client import branch, model_driven, parallel, sampling, serial, stopping
from taper_client.plan import inherit_stopping
from taper_client.v1 import inference_service_pb2 as pb
from tests.serve.client.options import SAMPLING, STOPPING

DRAWN, ENDS = pb.SamplingParams(**SAMPLING), pb.StoppingCriteria(**STOPPING)


def test_a_stage_keeps_its_sampling_and_where_it_ends():
    by_name = {**SAMPLING, **STOPPING}
    for said in (by_name, {"sampling": sampling(**SAMPLING), "stopping": stopping(**STOPPING)}):
        assert serial("a", **said).serial == pb.SerialStage(
            prefix=pb.Prefix(text="a"), stopping=ENDS, sampling=DRAWN
        )
        assert branch([5], label="b", then=[serial("x")], **said) == pb.BranchSpec(
            label="b",
            prefix=pb.Prefix(token_ids=pb.TokenIds(ids=[5])),
            stopping=ENDS,
            sampling=DRAWN,
            stages=[serial("x")],
        )


def test_what_is_not_said_of_a_stage_is_not_sent():
    assert serial().serial == pb.SerialStage(stopping=pb.StoppingCriteria())
    assert branch() == pb.BranchSpec(stopping=pb.StoppingCriteria())


def test_an_option_replaces_what_a_value_beside_it_says():
    stage = serial(
        sampling=sampling(temperature=0.5, top_k=3, logit_bias={1: 1.0, 2: 2.0}),
        stopping=stopping(9, stop=["a", "b"]),
        temperature=0,
        logit_bias={3: 3.0},
        stop="c",
    ).serial
    assert stage.sampling == pb.SamplingParams(temperature=0, top_k=3, logit_bias={3: 3.0})
    assert stage.stopping == pb.StoppingCriteria(max_tokens=9, stop=["c"])


def test_one_string_that_stops_is_a_list_of_one():
    assert serial(stop="\n") == serial(stop=["\n"])
    assert stopping(stop="ab") == pb.StoppingCriteria(stop=["ab"])


def test_a_string_is_a_branch_that_goes_on_from_it():
    stage = parallel(["a", branch("b")], join="none").parallel
    assert [each.prefix.text for each in stage.branches] == ["a", "b"]
    assert stage.join == pb.JOIN_NONE
    assert parallel(["a"]).parallel.join == pb.JOIN_UNSPECIFIED


def test_a_parallel_stage_joins_all_of_its_branches_unless_it_is_told_how_many():
    assert parallel(["a", "b"]).parallel.first_k == 0
    assert parallel(["a", "b"], first_k=1).parallel.first_k == 1
    assert parallel(["a", "b"], first_k=2).parallel.first_k == 2
    with pytest.raises(ValueError, match="first_k is 3: 0 to 2 are possible"):
        parallel(["a", "b"], first_k=3)


def test_options_of_a_parallel_stage_are_for_branches_that_do_not_say_otherwise():
    own = branch("b", max_tokens=3, top_p=1.0, stop=["!"], then=[serial("c"), parallel(["d"])])
    stage = parallel(["a", own], max_tokens=9, stop="\n", top_p=0.5, seed=4).parallel
    first, second = stage.branches
    assert first.stopping == pb.StoppingCriteria(max_tokens=9, stop=["\n"])
    assert first.sampling == pb.SamplingParams(top_p=0.5, seed=4)
    assert second.stopping == pb.StoppingCriteria(max_tokens=3, stop=["!"])
    assert second.sampling == pb.SamplingParams(top_p=1.0, seed=4)
    after, forked = second.stages
    assert after.serial.stopping == first.stopping
    assert forked.parallel.branches[0].stopping == first.stopping
    assert not after.serial.HasField("sampling"), "the server passes a branch's on to its stages"
    assert own.stages[0].serial.stopping == pb.StoppingCriteria(), "what the caller holds stays as it was"


def test_inherited_is_only_what_is_said():
    stages = [serial("a"), parallel(["b"])]
    inherit_stopping(stages, pb.StoppingCriteria())
    assert stages == [serial("a"), parallel(["b"])]
    inherit_stopping(stages, pb.StoppingCriteria(ignore_eos=True))
    assert stages == [serial("a", ignore_eos=True), parallel(["b"], ignore_eos=True)]


def test_the_limits_of_a_model_driven_request_are_sent_under_their_own_names():
    driven = model_driven("t", max_tokens=1, stop="x", branch_max_tokens=2, max_branches=3, max_depth=4)
    assert driven == pb.ModelDriven(
        tag_set="t",
        stopping=pb.StoppingCriteria(max_tokens=1, stop=["x"]),
        branch_max_tokens=2,
        max_branches=3,
        max_depth=4,
    )


def test_model_driven_programs_take_a_name_or_tags():
    assert model_driven("multiverse").tag_set == "multiverse"
    tags = pb.ForkTags(plan_open="<p>")
    assert model_driven(fork_tags=tags).fork_tags == tags
    assert model_driven().WhichOneof("tags") is None
