"""Messages as clients might send them that check nothing, and what the server reads in one."""

from __future__ import annotations

import pytest

from scheduler.program import check_program
from serve.reading.requests import read_request
from taper_client import generate_request, model_driven
from taper_client.errors import InvalidRequestError
from taper_client.v1 import inference_service_pb2 as pb
from tests.serve.fakes import served_model

TAGS = pb.ForkTags(
    plan_open="<plan>",
    label_open="* ",
    label_close=" *",
    plan_close="</plan>",
    branch_open="<b {label}>",
    branch_close="</b>",
    join_open="<all>",
    join=pb.JOIN_KV,
)


def of(**fields) -> pb.GenerateRequest:
    """What a client that checks nothing might send."""
    return pb.GenerateRequest(**{"prompt": pb.Prompt(text="go"), **fields})


def of_sampling(**fields) -> pb.GenerateRequest:
    return of(sampling=pb.SamplingParams(**fields))


def of_plan(*stages: pb.Stage) -> pb.GenerateRequest:
    return of(plan=pb.Plan(stages=stages))


def of_race(first_k: int, *branches: pb.BranchSpec) -> pb.Stage:
    return pb.Stage(parallel=pb.ParallelStage(branches=branches, first_k=first_k))


def of_parallel(*branches: pb.BranchSpec) -> pb.GenerateRequest:
    return of_plan(pb.Stage(parallel=pb.ParallelStage(branches=branches)))


def of_serial(**fields) -> pb.Stage:
    return pb.Stage(serial=pb.SerialStage(stopping=pb.StoppingCriteria(**fields)))


def of_stopping(**fields) -> pb.GenerateRequest:
    return of_plan(of_serial(**fields))


def of_driven(**fields) -> pb.GenerateRequest:
    return of(model_driven=pb.ModelDriven(tag_set="multiverse", **fields))


def of_tags(**changes) -> pb.GenerateRequest:
    tags = pb.ForkTags()
    tags.CopyFrom(TAGS)
    for name, value in changes.items():
        setattr(tags, name, value)
    return generate_request("go", plan=model_driven(fork_tags=tags))


def read(message: pb.GenerateRequest, **model):
    """The request that a message becomes, of a model like that of `served_model`."""
    request = read_request(message, served_model(**model))
    check_program(request.program)  # whatever passes here, the scheduler can run
    return request


def violations(message: pb.GenerateRequest, **model) -> dict[str, str]:
    """What is wrong with a message: a description by path, in the order in which they are told."""
    with pytest.raises(InvalidRequestError) as caught:
        read_request(message, served_model(**model))
    return {violation.field: violation.description for violation in caught.value.violations}
