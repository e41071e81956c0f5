import subprocess
import sys
from pathlib import Path

import pytest

from serve.api.protos import generate
from serve.api.protos.taper.v1 import control_service_pb2, inference_service_pb2

FOLDER = Path(generate.__file__).parent


def test_the_stubs_are_those_of_the_protos(tmp_path):
    written = generate.generate(tmp_path)
    assert len(written) == 6
    for path in written:
        assert path.read_text() == (FOLDER / path.relative_to(tmp_path)).read_text(), path.name


@pytest.mark.parametrize("module", [inference_service_pb2, control_service_pb2])
def test_descriptors_name_their_files_as_other_languages_do(module):
    name = module.__name__.rpartition(".")[2].removesuffix("_pb2")
    assert module.DESCRIPTOR.name == f"taper/v1/{name}.proto"
    assert module.DESCRIPTOR.package == "taper.v1"


def test_every_sampling_number_can_be_unset():
    for field in inference_service_pb2.SamplingParams.DESCRIPTOR.fields:
        assert field.has_presence or field.name == "logit_bias", field.name


def test_the_protos_are_clean(tmp_path):
    buf = Path(sys.executable).parent / "buf"
    result = subprocess.run(
        [buf, "lint", FOLDER], capture_output=True, text=True, env={"HOME": str(tmp_path), "PATH": "/usr/bin"}
    )
    assert result.returncode == 0, result.stdout + result.stderr
