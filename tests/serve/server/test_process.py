"""The server as a process: it drains at a signal, and its status says whether it ended well."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import urllib.request

import pytest

from taper_client import AsyncClient
from taper_client.errors import InternalError, UnavailableError
from taper_client.v1 import control_service_pb2

PROCESS = """
import sys, threading
from serve.config import ServerConfig
from serve.door import Failed
from serve.served import Platform, Served
from serve.server.server import run
from tests.serve.fakes import STEP, FakeEngine, served_model
from tests.serve.server.own_loop import answer

def die(engine, request):
    engine.state, engine.failure = "FAILED", "a step found no memory"
    engine.tell(request.id, Failed("the device is gone"))

def answer_late(engine, request):
    engine.drained.wait(10)
    answer(engine, request)

def load(config, on_step):
    if "fails" in sys.argv:
        raise ValueError("no such model")
    if "hangs" in sys.argv:
        print("loading", flush=True)
        threading.Event().wait()
    on_step(STEP)
    work = {"waits": None, "late": answer_late, "dies": die}.get(sys.argv[-1], answer)
    return Served(engine=FakeEngine(work), model=served_model())

run(ServerConfig(port=0, metrics_port=0, drain_timeout=20.0, readers=0), load)
"""


@contextlib.contextmanager
def process(*args: str):
    command = [sys.executable, "-c", PROCESS, *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def ready(child: subprocess.Popen) -> str:
    line = child.stdout.readline()
    assert line.startswith("taper-serve ready on 127.0.0.1:"), line + child.stderr.read()
    return line.split()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_the_process_ends_well(number):
    with process() as child:
        address = ready(child)

        async def use() -> str:
            async with AsyncClient(address) as client:
                return (await client.complete("go")).text

        assert asyncio.run(use()) == "aa"
        child.send_signal(number)
        assert child.wait(20) == 0, child.stderr.read()
        assert child.stdout.read() == ""


def test_what_runs_when_the_signal_comes_is_finished():
    with process("late") as child:
        address = ready(child)

        async def use() -> str:
            async with AsyncClient(address) as client:
                running = asyncio.ensure_future(client.complete("go"))
                while not (await client.load()).running_requests:
                    pass
                child.send_signal(signal.SIGTERM)
                return (await running).text

        assert asyncio.run(use()) == "aa"
        assert child.wait(15) == 0, child.stderr.read()


def test_a_second_signal_does_not_wait_for_what_runs():
    with process("waits") as child:
        address = ready(child)

        async def use() -> None:
            async with AsyncClient(address) as client:
                running = asyncio.ensure_future(client.complete("go"))
                while not (await client.load()).running_requests:
                    pass
                child.send_signal(signal.SIGTERM)
                while (await client.server_info()).state == control_service_pb2.SERVER_STATE_SERVING:
                    pass
                child.send_signal(signal.SIGTERM)
                with pytest.raises(UnavailableError):
                    await running

        asyncio.run(use())
        assert child.wait(15) == 0, child.stderr.read()


def test_a_signal_ends_a_start_that_has_not_come_to_its_end():
    with process("hangs") as child:
        assert child.stdout.readline() == "loading\n"
        child.send_signal(signal.SIGTERM)
        assert child.wait(15) == 0, child.stderr.read()


def test_when_the_engine_dies_callers_are_told_and_the_process_ends_with_an_error():
    with process("dies") as child:
        address = ready(child)

        async def use() -> str:
            async with AsyncClient(address) as client:
                with pytest.raises(InternalError) as caught:
                    await client.complete("go")
                return caught.value.reason

        assert asyncio.run(use()) == "ENGINE_FAILED"
        assert child.wait(15) == 1
        assert "EngineFailedError: the engine failed: a step found no memory" in child.stderr.read()


def test_a_failed_start_ends_the_process_with_its_reason():
    with process("fails") as child:
        assert child.wait(20) == 1
        assert "no such model" in child.stderr.read()


def test_metrics_are_served_on_a_port_of_their_own():
    with process() as child:
        ready(child)
        line = next(line for line in child.stderr if "/metrics" in line)
        url = line[line.index("http") :].split()[0].split("\x1b")[0]
        with urllib.request.urlopen(url, timeout=10) as response:
            page = response.read()
        assert b'taper_kv_capacity_tokens{model_name="tiny"} 1000.0' in page
        assert b"taper_step_seconds_count 1.0" in page, "of every step that the loader tells of"
