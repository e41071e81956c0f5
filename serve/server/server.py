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

import structlog

from serve.config import ServerConfig, naming
from serve.logs import STDERR, log_loop, log_to_stderr, say
from serve.logs.bugs import OperatorError
from serve.reading.frames import begin
from serve.reading.pool import ReaderPool
from serve.served import Loader, Served
from serve.server import scraping, status
from serve.server.exposure import warn_of_exposure, warn_of_open_gateway
from serve.server.ports import Ports
from serve.server.service import Service
from serve.server.tls import Certificates, certificates_of

log = structlog.get_logger("taper")

_LOADER = "taper-load"
_LOOK_SECONDS = 0.1  # between two looks at whether the engine has died
_FLUSH_SECONDS = 5.0  # for last messages, once the engine has stopped
_NOTICE_SECONDS = 0.5  # that calls are refused before the ports close: clients hear of the drain meanwhile
_CLOSE_SECONDS = 2.0  # for what came at the last moment to be refused, and for readers that do not read


class EngineFailedError(OperatorError):
    """The engine died while it served."""


async def shut_down(ports: Ports, service: Service, timeout: float, *, notice: float = 0.0) -> None:
    """Drain, let the calls that are left write their last messages, and close.

    Calls are refused for `notice` seconds at least, where a client can have them answered elsewhere: what it
    sends to a server that is closed may end as CANCELLED, which gRPC does not try again.
    """
    closing = time.monotonic() + notice
    await service.drain(timeout)
    await asyncio.sleep(max(0.0, closing - time.monotonic()))
    deadline = time.monotonic() + _FLUSH_SECONDS
    while not service.is_idle and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    service.end_calls()
    while not (service.inference.is_empty and service.control.is_empty) and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    await ports.stop(_CLOSE_SECONDS)
    service.end_log()


async def serve(config: ServerConfig, load: Loader, announce: Callable[[str], None] = print) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal cuts the drain short.

    Raises what kept the engine from starting, and EngineFailedError when it dies, once everybody is told.
    """
    log_loop()
    service = Service(config)
    certificates = certificates_of(config)
    _warn_of_exposure(config)
    ports = Ports(service, certificates)
    # The processes import what they need while the engine starts.
    in_process = config.engine_in_process or config.explain or not config.readers
    pool = None if in_process else ReaderPool(size=config.readers, seconds=config.read_timeout)
    stop_metrics = _serve_metrics(service, certificates)
    stop = _on_signals(service)

    notice = 0.0  # nobody is sent here before it serves
    await ports.start()
    try:
        loading = _in_thread(functools.partial(load, config, service.observe_step))
        signalled = asyncio.ensure_future(stop.wait())
        await asyncio.wait({loading, signalled}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            served = loading.result()
            if pool is not None:
                await pool.begin(begin(served.model, config))
            service.serve(served, pool)
            if config.explain:
                announce(served.platform.summary)
                return
            say(served.platform.summary)
            if ports.control != ports.address:
                log.info("operators", address=ports.control)
            if ports.gateway is not None:
                log.info("gateways", address=ports.gateway)
            notice = _NOTICE_SECONDS
            announce(f"taper-serve ready on {ports.address}")
        await _until_failed(service, signalled)
        log.info("draining", seconds=config.drain_timeout)
    finally:
        await shut_down(ports, service, config.drain_timeout, notice=notice)
        if pool is not None:
            await pool.close()
        stop_metrics()
    if service.state == "FAILED":
        raise EngineFailedError(f"the engine failed while it drained: {service.failure}")


def run(config: ServerConfig, load: Loader) -> None:
    """`serve` in a process of its own: returns after a drain, raises what kept it from starting."""
    log_to_stderr(config.log_format, config.log_level)
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


def _warn_of_exposure(config: ServerConfig) -> None:
    hosts = [
        host
        for host, port in (
            (config.host, config.port),
            (config.control_host, config.control_port),
            (config.metrics_host, config.metrics_port),
        )
        if port is not None
    ]
    warn_of_exposure(
        hosts,
        encrypted=config.tls_cert_path is not None,
        tokens=config.tokens is not None,
        client_certificates=config.tls_client_ca_cert_path is not None,
    )
    if config.gateway_port is not None:
        warn_of_open_gateway(config.gateway_host)


def pages(service: Service) -> scraping.Pages:
    """What operators see by HTTP."""
    return {
        "/": status.page,
        "/status.json": lambda _: status.state_page(service.told()),
        "/metrics": scraping.metrics_page(service.metrics.registry),
    }


def _serve_metrics(service: Service, certificates: Certificates | None) -> Callable[[], None]:
    config = service.config
    if config.metrics_port is None:
        return lambda: None
    authorize = functools.partial(service.callers.check, roles={"metrics"})
    with naming("metrics_port"):
        url, stop = scraping.listen(
            config.metrics_host, config.metrics_port, pages(service), authorize, certificates
        )
    log.info("metrics", url=f"{url}/metrics")
    log.info("status page", url=f"{url}/")
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
