"""The measures of sharpness against dense matrices, brute force and closed forms."""

import dataclasses
import functools
import gc
import re
import weakref
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import sam_optax
from lab import assert_trees_close
from sam_optax import sharpness

EXAMPLES, INPUTS = 24, 6


def model(params, x, y):
    return jnp.tanh(x @ params["a"] + params["b"]) @ params["c"]


def squared_error(outputs, x, y):
    return jnp.mean((outputs - y) ** 2)


def loss_fn(params, x, y):
    return squared_error(model(params, x, y), x, y)


def bowl(w, x):
    """A quadratic with Hessian diag(2 mean(x²))."""
    return jnp.mean((x @ jnp.diag(w)) ** 2) * x.shape[1]


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@functools.cache
def network():
    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        "a": jax.random.normal(keys[0], (INPUTS, 8)),
        "b": jax.random.normal(keys[1], (8,)),
        "c": jax.random.normal(keys[2], (8,)),
    }
    x = jax.random.normal(keys[3], (EXAMPLES, INPUTS), jnp.float32)
    y = jax.random.normal(keys[4], (EXAMPLES,), jnp.float32)
    return params, (x.astype(jnp.float64), y.astype(jnp.float64))


class Rows:
    """A sequence that notes what is read; an item that is a function is called."""

    def __init__(self, items):
        self.items, self.read = items, []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.read.append(index)
        item = self.items[index]
        return item() if callable(item) else item


def in_batches(data, size):
    """As a user's data on disk: read by index, in NumPy.

    In float32, which holds them all: JAX runs callbacks in threads of its own, where a
    local `jax.enable_x64` does not reach.
    """
    return sharpness.stream(
        [
            tuple(np.asarray(x[start : start + size], np.float32) for x in data)
            for start in range(0, EXAMPLES, size)
        ]
    )


@functools.cache
def dense(kind):
    """The matrix, formed."""
    params, (x, y) = network()
    flat, unravel = ravel_pytree(params)

    def each(w):
        return jax.vmap(lambda x, y: loss_fn(unravel(w), x[None], y[None]))(x, y)

    if kind == "hessian":
        return np.asarray(jax.hessian(lambda w: loss_fn(unravel(w), x, y))(flat))
    if kind == "gauss_newton":
        jacobian = jax.jacobian(lambda w: model(unravel(w), x, y))(flat)
        return np.asarray(2 / EXAMPLES * jacobian.T @ jacobian)
    gradients = jax.jacobian(each)(flat)
    return np.asarray(gradients.T @ gradients / EXAMPLES)


def matrix(kind, data=None, batch_size=None):
    params, whole = network()
    data = whole if data is None else data
    if kind == "gauss_newton":
        return sharpness.gauss_newton(
            model, squared_error, params, data, batch_size=batch_size
        )
    return getattr(sharpness, kind)(loss_fn, params, data, batch_size=batch_size)


# --- Matrices and their spectra.


@pytest.mark.parametrize(
    ("kind", "batches"),
    [("hessian", batches) for batches in (None, 8, 7, 100, "streamed")]
    + [("gauss_newton", 8), ("gauss_newton", 7), ("empirical_fisher", 7)],
)
def test_products_are_those_of_the_dense_matrix_however_the_data_are_cut(kind, batches):
    params, data = network()
    if batches == "streamed":
        product = matrix(kind, in_batches(data, 7))
    else:
        product = matrix(kind, batch_size=batches)
    v = jax.tree.map(lambda w: jnp.cos(jnp.arange(w.size)).reshape(w.shape), params)
    np.testing.assert_allclose(
        ravel_pytree(product(v))[0],
        dense(kind) @ np.asarray(ravel_pytree(v)[0]),
        rtol=1e-11,
        atol=1e-12,
    )


@pytest.mark.parametrize(
    ("kind", "which"),
    [("hessian", "largest"), ("hessian", "smallest"), ("gauss_newton", "largest")],
)
def test_eigenpairs_are_those_of_the_dense_matrix(kind, which):
    values, vectors = np.linalg.eigh(dense(kind))
    order = np.argsort(values)[:5] if which == "smallest" else np.argsort(-values)[:5]
    pairs = sharpness.eigenpairs(matrix(kind, batch_size=8), 5, which=which)
    scale = np.abs(values).max()
    np.testing.assert_allclose(
        pairs.values, values[order], rtol=1e-6, atol=1e-9 * scale
    )
    assert pairs.residuals.max() < 1e-4 * scale
    if kind == "hessian":  # whose eigenvalues are simple
        found = np.stack([ravel_pytree(pairs.vector(i))[0] for i in range(5)])
        cosines = np.sum(found * vectors[:, order].T, axis=1)
        np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-6)


def test_residuals_say_how_far_an_eigenvalue_can_be():
    values = np.linalg.eigvalsh(dense("hessian"))
    pairs = sharpness.eigenpairs(matrix("hessian"), 5, num_matvecs=8)
    distances = np.abs(np.asarray(pairs.values)[:, None] - values).min(axis=1)
    assert np.all(distances <= pairs.residuals + 1e-12)
    assert distances.max() > 1e-6  # 8 products are not enough
    v = ravel_pytree(pairs.vector(4))[0]
    rest = np.linalg.norm(dense("hessian") @ v - pairs.values[4] * v)
    assert rest == pytest.approx(float(pairs.residuals[4]), rel=1e-6)


def test_residuals_count_rounding():
    """In float32, the smallest of a wide spectrum has hardly a digit."""
    diagonal = jnp.concatenate([jnp.array([1e6]), jnp.linspace(0.1, 1, 29)])
    H = sharpness.hessian(
        lambda w, d: jnp.sum(d * w**2) / 2,
        jnp.ones(30, jnp.float32),
        diagonal.astype(jnp.float32),
    )
    pairs = sharpness.eigenpairs(H, 3, which="smallest")
    distances = np.abs(np.asarray(pairs.values)[:, None] - diagonal).min(axis=1)
    assert np.all(distances <= pairs.residuals)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("factor", [1.0, 0.0, 1e-25])
def test_lanczos_goes_on_where_it_would_divide_by_zero(dtype, factor):
    """Every start lies in an invariant subspace of a multiple of the identity."""
    x = jnp.full((2, 1), factor, dtype)
    H = sharpness.hessian(
        lambda w, x: jnp.mean(x) * jnp.sum(w**2), jnp.ones(6, dtype), x
    )
    pairs = sharpness.eigenpairs(H, 3)
    tolerance = 1e-5 if dtype == np.float32 else 1e-13
    np.testing.assert_allclose(pairs.values, 2 * factor, rtol=tolerance)
    np.testing.assert_allclose(
        pairs.vectors @ pairs.vectors.T, np.eye(3), atol=tolerance
    )
    moment = sharpness.spectral_density(H, num_samples=1).moment(1)
    assert float(moment) == pytest.approx(2 * factor, rel=tolerance)


def test_trace_is_within_three_standard_errors_which_are_right():
    H = dense("hessian")
    samples = 200
    estimate = sharpness.trace(matrix("hessian", batch_size=8), num_samples=samples)
    assert abs(estimate.mean - np.trace(H)) < 3 * estimate.standard_error
    off_diagonal = H - np.diag(np.diag(H))
    expected = np.sqrt(2 * np.sum(off_diagonal**2) / samples)
    assert float(estimate.standard_error) == pytest.approx(expected, rel=0.3)


def test_the_moments_of_the_density_are_those_of_the_spectrum():
    values = np.linalg.eigvalsh(dense("hessian"))
    samples = 60
    density = sharpness.spectral_density(
        matrix("hessian"), num_matvecs=12, num_samples=samples
    )
    for power in range(1, 7):
        each = np.sum(density.weights * density.nodes**power, axis=1)
        error = each.std(ddof=1) / np.sqrt(samples)
        exact = np.mean(values**power)
        assert abs(density.moment(power) - exact) < 3 * error
        assert error < 0.2 * abs(exact) or power == 1
    assert float(density.moment(0)) == pytest.approx(1)
    assert float(density.nodes.max()) == pytest.approx(values.max(), rel=1e-3)
    grid = np.linspace(values.min() - 1, values.max() + 1, 4001)
    curve = density.on_grid(grid, 0.1)
    assert float(np.trapezoid(curve, grid)) == pytest.approx(1, abs=1e-6)


def test_the_moments_of_one_random_vector_are_exact():
    """v'Aᵏv for the signs v, up to the power that quadrature with 6 nodes reaches."""
    # With a diagonal matrix every vector of signs gives the trace.
    w = jnp.arange(1.0, 21.0)
    H = sharpness.hessian(lambda w, x: jnp.sum(w**4) * x.mean(), w, jnp.ones((1, 1)))
    density = sharpness.spectral_density(H, num_matvecs=6, num_samples=1)
    for power in range(12):
        exact = np.mean((12 * np.asarray(w) ** 2) ** power)
        assert float(density.moment(power)) == pytest.approx(exact, rel=1e-9)
    exact = np.mean((12 * np.asarray(w) ** 2) ** 12)
    assert float(density.moment(12)) != pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        (lambda A: sharpness.eigenpairs(A, 2, num_matvecs=7), 8),
        (lambda A: sharpness.trace(A, num_samples=5), 5),
        (lambda A: sharpness.spectral_density(A, num_matvecs=6, num_samples=3), 21),
    ],
    ids=["eigenpairs", "trace", "spectral_density"],
)
def test_the_number_of_products_is_what_the_method_says(measure, expected):
    products = []

    def product(params, v, x):
        jax.debug.callback(lambda: products.append(1))
        return 2 * v * x.mean()

    data, batches = (jnp.ones((6, 1)),), 3
    product = jax.tree_util.Partial(product)
    measure(sharpness.Matrix(jnp.ones(9), data, product, EXAMPLES // 12))
    jax.effects_barrier()
    assert len(products) == expected * batches


def test_gradient_norm_and_fisher_trace():
    params, data = network()
    expected = optax.tree.norm(jax.grad(loss_fn)(params, *data))
    for batch_size in (None, 7):
        norm = sharpness.gradient_norm(loss_fn, params, data, batch_size=batch_size)
        assert float(norm) == pytest.approx(float(expected), rel=1e-12)
        trace = sharpness.fisher_trace(loss_fn, params, data, batch_size=batch_size)
        fisher = np.trace(dense("empirical_fisher"))
        assert float(trace) == pytest.approx(fisher, rel=1e-12)


def test_a_loss_may_hold_a_module_that_has_a_dtype():
    @dataclasses.dataclass(frozen=True)
    class Layer:  # as those of Flax
        dtype: type = jnp.float32

        def apply(self, w, x):
            return x.astype(self.dtype) @ w

    def loss(layer, w, x):
        return layer.apply(w, x).mean()

    w, x = jnp.array([3.0, 4.0]), jnp.eye(2)
    held = jax.tree_util.Partial(loss, Layer())
    assert float(sharpness.gradient_norm(held, w, (x,))) == pytest.approx(0.5**0.5)


# --- In a ball.


def hills(w, x):
    """Two parameters, several maxima."""
    a, b = w
    return x.mean() * (jnp.sin(3 * a) + jnp.cos(2 * b) + 0.3 * a * b + 0.2 * a**2)


@functools.cache
def brute_force(norm, adaptive, rho):
    w = np.array([0.4, -1.5])
    radii, angles = np.meshgrid(np.linspace(0, 1, 401), np.linspace(0, 2 * np.pi, 2001))
    disc = np.stack([radii * np.cos(angles), radii * np.sin(angles)]).reshape(2, -1)
    square = np.stack(np.meshgrid(*[np.linspace(-1, 1, 801)] * 2)).reshape(2, -1)
    stretch = np.abs(w) if adaptive else np.ones(2)
    points = w[:, None] + rho * stretch[:, None] * (disc if norm == "l2" else square)
    heights = hills(points, np.ones(1))
    return w, float(heights.max() - hills(w, np.ones(1)))


@pytest.mark.parametrize("rho", [0.3, 1.5])
@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_worst_case_is_that_of_brute_force(norm, adaptive, rho):
    w, expected = brute_force(norm, adaptive, rho)
    worst = sharpness.worst_case(
        hills,
        jnp.asarray(w),
        jnp.ones(2),
        rho=rho,
        steps=60,
        restarts=10,
        norm=norm,
        adaptive=adaptive,
    )
    assert float(worst.sharpness) == pytest.approx(expected, rel=2e-4)
    delta = np.asarray(worst.perturbation) / (np.abs(w) if adaptive else 1)
    size = np.linalg.norm(delta) if norm == "l2" else np.abs(delta).max()
    assert size <= rho * (1 + 1e-12)
    assert float(worst.sharpness) == float(worst.perturbed_loss - worst.loss)
    at_the_point = hills(w + np.asarray(worst.perturbation), np.ones(1))
    assert float(worst.perturbed_loss) == pytest.approx(float(at_the_point), rel=1e-12)


def test_restarts_find_the_sharp_direction_of_a_minimum():
    x = jnp.diag(jnp.array([1.0, 2.0, 3.0]))
    measure = functools.partial(
        sharpness.worst_case, bowl, jnp.zeros(3), x, rho=0.1, steps=60
    )
    assert measure(restarts=1).sharpness == 0  # the gradient leads nowhere
    worst = measure(restarts=2)
    estimate = sharpness.eigenvalue_from_gap(worst.sharpness, 0.1)
    assert float(estimate) == pytest.approx(2 * 9 / 3, rel=1e-6)  # of bowl's Hessian


# One restart has no random start, which would differ from group to group.
SMALL_BALL = {
    "surrogate_gap": functools.partial(sharpness.surrogate_gap, loss_fn, rho=0.1),
    "worst_case": functools.partial(
        sharpness.worst_case, loss_fn, rho=0.1, steps=5, restarts=1
    ),
}


@pytest.mark.parametrize(
    ("name", "cut"),
    [("surrogate_gap", cut) for cut in ("one by one", "uneven", "streamed")]
    + [("worst_case", cut) for cut in ("two at once", "streamed")],
)
def test_m_sharpness_is_the_mean_over_groups(name, cut):
    params, data = network()
    m, measure = 4, SMALL_BALL[name]
    each = [
        measure(params, tuple(x[i : i + m] for x in data))
        for i in range(0, EXAMPLES, m)
    ]
    options = {"two at once": {"batch_size": 2 * m}, "uneven": {"batch_size": 5 * m}}
    source = in_batches(data, 2 * m) if cut == "streamed" else data
    mean = measure(params, source, m=m, **options.get(cut, {}))
    assert mean.perturbation is None
    for name in ("loss", "perturbed_loss", "sharpness"):
        expected = np.mean([getattr(group, name) for group in each])
        assert float(getattr(mean, name)) == pytest.approx(float(expected), rel=1e-10)
    assert mean.sharpness > 1.01 * measure(params, data).sharpness


@pytest.mark.parametrize("batches", [8, 7, "streamed"])
def test_measures_in_a_ball_do_not_depend_on_how_the_data_are_cut(batches):
    params, data = network()
    source = in_batches(data, 7) if batches == "streamed" else data
    batch_size = None if batches == "streamed" else batches
    for measure in (
        functools.partial(sharpness.surrogate_gap, rho=0.1),
        functools.partial(sharpness.worst_case, rho=0.1, norm="linf", steps=3),
        functools.partial(sharpness.average_case, rho=0.1, samples=3, adaptive=True),
    ):
        assert_trees_close(
            measure(loss_fn, params, source, batch_size=batch_size),
            measure(loss_fn, params, data),
            rtol=1e-9,
        )


def test_the_surrogate_gap_is_that_of_a_training_step():
    params, data = network()
    for make, adaptive in ((sam_optax.sam, False), (sam_optax.asam, True)):
        sam = make(rho=0.1, eta=0.0) if adaptive else make(rho=0.1)
        _, grads = sam_optax.sam_value_and_grad(loss_fn, sam, report=True)(
            params, *data, opt_state=sam.init(params)
        )
        gap = sharpness.surrogate_gap(loss_fn, params, data, rho=0.1, adaptive=adaptive)
        assert float(gap.sharpness) == pytest.approx(
            float(grads.report.surrogate_gap), rel=1e-9
        )
        norm = optax.tree.norm(gap.perturbation)
        assert float(norm) == pytest.approx(
            float(grads.report.perturbation_norm), rel=1e-9
        )


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_average_case_of_a_bowl(adaptive):
    x = jnp.array([[1.0, 2.0, 3.0]])
    w = jnp.array([0.5, -1.0, 2.0])
    stretch = w**2 if adaptive else jnp.ones(3)
    expected = 0.1**2 * jnp.sum(stretch * x[0] ** 2)
    estimate = sharpness.average_case(
        bowl, w, x, rho=0.1, samples=900, adaptive=adaptive
    )
    assert abs(estimate.mean - expected) < 3 * estimate.standard_error
    # The part linear in the noise has variance rho² ‖c ∇L‖², and the other is small.
    slope = 0.1 * jnp.linalg.norm(jnp.sqrt(stretch) * 2 * x[0] ** 2 * w)
    assert float(estimate.standard_error) == pytest.approx(float(slope) / 30, rel=0.1)


def test_zero_radius_has_zero_sharpness():
    params, data = network()
    assert sharpness.worst_case(loss_fn, params, data, rho=0.0, steps=3).sharpness == 0
    assert sharpness.surrogate_gap(loss_fn, params, data, rho=0.0).sharpness == 0
    rise = sharpness.average_case(loss_fn, params, data, rho=0.0, samples=3)
    assert rise.mean == pytest.approx(0, abs=1e-15)


def test_gaps_and_eigenvalue_at_a_trained_minimum_of_the_digits():
    """Lemma 3.3 of GSAM: σ ≈ 2h / ρ², with the h of the worst case."""
    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(images[:200] / 16), jnp.asarray(labels[:200])

    def digits_loss(w, x, y):
        logits = jnp.tanh(x @ w["in"]) @ w["out"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean() + 1e-3 * optax.tree.norm(w, squared=True)

    keys = jax.random.split(jax.random.key(0))
    start = {
        "in": 0.1 * jax.random.normal(keys[0], (64, 8)),
        "out": 0.3 * jax.random.normal(keys[1], (8, 10)),
    }
    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(lambda w: digits_loss(w, x, y))

    @jax.jit
    def train(w):
        def step(carry, _):
            w, state = carry
            value, grad = value_and_grad(w, state=state)
            updates, state = solver.update(
                grad,
                state,
                w,
                value=value,
                grad=grad,
                value_fn=lambda w: digits_loss(w, x, y),
            )
            return (optax.apply_updates(w, updates), state), None

        return jax.lax.scan(step, (w, solver.init(w)), length=400)[0][0]

    w = train(start)
    assert sharpness.gradient_norm(digits_loss, w, (x, y)) < 1e-4
    rho = 0.01
    largest = sharpness.eigenpairs(sharpness.hessian(digits_loss, w, (x, y)), 1).values[
        0
    ]
    worst = sharpness.worst_case(digits_loss, w, (x, y), rho=rho, steps=100)
    gap = sharpness.surrogate_gap(digits_loss, w, (x, y), rho=rho)
    estimate = sharpness.eigenvalue_from_gap(worst.sharpness, rho)
    assert float(estimate) == pytest.approx(float(largest), rel=0.03)
    assert 0 < gap.sharpness <= worst.sharpness


# --- Over devices, in memory, and inside of JAX's transformations.


def spread(mesh, params, data):
    rows = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.device_put(params, whole), jax.device_put(data, rows)


@pytest.mark.parametrize("batch_size", [8, 7])
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


# --- The landscape.


def test_lines_and_planes_are_losses_at_their_points():
    params, data = network()
    u, v = (sharpness.random_direction(params, key=key) for key in (1, 2))
    xs, ys = np.array([-1.0, 0.0, 0.5]), np.array([0.0, 2.0])

    def at(x, y):
        moved = jax.tree.map(lambda w, a, b: w + x * a + y * b, params, u, v)
        return float(loss_fn(moved, *data))

    surface = sharpness.over_plane(loss_fn, params, data, (u, v), xs, ys, batch_size=7)
    expected = [[at(x, y) for x in xs] for y in ys]
    np.testing.assert_allclose(surface.losses, expected, rtol=1e-12)
    line = sharpness.along_line(loss_fn, params, data, v, ys)
    np.testing.assert_allclose(line.losses, [at(0, y) for y in ys], rtol=1e-12)
    np.testing.assert_array_equal(line.distances, ys)


def test_interpolation_passes_through_both_solutions():
    params, data = network()
    other = jax.tree.map(lambda w: -w, params)
    line = sharpness.interpolate(loss_fn, params, other, data, [0, 0.5, 1, 2])
    ends = [params, jax.tree.map(jnp.zeros_like, params), other]
    ends.append(jax.tree.map(lambda w: -3 * w, params))
    expected = [float(loss_fn(end, *data)) for end in ends]
    np.testing.assert_allclose(line.losses, expected, rtol=1e-12)


def test_directions():
    params, data = network()
    random = sharpness.random_direction(params)
    assert float(optax.tree.norm(random)) == pytest.approx(1)
    other = sharpness.random_direction(params, key=1)
    assert abs(float(optax.tree.vdot(random, other))) < 0.5

    params = {"conv": jax.random.normal(jax.random.key(0), (3, 3, 2, 4)), **params}
    filters = sharpness.filter_normalized_direction(params, key=1)
    for name, axes in (("conv", (0, 1, 2)), ("a", (0,))):
        np.testing.assert_allclose(
            np.sqrt(np.sum(filters[name] ** 2, axis=axes)),
            np.sqrt(np.sum(params[name] ** 2, axis=axes)),
        )
    assert not np.any(filters["b"])
    filters = sharpness.filter_normalized_direction(params, filter_axis=0)
    np.testing.assert_allclose(
        np.sqrt(np.sum(filters["a"] ** 2, axis=1)),
        np.sqrt(np.sum(params["a"] ** 2, axis=1)),
    )

    params, data = network()
    steepest = sharpness.gradient_direction(loss_fn, params, data, batch_size=7)
    gradient = jax.grad(loss_fn)(params, *data)
    norm = optax.tree.norm(gradient)
    assert_trees_close(steepest, jax.tree.map(lambda g: g / norm, gradient), rtol=1e-9)


# --- Bad input.


def lose(w, x):
    return jnp.mean((x @ w) ** 2)


W, X = np.ones(2), np.ones((4, 2))

BAD = {
    "loss of each example": (
        lambda: sharpness.gradient_norm(lambda w, x: (x @ w) ** 2, W, X),
        "must return a scalar, the mean over the examples.*shape \\(4,\\)",
    ),
    "loss with auxiliary output": (
        lambda: sharpness.hessian(lambda w, x: (lose(w, x), x), W, X)(W),
        "must return the loss alone; it returned 2 values",
    ),
    "complex loss": (
        lambda: sharpness.surrogate_gap(lambda w, x: lose(w, x) * 1j, W, X, rho=1),
        "real number, got complex",
    ),
    "integer loss": (
        lambda: sharpness.surrogate_gap(lambda w, x: 3, W, X, rho=1),
        "must return a scalar",
    ),
    "no examples": (
        lambda: sharpness.gradient_norm(lose, W, np.ones((0, 2))),
        "data are empty: their shapes are \\[\\(0, 2\\)\\]",
    ),
    "no arrays": (lambda: sharpness.hessian(lose, W, ()), "data hold no arrays"),
    "uneven arrays": (
        lambda: sharpness.hessian(lose, W, (X, X[:3])),
        "as many in each; their shapes are \\[\\(4, 2\\), \\(3, 2\\)\\]",
    ),
    "a scalar among the data": (
        lambda: sharpness.hessian(lose, W, (X, 0.1)),
        "Bind what is no example to the loss",
    ),
    "no batches": (lambda: sharpness.stream([]), "no batches"),
    "an iterator": (
        lambda: sharpness.stream(iter([X])),
        "must be a sequence.*reads the data many times.*list_iterator",
    ),
    "an empty batch": (lambda: sharpness.stream([X[:0]]), "data are empty"),
    "batches and batch_size": (
        lambda: sharpness.hessian(lose, W, sharpness.stream([X]), batch_size=2),
        "leave out batch_size=",
    ),
    "rho < 0": (
        lambda: sharpness.worst_case(lose, W, X, rho=-0.1),
        "rho must be >= 0 and finite, got -0.1",
    ),
    "rho < 0 in an array": (
        lambda: sharpness.average_case(lose, W, X, rho=jnp.float32(-1)),
        "rho must be >= 0 and finite, got -1.0",
    ),
    "an estimate at an array of zero": (
        lambda: sharpness.eigenvalue_from_gap(0.1, rho=jnp.float32(0)),
        "rho must be > 0",
    ),
    "complex distances": (
        lambda: sharpness.along_line(lose, W, X, W, [1j]),
        "distances must be real",
    ),
    "complex direction": (
        lambda: sharpness.along_line(lose, W, X, W * 1j, [0.0]),
        "direction is complex128: only real",
    ),
    "direction of NaN": (
        lambda: sharpness.over_plane(lose, W, X, (W, W * np.nan), [0.0], [0.0]),
        "Each direction is not finite",
    ),
    "filters along another axis": (
        lambda: sharpness.filter_normalized_direction(W, filter_axis=1),
        "filter_axis must be 0 or -1, got 1",
    ),
    "a function among the parameters": (
        lambda: sharpness.hessian(lose, {"act": np.tanh, "w": W}, X),
        "params\\['act'\\] is ufunc: only real.*eqx.partition",
    ),
    "no width": (
        lambda: sharpness.spectral_density(sharpness.hessian(lose, W, X)).on_grid(X, 0),
        "width must be > 0",
    ),
    "no function": (
        lambda: sharpness.hessian(3, W, X),
        "A loss must be a function, got 3",
    ),
    "rho is NaN": (
        lambda: sharpness.surrogate_gap(lose, W, X, rho=float("nan")),
        "rho must be >= 0",
    ),
    "rho is a schedule": (
        lambda: sharpness.surrogate_gap(lose, W, X, rho=lambda step: 0.1),
        "no step for a schedule",
    ),
    "unknown norm": (
        lambda: sharpness.worst_case(lose, W, X, rho=0.1, norm="l1"),
        'norm must be "l2" or "linf", got \'l1\'',
    ),
    "NaN parameters": (
        lambda: sharpness.hessian(lose, {"a": W, "b": [W * np.nan]}, X),
        "not finite at \\['b'\\]\\[0\\]",
    ),
    "infinite parameter alone": (
        lambda: sharpness.gradient_norm(lose, np.inf, X),
        "not finite at its root",
    ),
    "integer parameters": (
        lambda: sharpness.hessian(lose, {"a": np.ones(2, int)}, X),
        "\\['a'\\] is int.*only real floating-point",
    ),
    "no parameters": (lambda: sharpness.hessian(lose, {}, X), "holds no numbers"),
    "too many eigenvalues": (
        lambda: sharpness.eigenpairs(sharpness.hessian(lose, W, X), 3),
        "k must be at most the dimension, 2, got 3",
    ),
    "no eigenvalue": (
        lambda: sharpness.eigenpairs(sharpness.hessian(lose, W, X), 0),
        "k must be an integer >= 1",
    ),
    "unknown end": (
        lambda: sharpness.eigenpairs(sharpness.hessian(lose, W, X), which="both"),
        'which must be "largest" or "smallest"',
    ),
    "too many products": (
        lambda: sharpness.spectral_density(
            sharpness.hessian(lose, W, X), num_matvecs=3
        ),
        "num_matvecs must be at most the dimension, 2, got 3",
    ),
    "too few products": (
        lambda: sharpness.eigenpairs(sharpness.hessian(lose, W, X), 2, num_matvecs=1),
        "num_matvecs must be at least k = 2, got 1",
    ),
    "one sample": (
        lambda: sharpness.trace(sharpness.hessian(lose, W, X), num_samples=1),
        "at least 2, for a standard error",
    ),
    "no steps": (
        lambda: sharpness.worst_case(lose, W, X, rho=0.1, steps=0),
        "steps must be an integer >= 1",
    ),
    "groups that do not fit": (
        lambda: sharpness.surrogate_gap(lose, W, X, rho=0.1, m=3),
        "no whole number of groups of m = 3. Leave some out: x\\[: len\\(x\\) // 3",
    ),
    "batches that are no groups": (
        lambda: sharpness.surrogate_gap(lose, W, X, rho=0.1, m=2, batch_size=3),
        "batch_size must be a multiple of m = 2, got 3",
    ),
    "vector of another shape": (
        lambda: sharpness.hessian(lose, W, X)(np.ones(3)),
        "The vector must have the structure and shapes of the parameters",
    ),
    "direction of another shape": (
        lambda: sharpness.along_line(lose, W, X, np.ones(3), [0.0]),
        "direction must have the structure and shapes",
    ),
    "one direction": (
        lambda: sharpness.over_plane(lose, W, X, [W], [0.0], [0.0]),
        "A plane has two directions, got 1",
    ),
    "no distances": (
        lambda: sharpness.along_line(lose, W, X, W, []),
        "distances must hold at least one number",
    ),
    "other solution": (
        lambda: sharpness.interpolate(lose, W, {"a": W}, X, [0.5]),
        "end must have the structure and shapes",
    ),
    "an estimate at radius zero": (
        lambda: sharpness.eigenvalue_from_gap(0.1, rho=0),
        "rho must be > 0",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_says_what_was_expected(case):
    call, message = BAD[case]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_streamed_batches_must_be_alike():
    batches = [np.ones((2, 1)), np.ones((3, 1)), np.ones((2, 1))]
    with pytest.raises(ValueError, match=r"batch 1 has .*3, 1.*expected .*2, 1"):
        sharpness.gradient_norm(
            lambda w, x: (w * x).mean(), 1.0, sharpness.stream(batches)
        )


def test_without_matfree_there_is_a_remedy(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matfree.decomp", None)
    with pytest.raises(ImportError, match=r"pip install \"sam_optax\[sharpness\]\""):
        sharpness.trace(sharpness.hessian(lose, W, X))
