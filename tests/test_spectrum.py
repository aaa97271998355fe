"""Products, eigenvalues, traces and densities against dense matrices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from sam_optax import sharpness
from sam_optax.sharpness import _estimate, _spectrum
from sharpness_problem import (
    EXAMPLES,
    dense,
    in_batches,
    loss_fn,
    matrix,
    network,
)

pytestmark = pytest.mark.usefixtures("double_precision")


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


def test_residuals_count_the_rounding_of_products():
    """Of a least-squares problem of a few hundred parameters, in float32."""
    x = np.random.default_rng(0).normal(size=(1000, 300)).astype(np.float32)
    H = sharpness.hessian(
        lambda w, x: jnp.mean((x @ w) ** 2) / 2, jnp.zeros(300, jnp.float32), x
    )
    pairs = sharpness.eigenpairs(H, 4, num_matvecs=150)
    values = np.linalg.eigvalsh(x.T.astype(np.float64) @ x / len(x))
    distances = np.abs(np.asarray(pairs.values)[:, None] - values).min(axis=1)
    assert np.all(distances <= pairs.residuals)
    assert np.all(np.asarray(pairs.residuals) < 1e-4)


def test_lanczos_multiplies_with_all_digits_and_the_loss_as_it_is_written():
    """GPUs and TPUs have fewer digits by default, and the basis needs them all."""
    H = sharpness.hessian(
        lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2),
        jnp.ones(3, jnp.float32),
        jnp.ones((5, 3), jnp.float32),
    )

    def precisions(function):
        text = str(jax.make_jaxpr(function)(H))
        products = text.count("dot_general[")
        return products, text.count("precision=(Precision.HIGHEST")

    in_loss, raised = precisions(lambda H: H(jnp.ones(3, jnp.float32)))
    assert in_loss > 0 and raised == 0
    for measure in (
        lambda H: sharpness.eigenpairs(H, 1, num_matvecs=2),
        lambda H: sharpness.spectral_density(H, num_matvecs=2),
    ):
        products, raised = precisions(measure)
        assert products - raised == in_loss  # all others are raised
        assert raised > 0
    with jax.default_matmul_precision("highest"):
        products, raised = precisions(lambda H: sharpness.eigenpairs(H, 1))
    assert products == raised


class Node:
    """A pytree that is equal to nothing but itself, as Flax's modules are."""

    def __init__(self, w):
        self.w = w


jax.tree_util.register_pytree_node(
    Node, lambda node: ((node.w,), None), lambda _, children: Node(*children)
)


@pytest.mark.parametrize("make", [Node, lambda w: nnx.Linear(2, 1, rngs=nnx.Rngs(0))])
def test_parameters_may_be_a_node_that_cannot_be_compared(make):
    w, x = make(jnp.ones((2, 1))), jnp.array([[1.0, 0.0], [0.0, 3.0]])

    def loss(w, x):
        return jnp.mean((x @ jax.tree.leaves(w)[-1].reshape(2)) ** 2)

    H = sharpness.hessian(loss, w, x)
    assert sharpness.eigenpairs(H, 1).values[0] == pytest.approx(9.0, rel=1e-5)
    assert sharpness.trace(H).mean == pytest.approx(10.0, rel=1e-5)
    line = sharpness.along_line(loss, w, x, H(w), jnp.zeros(1))
    interpolated = sharpness.interpolate(loss, w, w, x, jnp.zeros(1))
    assert line.losses == interpolated.losses == pytest.approx(float(loss(w, x)))


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


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("size", "count"), [(10, 10), (24, 24), (60, 50)])
def test_lanczos_is_right_where_a_matrix_has_few_different_eigenvalues(
    size, count, dtype
):
    """c·I + a matrix of rank one, whose Krylov spaces have two dimensions at most."""
    u = np.ones(size, dtype) / size**0.5

    def loss(w, x):
        return jnp.mean((x @ w) ** 2) / 2 + jnp.sum(w**2) / 20

    H = sharpness.hessian(loss, jnp.zeros(size, dtype), jnp.stack([2 * u, 0 * u]))
    tolerance = 1e-5 if dtype == np.float32 else 1e-13
    for key in range(3):
        largest = sharpness.eigenpairs(H, 3, num_matvecs=count, key=key)
        np.testing.assert_allclose(largest.values, [2.1, 0.1, 0.1], rtol=tolerance)
        np.testing.assert_allclose(abs(largest.vector(0) @ u), 1, rtol=tolerance)
        gram = largest.vectors @ largest.vectors.T
        np.testing.assert_allclose(gram, np.eye(3), atol=tolerance)
        assert np.all(np.abs(largest.values - np.array([2.1, 0.1, 0.1])) < 1e-6)
        assert np.all(largest.residuals < 100 * tolerance)
        smallest = sharpness.eigenpairs(H, 1, which="smallest", key=key)
        np.testing.assert_allclose(smallest.values, 0.1, rtol=10 * tolerance)
    density = sharpness.spectral_density(H, num_matvecs=count, num_samples=3)
    assert density.nodes.min() > 0.1 - tolerance
    assert density.nodes.max() < 2.1 + tolerance
    np.testing.assert_allclose(density.weights.sum(axis=1), 1, rtol=tolerance)


def test_the_basis_of_lanczos_is_orthonormal_where_little_is_left_of_a_product():
    values = np.logspace(0, -6, 40, dtype=np.float32)
    start = jax.random.normal(jax.random.key(0), (40,), jnp.float32)
    A = diagonal(jnp.asarray(values), jnp.zeros(40, jnp.float32))
    found = _spectrum._tridiagonalise(A, start, 40)
    np.testing.assert_allclose(found.basis @ found.basis.T, np.eye(40), atol=2e-6)
    double = found.basis.astype(np.float64)
    exact = double @ (np.diag(values) @ double.T)
    np.testing.assert_allclose(found.scale * found.small, exact, atol=2e-6)
    identity = diagonal(jnp.ones(4, jnp.float32), jnp.zeros(4, jnp.float32))
    small = _spectrum._tridiagonalise(identity, start[:4], 4).small
    np.testing.assert_array_equal(small - np.diag(np.diag(small)), 0)


def test_an_eigenvalue_has_a_derivative_where_the_residual_is_zero():
    def largest(factor):
        H = sharpness.hessian(
            lambda w, x: jnp.sum(jnp.array([1.0, 2.0, 3.0]) * w**2) * jnp.mean(x),
            jnp.zeros(3),
            jnp.full(1, factor),
        )
        return sharpness.eigenpairs(H, num_matvecs=3).values[0]

    assert float(jax.grad(largest)(2.0)) == pytest.approx(6.0, rel=1e-6)


@pytest.mark.parametrize("value", [49.0, 5e37, 3e-38])
def test_equal_samples_have_that_mean_and_no_error(value):
    found = _estimate.estimate_over_keys(
        lambda key: jnp.float32(value), jax.random.key(0), 10
    )
    assert float(found.mean) == pytest.approx(value, rel=3e-7)
    assert found.standard_error == 0


def test_an_infinite_sample_makes_an_infinite_mean():
    def sample(key):
        return jnp.where(jax.random.uniform(key) < 2, jnp.inf, 0.0)

    assert _estimate.estimate_over_keys(sample, jax.random.key(0), 3).mean == jnp.inf


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e10, 1e30])
def test_a_standard_error_is_right_at_any_scale(scale):
    x = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)

    def error(factor):
        def loss(w, x):
            return jnp.mean((x @ w) ** 2) * jnp.float32(factor)

        H = sharpness.hessian(loss, jnp.zeros(5, jnp.float32), x)
        estimate = sharpness.trace(H, num_samples=10)
        return np.float64(estimate.mean), np.float64(estimate.standard_error)

    np.testing.assert_allclose(np.divide(error(scale), scale), error(1.0), rtol=1e-5)
    assert error(1.0)[1] > 0.1


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
    with jax.numpy_dtype_promotion("strict"):
        curve = density.on_grid(grid.astype(np.float32), np.float32(0.1))
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


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        (lambda A: sharpness.eigenpairs(A), 25),
        (lambda A: sharpness.eigenpairs(A, 2), 29),
        (lambda A: sharpness.trace(A), 100),
        (lambda A: sharpness.spectral_density(A), 510),
    ],
    ids=["eigenpair", "eigenpairs", "trace", "spectral_density"],
)
def test_the_default_number_of_products(measure, expected):
    products = []

    def product(params, v, x):
        jax.debug.callback(lambda: products.append(1))
        return jnp.arange(60.0) * v

    measure(sharpness.Matrix(jnp.ones(60), jnp.ones(1), jax.tree_util.Partial(product)))
    jax.effects_barrier()
    assert len(products) == expected


def diagonal(values, like):
    """The matrix diag(values) over parameters of several leaves."""
    flat, unravel = ravel_pytree(jax.tree.map(jnp.ones_like, like))
    values = jnp.asarray(values, flat.dtype)

    def product(params, v, x):
        return jax.tree.map(lambda d, v: d.astype(v.dtype) * v, unravel(values), v)

    return sharpness.Matrix(like, jnp.ones(1), jax.tree_util.Partial(product))


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_the_eigenpairs_of_a_diagonal_matrix(which, scale):
    """In order, with their signs; over leaves of several shapes and dtypes."""
    like = {"a": jnp.ones((2, 3)), "b": jnp.ones(2, jnp.float32), "c": jnp.ones(())}
    entries = scale * np.array([-7.0, 1, 2, 3, 5, -4, 0.5, -0.5, 4])
    pairs = sharpness.eigenpairs(diagonal(entries, like), 3, which=which)
    order = np.argsort(entries)[:3] if which == "smallest" else np.argsort(-entries)[:3]
    np.testing.assert_allclose(pairs.values, entries[order], rtol=1e-6)
    for i, entry in enumerate(order):
        v = np.abs(ravel_pytree(pairs.vector(i))[0])
        np.testing.assert_allclose(v, np.eye(9)[entry], atol=1e-5)
    np.testing.assert_array_less(0, pairs.residuals)
    np.testing.assert_array_less(pairs.residuals, 1e-5 * scale)
    assert pairs.vectors["a"].shape == (3, 2, 3)


def test_the_trace_of_one_off_diagonal_entry():
    """v'Av is ± 2a: the standard error is that of as many signs."""
    A = jnp.array([[1.0, 3.0], [3.0, 2.0]])
    product = jax.tree_util.Partial(lambda w, v, x: A @ v)
    matrix = sharpness.Matrix(jnp.ones(2), jnp.ones(1), product)
    estimate = sharpness.trace(matrix, num_samples=50)
    above = (float(estimate.mean) - 3 + 6) / 12 * 50  # how many samples are 3 + 6
    assert above == pytest.approx(round(above), abs=1e-9)
    share = above / 50
    deviation = 12 * np.sqrt(share * (1 - share) * 50 / 49)
    assert float(estimate.standard_error) == pytest.approx(deviation / 50**0.5)
    assert 10 < above < 40
    others = [sharpness.trace(matrix, num_samples=50, key=key) for key in range(1, 4)]
    assert len({float(other.mean) for other in others}) > 1


def test_random_measures_have_the_key_zero_by_default():
    A = diagonal(np.arange(1.0, 10.0) ** 3, jnp.ones(9))
    noise = {"samples": 3, "rho": 0.1}
    measures = [
        lambda **key: sharpness.eigenpairs(A, num_matvecs=3, **key).values,
        lambda **key: (
            sharpness.spectral_density(matrix("hessian"), num_matvecs=3, **key).nodes
        ),
        lambda **key: (
            sharpness.average_case(
                lambda w, x: jnp.sum(w**2) * x.mean(),
                jnp.ones(9),
                jnp.ones(1),
                **noise,
                **key,
            ).mean
        ),
    ]
    for measure in measures:
        np.testing.assert_array_equal(measure(), measure(key=0))
        assert np.any(measure() != measure(key=1))
    H = matrix("hessian")
    assert sharpness.trace(H).mean == sharpness.trace(H, key=0).mean
    assert sharpness.trace(H).mean != sharpness.trace(H, key=1).mean


def test_a_density_is_the_mean_over_vectors_of_weighted_gaussians():
    nodes, weights = (
        np.array([[0.0, 2.0], [1.0, -1.0]]),
        np.array([[0.9, 0.1], [0.5] * 2]),
    )
    density = sharpness.SpectralDensity(jnp.asarray(nodes), jnp.asarray(weights))
    for power in range(4):
        wanted = np.mean(np.sum(weights * nodes**power, axis=1))
        assert float(density.moment(power)) == pytest.approx(wanted)
    grid, width = np.array([-0.5, 0.0, 1.0]), 0.3
    gaussians = np.exp(-((grid[:, None, None] - nodes) ** 2) / (2 * width**2))
    heights = weights * gaussians / (width * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(
        density.on_grid(grid, width), heights.sum(2).mean(1), rtol=1e-12
    )
    curve = jax.jit(density.on_grid)(grid, width)  # a traced width is not checked
    np.testing.assert_allclose(curve, density.on_grid(grid, width), rtol=1e-12)


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
