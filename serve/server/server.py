"""The gRPC server around the engine: taper.v1, health and reflection, from start to drain.

It listens before the model is loaded, and answers UNAVAILABLE until the engine serves.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from serve.api.protos.taper.v1 import control_service_pb2 as control_pb
from serve.api.protos.taper.v1 import inference_service_pb2 as pb
from serve.config import ServerConfig
from serve.logs import STDERR, log_to_stderr
from serve.reading.frames import begin
from serve.reading.pool import ReaderPool
from serve.served import Loader, Served
from serve.server.health import Health
from serve.server.methods import Behaviour, Method, add_service, full_name
from serve.server.reflection import Reflection
from serve.server.service import Service
from serve.server.servicers import ControlServicer, InferenceServicer

log = structlog.get_logger("taper")

SERVICES = (full_name(pb), full_name(control_pb))
MAX_CONTROL_BYTES = 1 << 16  # of every message but those that bring a prompt
MAX_METADATA_BYTES = 1 << 13  # of one call's headers
MAX_ARRIVALS = 1 << 14  # calls that come at one moment: gRPC ends some of more than that, whosever they are
_LOADER = "taper-load"
_LOOK_SECONDS = 0.1  # between two looks at whether the engine has died
_FLUSH_SECONDS = 5.0  # for last messages, once the engine has stopped


class EngineFailedError(Exception):
    """The engine died while it served."""


def listen(service: Service) -> tuple[grpc.aio.Server, str]:
    """A server that is bound to the config's address, but not started; and that address. Raises OSError."""
    server = grpc.aio.server(options=_options(service.config))
    _add_methods(server, service)
    host = f"[{service.config.host}]" if ":" in service.config.host else service.config.host
    try:
        port = server.add_insecure_port(f"{host}:{service.config.port}")
    except RuntimeError as error:
        raise OSError(f"cannot listen on {host}:{service.config.port}: {error}") from error
    return server, f"{host}:{port}"


def _options(config: ServerConfig) -> tuple[tuple[str, int], ...]:
    """gRPC's own limits lie beyond those of the server, which says why it refuses something."""
    return (
        ("grpc.so_reuseport", 0),  # or a second server could take half of the first one's calls
        ("grpc.max_receive_message_length", 4 * config.max_message_bytes),
        ("grpc.max_concurrent_streams", 4 * config.max_client_calls),
        ("grpc.server.max_pending_requests", MAX_ARRIVALS),
        ("grpc.server.max_pending_requests_hard_limit", 2 * MAX_ARRIVALS),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", 2 * MAX_METADATA_BYTES),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # none: a few bytes could become any number
    )


def _add_methods(server: grpc.aio.Server, service: Service) -> None:
    def large(behave: Behaviour) -> Method:
        return Method(behave, service.config.max_message_bytes, service.inference)

    def small(behave: Behaviour) -> Method:
        return Method(behave, MAX_CONTROL_BYTES, service.control)

    inference, control = InferenceServicer(service), ControlServicer(service)
    health = Health(SERVICES, lambda: service.state == "SERVING")
    reflection = Reflection((*SERVICES, full_name(health_pb2)))
    methods = {
        pb: {
            "Generate": large(inference.generate)._replace(ended=service.metrics.count_request),
            "Tokenize": large(inference.tokenize),
            "Detokenize": large(inference.detokenize),
        },
        control_pb: {
            "GetModelInfo": small(control.get_model_info),
            "GetServerInfo": small(control.get_server_info),
            "GetLoad": small(control.get_load),
            "Abort": small(control.abort),
            "SetPolicy": small(control.set_policy),
        },
        health_pb2: {"Check": small(health.check), "Watch": small(health.watch)},
        reflection_pb2: {"ServerReflectionInfo": small(reflection.info)},
    }
    for module, named in methods.items():
        add_service(server, module, named)


async def shut_down(server: grpc.aio.Server, service: Service, timeout: float) -> None:
    """Drain, let the calls that are left write their last messages, and close."""
    await service.drain(timeout)
    deadline = time.monotonic() + _FLUSH_SECONDS
    while not service.is_idle and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    service.end_calls()
    while not (service.inference.is_empty and service.control.is_empty) and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    await server.stop(grace=0.2)  # only readers that stopped reading are left


async def serve(config: ServerConfig, load: Loader, announce: Callable[[str], None] = print) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal cuts the drain short.

    Raises what kept the engine from starting, and EngineFailedError when it dies, once everybody is told.
    """
    service = Service(config)
    server, address = listen(service)
    # The processes import what they need while the engine starts.
    in_process = config.engine_in_process or config.explain or not config.readers
    pool = None if in_process else ReaderPool(size=config.readers, seconds=config.read_timeout)
    stop_metrics = _serve_metrics(service)
    stop = _on_signals(service)

    await server.start()
    try:
        loading = _in_thread(functools.partial(load, config, service.metrics.observe_step))
        signalled = asyncio.ensure_future(stop.wait())
        await asyncio.wait({loading, signalled}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            served = loading.result()
            if pool is not None:
                await pool.begin(begin(served.model, config.model, config.read_memory_mb << 20))
            service.serve(served, pool)
            if config.explain:
                announce(served.platform.summary)
                return
            print(served.platform.summary, file=STDERR, flush=True)
            announce(f"taper-serve ready on {address}")
        await _until_failed(service, signalled)
        log.info("draining", seconds=config.drain_timeout)
    finally:
        await shut_down(server, service, config.drain_timeout)
        if pool is not None:
            await pool.close()
        stop_metrics()
    if service.state == "FAILED":
        raise EngineFailedError(f"the engine failed while it drained: {service.failure}")


def run(config: ServerConfig, load: Loader) -> None:
    """`serve` in a process of its own: returns after a drain, raises what kept it from starting."""
    log_to_stderr()
    try:
        asyncio.run(serve(config, load, functools.partial(print, flush=True)))
    finally:
        STDERR.drain()
    if any(thread.name == _LOADER and thread.is_alive() for thread in threading.enumerate()):
        os._exit(0)  # a compilation cannot be interrupted, and crashes under an interpreter that finalizes


async def _until_failed(service: Service, signalled: asyncio.Task[Any]) -> None:
    """Until a signal comes. Raises EngineFailedError if the engine dies before."""
    while not signalled.done():
        if service.state == "FAILED":
            raise EngineFailedError(f"the engine failed: {service.failure}")
        await asyncio.wait({signalled}, timeout=_LOOK_SECONDS)


def _serve_metrics(service: Service) -> Callable[[], None]:
    if service.config.metrics_port is None:
        return lambda: None
    port, stop = service.metrics.listen(service.config.metrics_port)
    log.info("metrics", url=f"http://127.0.0.1:{port}/metrics")
    return stop


def _on_signals(service: Service) -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT."""
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            service.halt()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stop


def _in_thread(work: Callable[[], Served]) -> asyncio.Future[Served]:
    """Like asyncio.to_thread, but the process may end before the work does."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Served] = loop.create_future()

    def settle(set_outcome: Callable[[Any], None], outcome: Any) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(lambda: None if future.done() else set_outcome(outcome))

    def target() -> None:
        try:
            settle(future.set_result, work())
        except BaseException as error:
            settle(future.set_exception, error)

    threading.Thread(target=target, name=_LOADER, daemon=True).start()
    return future
