"""TAPER under Ray Serve: every replica has a server of its own, and Ray's proxy hands calls to one of them.

    pip install "ray[serve]" and this project, into one environment
    python examples/ray_serve.py --replicas 2 --port 9000 -- --model default
    taper-client --raw --address 127.0.0.1:9000 "Reverse each word: cat, lemon."

What stands after "--" are the options of taper-serve. docs/replicas.md says what Ray costs, and what is lost.
"""

# ruff: noqa: N802 - methods have the names that the service gives them
from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import ray
from ray import serve
from ray.serve.config import gRPCOptions

from taper_client.v1 import control_service_pb2 as control_pb
from taper_client.v1 import control_service_pb2_grpc as control_grpc
from taper_client.v1 import inference_service_pb2 as pb
from taper_client.v1 import inference_service_pb2_grpc as inference_grpc

READY = "taper-serve ready on "
SERVICES = [
    "taper_client.v1.inference_service_pb2_grpc.add_InferenceServiceServicer_to_server",
    "taper_client.v1.control_service_pb2_grpc.add_ControlServiceServicer_to_server",
]


# Ray asks a replica for no more than this at once, and waits for one; taper-serve would queue them itself.
@serve.deployment(max_ongoing_requests=64, graceful_shutdown_timeout_s=60.0)
class Taper:
    """A server on a free port of this machine, and the methods that Ray's proxy calls by their names."""

    async def __init__(self, options: Sequence[str]) -> None:
        # Whatever becomes of the replica, its server drains and ends with it.
        command = ["setpriv", "--pdeathsig", "TERM", "taper-serve", *options, "--port", "0"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        ready = next((line for line in self._process.stdout if line.startswith(READY)), None)
        if ready is None:
            raise RuntimeError(f"taper-serve did not start: it ended with {self._process.wait()}")
        channel = grpc.aio.insecure_channel(ready.removeprefix(READY).strip())
        self._inference = inference_grpc.InferenceServiceStub(channel)
        self._control = control_grpc.ControlServiceStub(channel)

    def check_health(self) -> None:
        """Ray replaces the replica if this raises."""
        if self._process.poll() is not None:
            raise RuntimeError(f"taper-serve ended with {self._process.returncode}")

    def __del__(self) -> None:
        self._process.terminate()  # it finishes what runs
        self._process.wait()

    async def Generate(
        self, request: pb.GenerateRequest, grpc_context: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        call = self._inference.Generate(request)
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise told(error, grpc_context) from None
        finally:
            call.cancel()  # if its caller has left

    async def Tokenize(self, request: pb.TokenizeRequest, grpc_context: Any) -> pb.TokenizeResponse:
        return await answered(self._inference.Tokenize(request), grpc_context)

    async def Detokenize(self, request: pb.DetokenizeRequest, grpc_context: Any) -> pb.DetokenizeResponse:
        return await answered(self._inference.Detokenize(request), grpc_context)

    async def GetModelInfo(
        self, request: control_pb.GetModelInfoRequest, grpc_context: Any
    ) -> control_pb.GetModelInfoResponse:
        return await answered(self._control.GetModelInfo(request), grpc_context)


async def answered(call: Any, grpc_context: Any) -> Any:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise told(error, grpc_context) from None


def told(error: grpc.aio.AioRpcError, grpc_context: Any) -> RuntimeError:
    """What ends a call with the server's own status, as far as Ray passes it on."""
    grpc_context.set_code(error.code())
    grpc_context.set_details(error.details())
    grpc_context.set_trailing_metadata([*(error.trailing_metadata() or ())])
    return RuntimeError(error.details())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=0, help="of each replica")
    parser.add_argument("--port", type=int, default=9000, help="of Ray's gRPC proxy, on all addresses")
    parser.add_argument("options", nargs="*", help="of taper-serve, after --")
    asked = parser.parse_args()
    ray.init(include_dashboard=False)
    serve.start(grpc_options=gRPCOptions(port=asked.port, grpc_servicer_functions=SERVICES))
    deployment = Taper.options(num_replicas=asked.replicas, ray_actor_options={"num_gpus": asked.gpus})
    serve.run(deployment.bind(asked.options), name="taper")
    print(f"ready on 127.0.0.1:{asked.port}", flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        serve.shutdown()
        sys.exit(0)


if __name__ == "__main__":
    main()
