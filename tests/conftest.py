"""What all tests share: one cache of compiled programs, float64, and the golden checkpoints.

Nothing heavy is imported here: the tests of the scheduler and of the wire do without JAX (`make test-fast`).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from bench.tpu.topology import ENVIRONMENT, installed
from tests.absent import DEVICE, keep_away

pytest_plugins = ["tests.cpu_seconds"]

# For the tests of several devices; before any other conftest imports JAX.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Where there is a libtpu it compiles, and looks for no TPU.
if installed():
    os.environ.update({**ENVIRONMENT, **os.environ})

# Newer versions do not know these flags, and end the process. With them, XLA compiles for CPUs in little more
# than half the time; results are rounded elsewhere.
if version("jaxlib").startswith("0.10."):
    QUICK = "--xla_cpu_use_fusion_emitters=false --xla_llvm_force_inline_before_split=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()

# How long an example takes, or is drawn, says how busy the machine is.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

CACHE = "JAX_COMPILATION_CACHE_DIR"
MADE = pytest.StashKey[str]()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """JAX keeps what it compiles in one folder a run, for all workers and the processes that tests start.

    Whoever sets `JAX_COMPILATION_CACHE_DIR` keeps it from run to run.
    """
    if CACHE not in os.environ:
        config.stash[MADE] = os.environ[CACHE] = tempfile.mkdtemp(prefix="compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    if config.getoption("--without-jax"):
        keep_away(*DEVICE)


# Whose files take seconds each: they come last, and fill what a long file leaves of another worker's time.
SHORT = tuple(
    f"tests/{name}/"
    for name in ("deploy", "docs", "scheduler", "serve/client", "serve/reading", "serve/text")
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.nodeid.startswith(SHORT))


def pytest_report_header() -> str:
    return (
        f"libtpu: {version('libtpu')}" if installed() else "libtpu: none, so that tests/tpu is not collected"
    )


def pytest_unconfigure(config: pytest.Config) -> None:
    if MADE in config.stash:
        shutil.rmtree(config.stash[MADE], ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-goldens",
        action="store_true",
        help="oracle tests write what transformers computes to tests/model/goldens",
    )
    parser.addoption(
        "--without-jax",
        action="store_true",
        help="whoever imports JAX or what is made for it fails: how the scheduler and the wire are tested",
    )
    parser.addoption(
        "--questions", type=int, default=16, help="how many held-out questions the default model is asked"
    )
    parser.addoption("--pictures", help="folder to which the pictures of the docs are written")
    parser.addoption("--soak-requests", type=int, default=5000, help="calls of the long soak")
    parser.addoption("--soak-seconds", type=float, default=600.0, help="how long it takes")


@pytest.fixture(scope="session")
def compiled() -> str:
    """The folder of what this run has compiled, for servers that are told where to keep their programs."""
    return os.environ[CACHE]


@pytest.fixture(scope="module")
def quick_compiler() -> Iterator[None]:
    """For modules whose programs are small: their tests and fixtures compile with few optimizations."""
    from tests.compiling import compiled_quickly

    with compiled_quickly():
        yield


@pytest.fixture
def x64() -> Iterator[None]:
    """float64 means float64 inside the test."""
    import jax

    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def golden_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes a checkpoint of tests/model/checkpoints.py, once, and gives its folder."""
    from tests.model.checkpoints import CHECKPOINTS

    root = tmp_path_factory.mktemp("goldens")

    def folder(name: str) -> Path:
        path = root / name
        return path if path.exists() else CHECKPOINTS[name].write(path)

    return folder
