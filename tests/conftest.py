"""Shared fixtures: the table of methods, and each method behind each door."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    # LLVM's own optimizations take a fifth of the suite's time: XLA's are before it.
    " --xla_backend_optimization_level=0"
)

import hypothesis
import pytest

from doors import DOORS
from lab import lab
from methods import BOTH_DOORS, TABLE

hypothesis.settings.register_profile(
    "suite", deadline=None, max_examples=25, derandomize=True, database=None
)
hypothesis.settings.load_profile("suite")


@pytest.fixture(params=DOORS)
def door(request):
    return DOORS[request.param]


@pytest.fixture(params=TABLE)
def row(request):
    return TABLE[request.param]


BENCHES = [
    (name, door)
    for name in TABLE
    for door in DOORS
    if door == "door1" or name in BOTH_DOORS
]


@pytest.fixture(params=BENCHES, ids="-".join)
def bench(request):
    """One method behind one door, with its compiled steps."""
    return lab(*request.param)
