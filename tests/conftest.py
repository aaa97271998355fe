"""Settings that come before the first import of jax, and fixtures that many use."""

import atexit
import os
import pathlib
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    # LLVM's own optimizations take a fifth of the suite's time: XLA's are before it.
    " --xla_backend_optimization_level=0"
    # On a busy machine, a simulated device may wait long for the others. XLA would end
    # the process after 40 seconds.
    " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # The workers, which inherit this, and the scripts that tests start compile most
    # programs once between them.
    _cache = tempfile.mkdtemp(prefix="sam_optax-tests-")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import hypothesis
import jax
import pytest

from methods import FAST, FIRST, KINDS, TABLE

hypothesis.settings.register_profile(
    "suite", deadline=None, max_examples=25, derandomize=True, database=None
)
hypothesis.settings.load_profile("suite")


def slow_but_for(some, names):
    return [
        pytest.param(name, marks=() if name in some else pytest.mark.slow)
        for name in names
    ]


ROWS = slow_but_for(FAST, TABLE)
ONE_OF_EACH_KIND = slow_but_for(KINDS, dict.fromkeys((*KINDS, *FIRST)))


@pytest.fixture(params=ROWS, scope="module")
def name(request):
    """Every row of the table, most with -m slow: for what a method could get wrong."""
    return request.param


@pytest.fixture(params=ONE_OF_EACH_KIND, scope="module")
def kind(request):
    """One row of each kind, and of each method with -m slow: for what the core does."""
    return request.param


def pytest_collection_modifyitems(items):
    items[:] = [
        item
        for item in items
        if not (
            item.get_closest_marker("gradients_alone")
            and TABLE[item.callspec.params["kind"]].needs_loss
        )
    ]


@pytest.fixture(scope="module", autouse=True)
def few_compiled_programs():
    """Forgets compiled programs when there are many.

    Each takes several memory maps. Linux lets a process have 65,530 of them, and XLA
    aborts the process when it gets no more. Programs that are used again come from the
    compilation cache.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()


@pytest.fixture
def double_precision():
    with jax.enable_x64(True):
        yield
