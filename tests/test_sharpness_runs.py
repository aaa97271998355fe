"""Measures over devices, in bounded memory, and inside of JAX's transformations."""

import dataclasses
import functools
import gc
import re
import weakref
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lab import assert_trees_close
from sam_optax import sharpness
from sharpness_problem import (
    INPUTS,
    Rows,
    loss_fn,
    matrix,
    network,
    squared_error,
)

pytestmark = pytest.mark.usefixtures("double_precision")

W, X = np.ones(2), np.ones((4, 2))


def spread(mesh, params, data):
    rows = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.device_put(params, whole), jax.device_put(data, rows)


@pytest.mark.parametrize("batch_size", [pytest.param(8, marks=pytest.mark.slow), 7])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_over_devices_measures_are_those_of_one(axis_type, batch_size):
    params, data = network()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))

    # Several groups at once where they fill the devices, else one by one.
    groups = {8: {"m": 4, "batch_size": 8}, 7: {"m": 3, "batch_size": 24}}[batch_size]

    @jax.jit
    def measure(params, data):
        H = sharpness.hessian(loss_fn, params, data, batch_size=batch_size)
        gap = functools.partial(sharpness.surrogate_gap, loss_fn, rho=0.1)
        return (
            sharpness.eigenpairs(H, 2).values,
            gap(params, data, **groups),
            gap(params, data),
        )

    one = measure(params, data)
    with jax.set_mesh(mesh):
        many = measure(*spread(mesh, params, data))
    assert_trees_close(many, one, rtol=1e-9, atol=1e-12)


def test_examples_stay_on_the_devices_that_hold_them():
    params, data = network()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params, data = spread(mesh, params, data)

    @jax.jit
    def multiply(params, data):
        return sharpness.hessian(loss_fn, params, data, batch_size=8)(params)

    text = multiply.lower(params, data).compile().as_text()
    collectives = set(re.findall(r"(all-\w+|collective-\w+|reduce-scatter)\(", text))
    assert collectives == {"all-reduce"}


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_parameters_spread_over_devices_have_the_same_sharpness(axis_type):
    params, data = network()
    mesh = jax.make_mesh((8,), ("model",), axis_types=(axis_type,))
    layout = {"a": PartitionSpec(None, "model"), "b": PartitionSpec("model")}
    layout["c"] = PartitionSpec("model")
    sharded = jax.device_put(
        params, {name: NamedSharding(mesh, spec) for name, spec in layout.items()}
    )

    def spread_loss(params, x, y):
        out = PartitionSpec() if axis_type is AxisType.Explicit else None
        hidden = jnp.tanh(x @ params["a"] + params["b"])
        return squared_error(jnp.matmul(hidden, params["c"], out_sharding=out), x, y)

    def measure(params):
        return (
            sharpness.eigenpairs(
                sharpness.hessian(spread_loss, params, data), 2
            ).values,
            sharpness.worst_case(spread_loss, params, data, rho=0.1, steps=3),
            sharpness.average_case(spread_loss, params, data, rho=0.1, samples=3),
        )

    one = [
        sharpness.eigenpairs(matrix("hessian"), 2).values,
        sharpness.worst_case(loss_fn, params, data, rho=0.1, steps=3),
        sharpness.average_case(loss_fn, params, data, rho=0.1, samples=3),
    ]
    with jax.set_mesh(mesh):
        many = measure(sharded)
    assert_trees_close(list(many), one, rtol=1e-9, atol=1e-12)
    assert many[1].perturbation["a"].sharding == sharded["a"].sharding


def test_memory_does_not_grow_with_the_data():
    params, _ = network()

    def temporary_bytes(examples):
        x = jnp.zeros((examples, INPUTS)), jnp.zeros(examples)

        def measure(params, data):
            H = sharpness.hessian(loss_fn, params, data, batch_size=8)
            gap = sharpness.surrogate_gap(loss_fn, params, data, rho=0.1, batch_size=8)
            return H(params), gap

        compiled = jax.jit(measure).lower(params, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8 * 4096) <= temporary_bytes(8 * 4) + 256


def test_streamed_batches_are_read_when_they_are_needed():
    rows = Rows([np.full((2, 1), i, np.float32) for i in range(3)])
    data = sharpness.stream(rows)
    rows.read.clear()
    norm = sharpness.gradient_norm(lambda w, x: (w * x).mean(), 1.0, data)
    assert float(norm) == 1
    assert sorted(rows.read) == [0, 1, 2]


def test_half_precision_parameters_are_measured_in_float32():
    params, data = network()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    data = jax.tree.map(lambda x: x.astype(jnp.float32), data)
    small = functools.partial(sharpness.surrogate_gap, loss_fn, rho=1e-3)
    assert_trees_close(small(half, data), small(wide, data))
    assert small(half, data).sharpness > 0
    pairs = sharpness.eigenpairs(sharpness.hessian(loss_fn, half, data))
    assert pairs.values.dtype == pairs.vectors["a"].dtype == jnp.float32


def test_measures_of_several_solutions_under_vmap():
    params, data = network()
    several = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), params)

    def measure(params):
        worst = sharpness.worst_case(loss_fn, params, data, rho=0.1, steps=2)
        return worst.sharpness, sharpness.gradient_norm(loss_fn, params, data)

    together = jax.jit(jax.vmap(measure))(several)
    for i in range(2):
        alone = measure(jax.tree.map(lambda w, i=i: w[i], several))
        assert_trees_close([x[i] for x in together], list(alone), rtol=1e-9)


def test_parameters_may_be_constants_of_a_jitted_function():
    params, data = network()
    norm = jax.jit(lambda x, y: sharpness.gradient_norm(loss_fn, params, (x, y)))(*data)
    expected = sharpness.gradient_norm(loss_fn, params, data)
    assert float(norm) == pytest.approx(float(expected), rel=1e-12)


def test_arrays_that_a_function_holds_are_arguments():
    """And such a function need not be hashable."""
    traces = []

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass  # unhashable, like a module of Equinox
    class Scaled:
        scale: jax.Array

        def __call__(self, w, x):
            traces.append(1)
            return self.scale * jnp.mean((x @ w) ** 2)

    norms = []
    for scale in (1.0, 3.0):
        loss = Scaled(jnp.asarray(scale))
        norms.append(float(sharpness.gradient_norm(loss, W, X)))
        trace = sharpness.trace(sharpness.hessian(loss, W, X), num_samples=2)
        norms.append(float(trace.mean))
        if scale == 1:
            first = len(traces)
    assert norms[2:] == pytest.approx([3 * norm for norm in norms[:2]])
    assert len(traces) == first


def test_a_stream_shares_programs_and_is_not_kept():
    traces = []

    def counted(w, x):
        traces.append(1)
        return (w * x).mean()

    for count in (1, 2):
        batches = Rows([np.full((2, 1), count, np.float32)] * 3)
        norm = sharpness.gradient_norm(counted, 1.0, sharpness.stream(batches))
        assert float(norm) == count
        if count == 1:
            first = len(traces)
    assert len(traces) == first
    watch = weakref.ref(batches)
    del batches
    gc.collect()
    assert watch() is None


def test_an_error_while_reading_is_raised_on_all_devices():
    def fail():
        raise OSError("disk gone")

    batches = Rows([np.ones((2, 1), np.float32), fail, np.ones((2, 1), np.float32)])
    data = sharpness.stream(batches)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    w = jax.device_put(jnp.ones(()), NamedSharding(mesh, PartitionSpec()))
    with pytest.raises(OSError, match="disk gone"):
        sharpness.gradient_norm(lambda w, x: (w * x).mean(), w, data)
    batches.items[1] = batches.items[0]
    assert sharpness.gradient_norm(lambda w, x: (w * x).mean(), w, data) == 1


class Batch(NamedTuple):
    x: np.ndarray
    y: np.ndarray


def test_a_named_tuple_is_one_argument():
    def loss(w, batch):
        return jnp.mean(w * batch.x + 0 * batch.y)

    batch = Batch(np.ones(4, np.float32), np.ones(4, np.float32))
    assert sharpness.gradient_norm(loss, 1.0, batch) == 1
    assert sharpness.gradient_norm(loss, 1.0, sharpness.stream([batch, batch])) == 1


T = np.array([0.0, 1.0])
MEASURES = {
    "surrogate_gap": lambda loss, w: sharpness.surrogate_gap(loss, w, X, rho=0.1),
    "worst_case": lambda loss, w: sharpness.worst_case(loss, w, X, rho=0.1, steps=2),
    "average_case": lambda loss, w: sharpness.average_case(loss, w, X, rho=0.1),
    "fisher_trace": lambda loss, w: sharpness.fisher_trace(loss, w, X),
    "eigenpairs": lambda loss, w: sharpness.eigenpairs(sharpness.hessian(loss, w, X)),
    "trace": lambda loss, w: sharpness.trace(sharpness.hessian(loss, w, X)),
    "density": lambda loss, w: sharpness.spectral_density(
        sharpness.empirical_fisher(loss, w, X)
    ),
    "line": lambda loss, w: sharpness.along_line(loss, w, X, W, T),
    "plane": lambda loss, w: sharpness.over_plane(loss, w, X, (W, -W * T), T, T),
    "direction": lambda loss, w: sharpness.gradient_direction(loss, w, X),
}


@pytest.mark.parametrize("name", MEASURES)
def test_no_measure_traces_the_loss_again_for_another_solution(name):
    traces = []

    def loss(w, x):
        traces.append(1)
        return jnp.mean((x @ w) ** 4)

    MEASURES[name](loss, W)
    first = len(traces)
    MEASURES[name](loss, 2 * W)
    assert len(traces) == first > 0


def test_a_measure_is_compiled_once_for_many_solutions():
    params, data = network()
    traces = []

    def counted(params, x, y):
        traces.append(1)
        return loss_fn(params, x, y)

    sharpness.gradient_norm(counted, params, data)
    first = len(traces)
    sharpness.gradient_norm(counted, jax.tree.map(jnp.zeros_like, params), data)
    assert len(traces) == first
    sharpness.hessian(counted, params, data)(params)
    second = len(traces)
    sharpness.hessian(counted, jax.tree.map(jnp.zeros_like, params), data)(params)
    assert len(traces) == second
