import pickle
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from taper_client.v1 import control_service_pb2, inference_service_pb2

PROTOS = Path(__file__).parents[3] / "serve/client/protos"
RELEASED = Path(__file__).parent / "released.binpb"
STUBS = Path(inference_service_pb2.__file__).parent


def test_the_stubs_are_those_of_the_protos(tmp_path):
    written = runpy.run_path(str(PROTOS / "generate.py"))["generate"](tmp_path)
    assert len(written) == 6
    for path in written:
        assert path.read_text() == (STUBS / path.name).read_text(), path.name


def test_messages_can_be_pickled():
    """As frameworks do that hand them to other processes."""
    request = inference_service_pb2.GenerateRequest(request_id="r", prompt={"text": "go"})
    assert pickle.loads(pickle.dumps(request)) == request
    reason = inference_service_pb2.FinishReason.FINISH_REASON_STOP
    assert pickle.loads(pickle.dumps(reason)) == reason


@pytest.mark.parametrize("module", [inference_service_pb2, control_service_pb2])
def test_descriptors_name_their_files_as_other_languages_do(module):
    name = module.__name__.rpartition(".")[2].removesuffix("_pb2")
    assert module.DESCRIPTOR.name == f"taper/v1/{name}.proto"
    assert module.DESCRIPTOR.package == "taper.v1"


def test_every_sampling_number_can_be_unset():
    for field in inference_service_pb2.SamplingParams.DESCRIPTOR.fields:
        assert field.has_presence or field.name == "logit_bias", field.name


def buf(*arguments, home):
    command = [Path(sys.executable).parent / "buf", *arguments]
    environment = {"HOME": str(home), "PATH": "/usr/bin"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_protos_are_clean(tmp_path):
    result = buf("lint", PROTOS, home=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_clients_of_the_released_schema_go_on_working(tmp_path):
    """After a change that adds to it, `buf build serve/client/protos --exclude-source-info` makes it anew."""
    result = buf("breaking", PROTOS, "--against", RELEASED, home=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_field_that_goes_is_noticed(tmp_path):
    protos = shutil.copytree(PROTOS, tmp_path / "protos")
    file = protos / "taper/v1/inference_service.proto"
    text = file.read_text()
    assert "repeated uint32 ids = 1;" in text
    file.write_text(text.replace("repeated uint32 ids = 1;", ""))
    result = buf("breaking", protos, "--against", RELEASED, home=tmp_path)
    assert result.returncode == 100
    assert 'Previously present field "1" with name "ids"' in result.stdout
