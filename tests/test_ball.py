"""Sharpness in a ball against brute force and closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import sam_optax
from lab import assert_trees_close
from sam_optax import sharpness
from sharpness_problem import (
    EXAMPLES,
    bowl,
    in_batches,
    loss_fn,
    network,
)

pytestmark = pytest.mark.usefixtures("double_precision")


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


@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_one_ascent_step_by_step(norm, adaptive):
    """Against the same in NumPy, at a step size that meets the edge of the ball."""
    w, rho, steps, size = np.array([0.4, -1.5]), 0.4, 3, 0.8
    stretch = np.abs(w) if adaptive else np.ones(2)
    ones = jnp.ones(1)
    gradient = jax.grad(lambda w: hills(w, ones))

    def loss(delta):
        return float(hills(w + stretch * delta, np.ones(1)))

    def steepest(delta):
        g = stretch * np.asarray(gradient(jnp.asarray(w + stretch * delta)))
        return rho * (np.sign(g) if norm == "linf" else g / np.linalg.norm(g))

    def project(delta):
        if norm == "linf":
            return np.clip(delta, -rho, rho)
        return delta / max(1, np.linalg.norm(delta) / rho)

    visited = [np.zeros(2)]
    for t in range(steps):
        step = size * (1 - t / steps) * steepest(visited[-1])
        visited.append(project(visited[-1] + step))
    best = max(visited, key=loss)
    worst = sharpness.worst_case(
        hills,
        jnp.asarray(w),
        ones,
        rho=rho,
        steps=steps,
        restarts=1,
        step_size=size,
        norm=norm,
        adaptive=adaptive,
    )
    np.testing.assert_allclose(worst.perturbation, stretch * best, rtol=1e-10)
    assert float(worst.perturbed_loss) == pytest.approx(loss(best), rel=1e-12)
    assert float(worst.loss) == pytest.approx(loss(np.zeros(2)), rel=1e-12)
    # A step in one go is SAM's.
    gap = sharpness.surrogate_gap(
        hills, jnp.asarray(w), ones, rho=rho, norm=norm, adaptive=adaptive
    )
    first = steepest(np.zeros(2))
    np.testing.assert_allclose(gap.perturbation, stretch * first, rtol=1e-10)
    rise = loss(first) - loss(np.zeros(2))
    assert float(gap.sharpness) == pytest.approx(rise, rel=1e-10)


def test_the_radius_may_be_traced_and_the_ball_is_plain_by_default():
    w, ones = jnp.array([0.4, -1.5]), jnp.ones(1)
    for measure in (
        sharpness.surrogate_gap,
        functools.partial(sharpness.worst_case, steps=2),
        functools.partial(sharpness.average_case, samples=3),
    ):
        traced = jax.jit(lambda rho, m=measure: m(hills, w, ones, rho=rho))(0.3)
        plain = measure(hills, w, ones, rho=0.3, adaptive=False, batch_size=None)
        assert_trees_close(traced, plain, rtol=1e-12)
    worst = sharpness.worst_case(hills, w, ones, rho=0.3)
    explicit = sharpness.worst_case(
        hills, w, ones, rho=0.3, steps=20, restarts=2, step_size=1.0, norm="l2", key=0
    )
    assert_trees_close(worst, explicit)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_random_starts_fill_the_ball(norm):
    """Steps of size 0 leave the second start where it was drawn."""

    def start(restarts, key=0):
        worst = sharpness.worst_case(
            lambda w, x: jnp.sum(w**2) * x.mean(),
            jnp.zeros(400),
            jnp.ones(1),
            rho=0.5,
            steps=1,
            restarts=restarts,
            step_size=0.0,
            norm=norm,
            key=key,
        )
        return np.asarray(worst.perturbation)

    assert not np.any(start(1))
    drawn, other = start(2), start(2, key=1)
    assert np.any(drawn != other)
    assert abs(np.mean(drawn)) < 4 * np.std(drawn) / 20
    if norm == "l2":
        assert np.linalg.norm(drawn) == pytest.approx(0.5, rel=1e-12)
        assert np.std(drawn / 0.5 * 20) == pytest.approx(1, rel=0.01)
        assert np.abs(drawn).max() > 2.5 * np.std(drawn)  # Gaussian, not on a cube
    else:
        assert 0.49 < np.abs(drawn).max() < 0.5
        assert np.std(drawn) == pytest.approx(0.5 / 3**0.5, rel=0.1)
        # Of several starts, the highest counts.
        assert np.sum(start(9) ** 2) > np.sum(drawn**2)


def test_a_minimum_of_no_gradient_stays_in_the_ball():
    """The projection of zero is zero, and derivatives are finite."""
    worst = sharpness.worst_case(
        lambda w, x: 0 * jnp.sum(w) + x.mean(), jnp.zeros(3), jnp.ones(2), rho=0.1
    )
    np.testing.assert_array_equal(worst.perturbation, 0)
    assert (float(worst.loss), float(worst.sharpness)) == (1, 0)


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


@pytest.mark.parametrize("batches", [8, 20, "streamed"])
def test_random_starts_of_groups_do_not_depend_on_how_the_data_are_cut(batches):
    """At a minimum, where all depends on them."""
    _, (data, _) = network()
    source = in_batches((data,), 8) if batches == "streamed" else data
    batch_size = None if batches == "streamed" else batches
    w = jnp.zeros(data.shape[1])
    worst = functools.partial(
        sharpness.worst_case, bowl, w, rho=0.3, steps=1, restarts=2, m=4
    )
    expected = worst(data)
    assert_trees_close(worst(source, batch_size=batch_size), expected, rtol=1e-9)
    assert worst(data, key=1).sharpness != expected.sharpness


@pytest.mark.parametrize("restarts", [1, 2])
def test_a_worst_case_with_nan_on_the_way_is_nan(restarts):
    """And not 0, or the highest of what else was seen."""

    def root(w, x):  # its gradient at 0 is NaN
        return jnp.sqrt(jnp.sum(w**2)) * x.mean()

    def logarithm(w, x):
        return -jnp.log(w).sum() * x.mean()

    for loss, w in ((root, jnp.zeros(2)), (logarithm, jnp.array([0.05, 1.0]))):
        worst = sharpness.worst_case(loss, w, jnp.ones(3), rho=0.1, restarts=restarts)
        assert np.isnan(worst.sharpness) and np.isnan(worst.perturbed_loss)
        assert np.isfinite(worst.loss)


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


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_radius_of_another_dtype_under_strict_promotion(norm):
    params, data = network()
    measure = functools.partial(
        sharpness.worst_case, loss_fn, params, data, norm=norm, steps=2
    )
    wanted = measure(rho=0.25, step_size=0.5)
    with jax.numpy_dtype_promotion("strict"):
        worst = measure(rho=jnp.float32(0.25), step_size=np.float32(0.5))
        estimate = sharpness.eigenvalue_from_gap(worst.sharpness, jnp.float32(0.25))
    assert_trees_close(worst, wanted, rtol=1e-12)
    assert float(estimate) == pytest.approx(32 * float(wanted.sharpness), rel=1e-12)


def test_zero_radius_has_zero_sharpness_even_without_a_gradient():
    def root(w, x):  # its gradient at 0 is NaN
        return jnp.sqrt(jnp.sum(w**2)) * x.mean()

    for measure in (sharpness.worst_case, sharpness.surrogate_gap):
        assert measure(root, jnp.zeros(2), jnp.ones(3), rho=0.0).sharpness == 0


def test_zero_radius_has_zero_sharpness():
    params, data = network()
    rises = [
        sharpness.worst_case(loss_fn, params, data, rho=0.0, steps=3).sharpness,
        sharpness.surrogate_gap(loss_fn, params, data, rho=0.0).sharpness,
        sharpness.average_case(loss_fn, params, data, rho=0.0, samples=3).mean,
    ]
    assert rises == pytest.approx([0, 0, 0], abs=1e-15)


@pytest.mark.slow
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


def test_the_eigenvalue_of_a_tiny_gap_is_in_range():
    value = sharpness.eigenvalue_from_gap(np.float32(4.5e-30), rho=np.float32(1e-23))
    assert float(value) == pytest.approx(9e16, rel=1e-5)
