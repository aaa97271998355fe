"""What the tests of devices and of groups share: the table of `benchmarks/`.

The table trains every deterministic method in every device setting. One method of each
kind is enough to see that a setting gives the numbers of one device, and one setting
that a method does; the rest of the product is behind the marker `slow`.
"""

import functools
import importlib.util
import pathlib

import jax
import pytest

PATH = pathlib.Path(__file__).parent.parent / "benchmarks" / "device_table.py"


def load_table():
    spec = importlib.util.spec_from_file_location("device_table", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


table = load_table()
# A carried average, a descent that compares the two gradients, and a cadence.
KINDS = ("fsam", "gsam", "look_sam")
REST = tuple(name for name in table.METHODS if name not in KINDS)
ALL = KINDS + REST

one_and_per_group = pytest.mark.parametrize(
    "per_group", [False, True], ids=["one", "per_group"]
)


@functools.cache
def reference(per_group, methods):
    """Parameters by method, from one device."""
    (params,) = table.one_device(methods, per_group, "vmap")
    return params


def assert_like_one_device(replicas, per_group, methods=KINDS):
    for method in methods:
        own = [replica[method] for replica in replicas]
        expected = reference(per_group, methods)[method]
        assert table.difference(own[0], expected) <= 1e-10, method
        assert table.are_equal(own), method


def trained_with_groups_of(m, methods=KINDS):
    start, step = table.make_step(methods, m=m, map_groups="vmap")
    return table.train(jax.jit(step), start(table.make_params()))
