"""Shared fixtures: the table of methods, and each method behind each door."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import hypothesis
import pytest

from doors import DOORS
from lab import lab
from methods import TABLE

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


# Door 1 ends in the update that door 2 is, so one method of each kind is enough to see
# that the contracts hold behind both; that the doors agree is a test over all rows.
BOTH_DOORS = {"sam", "asam", "fsam", "gsam", "look_sam", "esam"}
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
