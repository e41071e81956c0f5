"""Every option is there once, under its name on the wire."""

from __future__ import annotations

import pytest

from taper_client import sampling, stopping
from taper_client.options import Options, OutputOptions, SamplingOptions, StageOptions, StoppingOptions
from taper_client.v1 import inference_service_pb2 as pb
from tests.serve.client.options import SAMPLING, STOPPING


@pytest.mark.parametrize(
    ("table", "kind"),
    [
        (SamplingOptions, pb.SamplingParams),
        (StoppingOptions, pb.StoppingCriteria),
        (OutputOptions, pb.OutputOptions),
    ],
)
def test_a_table_has_the_fields_of_its_message(table, kind):
    assert [*table.__annotations__] == [field.name for field in kind.DESCRIPTOR.fields]


def test_a_request_has_every_field_of_its_message():
    parts = {"prompt", "stopping", "plan", "model_driven", "sampling", "slo", "output"}
    own = {field.name for field in pb.GenerateRequest.DESCRIPTOR.fields} - parts
    assert own <= Options.__annotations__.keys()
    assert StageOptions.__annotations__.keys() | OutputOptions.__annotations__.keys() <= {
        *Options.__annotations__
    }


def test_options_are_sent_under_their_own_names():
    assert sampling(**SAMPLING) == pb.SamplingParams(**SAMPLING)
    assert stopping(**STOPPING) == pb.StoppingCriteria(**STOPPING)
    assert SAMPLING.keys() == SamplingOptions.__annotations__.keys()
    assert STOPPING.keys() == StoppingOptions.__annotations__.keys()


def test_what_is_not_set_is_not_sent():
    assert sampling() == pb.SamplingParams()
    assert stopping() == pb.StoppingCriteria()
    assert not sampling(top_p=1).HasField("temperature")
    assert sampling(temperature=0).HasField("temperature")
