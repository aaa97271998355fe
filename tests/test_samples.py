"""Methods that look at several random points: closed forms, masks, and bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import problem
import sam_optax
from lab import assert_trees_equal
from sam_optax import ascents, descents

H = np.diag([3.0, 1.0, 0.5])


def quadratic(w):
    return w @ H @ w / 2


def direction(sam, loss, w, **options):
    """d of the first step at w."""
    loss_and_grads = sam_optax.sam_value_and_grad(loss, sam, **options)
    return loss_and_grads(w, opt_state=sam.init(w))[1].gradients


def points_of(sam, w):
    points = []

    def grad_fn(point):
        points.append(point)
        loss, gradient = jax.value_and_grad(problem.loss)(point, problem.batch())
        return sam_optax.data.Pass(loss, gradient)

    sam.update(w, sam.init(w), w, grad_fn=grad_fn)
    return points


@pytest.mark.parametrize(
    "make",
    [
        sam_optax.lpf_sgd,
        sam_optax.tsam,
        sam_optax.universal_sam,
        functools.partial(sam_optax.universal_sam, kind="determinant"),
        functools.partial(sam_optax.universal_sam, kind="frobenius"),
    ],
)
def test_no_point_moves_what_the_mask_leaves_out(make):
    w = problem.params()
    points = points_of(make(mask={"a": True, "b": False}), w)
    moved = 0
    for point in points:
        assert_trees_equal(point["b"], w["b"])
        moved += bool(np.any(point["a"] != w["a"]))
    # Universal SAM takes one gradient at the parameters themselves.
    assert moved == len(points) - (len(points) == 3 and make is not sam_optax.tsam)


def test_points_of_a_step_and_of_the_next_differ():
    w = problem.params()
    sam = sam_optax.tsam(rho=0.0, samples=3)
    points, state = [], sam.init(w)
    for _ in range(2):

        def grad_fn(point):
            points.append(float(point["b"]["d"]))
            return sam_optax.data.Pass(jnp.float32(0), w)

        _, state = sam.update(w, state, w, grad_fn=grad_fn)
    # Each point is seen twice: with rho = 0, δ and ε are the same.
    assert len(points) == 12
    assert len(set(points)) == 6


# --- TSAM.


@pytest.mark.usefixtures("double_precision")
def test_tilts_from_the_mean_to_the_highest_loss():
    w, others = jnp.array([1.0, 2.0, -1.0]), [[0.5, 0, 0], [0, -1.0, 0], [0, 0, 0.3]]
    fixed = [
        optax.stateless(lambda g, _, e=e: jnp.asarray(e)) for e in map(np.array, others)
    ]
    points = np.array(w) + np.array(others)
    losses = np.array([quadratic(q) for q in points])
    for tilt in (0.0, 0.7, 1e3, -1e3):
        sam = sam_optax.sharpness_aware(
            fixed[0], descent=descents.tilt(fixed[1:], tilt)
        )
        a = np.exp(tilt * (losses - (losses.max() if tilt > 0 else losses.min())))
        expected = (a / a.sum()) @ points @ H
        np.testing.assert_allclose(direction(sam, quadratic, w), expected, rtol=1e-9)


@pytest.mark.usefixtures("double_precision")
def test_longer_noise_is_cut_to_the_radius():
    w = jnp.zeros(1000)
    for radius, wanted in ((0.5, 0.5), (None, 5.0), (50.0, 5.0)):
        part = ascents.ascend_from_noise(ascents.sam(0.0), 5.0, radius=radius)
        delta, _ = part.update(w, part.init(w), w, grad_fn=lambda q: q)
        rel = 1e-9 if radius == 0.5 else 0.1
        assert jnp.linalg.norm(delta) == pytest.approx(wanted, rel=rel)


# --- Universal SAM.

C = jnp.array([1.0, -2.0, 0.5])


def cubic(w):
    return jnp.sum(C * w**3) / 6


def hand_written(kind, losses, gradients, loss, g, rho, lam):
    """d from the definition of S, differentiated by JAX along the given points."""

    def sharpness(shift):
        # To first order, moving all points by `shift` changes each loss so.
        q = (losses + gradients @ shift - loss - g @ shift) / rho**2
        if kind == "trace":
            return jnp.mean(q)
        if kind == "determinant":
            return jnp.mean(jnp.exp(-q / 2)) ** -2.0
        return jnp.var(q, ddof=1)

    return g + lam * jax.grad(sharpness)(jnp.zeros(3))


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("kind", ["trace", "determinant", "frobenius"])
def test_universal_sam_is_the_gradient_of_its_sharpness(kind):
    """With the points that it drew, on the second step."""
    w, rho, lam = jnp.array([0.3, 0.2, -0.4]), 0.3, 0.7
    sam = sam_optax.universal_sam(rho, lam, kind=kind, samples=5, half_width=0.8)
    points = []

    def grad_fn(point):
        points.append(point)
        return sam_optax.data.Pass(*jax.value_and_grad(cubic)(point))

    state = sam.init(w)
    for _ in range(2):
        points.clear()
        d, state = sam.update(jax.grad(cubic)(w), state, w, grad_fn=grad_fn)
    here, *drawn = points
    np.testing.assert_array_equal(here, w)
    shifts = (jnp.stack(drawn) - w) / rho
    if kind == "trace":
        np.testing.assert_allclose(jnp.linalg.norm(shifts, axis=1), 1, rtol=1e-9)
    if kind == "determinant":
        assert 0.4 < jnp.max(jnp.abs(shifts)) <= 0.8
    losses, gradients = jax.vmap(jax.value_and_grad(cubic))(jnp.stack(drawn))
    expected = hand_written(
        kind, losses, gradients, cubic(w), jax.grad(cubic)(w), rho, lam
    )
    np.testing.assert_allclose(d, expected, rtol=1e-9)


# --- Bad input.


def test_impossible_arguments():
    with pytest.raises(ValueError, match=r"kind must be one of .*'norm'"):
        sam_optax.universal_sam(kind="norm")
    with pytest.raises(ValueError, match="samples must be an integer >= 2"):
        sam_optax.universal_sam(kind="frobenius", samples=1)
    with pytest.raises(ValueError, match="half_width must be >= 0"):
        sam_optax.universal_sam(half_width=-1.0)
    with pytest.raises(TypeError, match="mask must be a tree of bools"):
        sam_optax.universal_sam(mask=True)
    with pytest.raises(ValueError, match="samples must be an integer >= 1"):
        sam_optax.tsam(samples=0)
    with pytest.raises(ValueError, match="radius must be >= 0"):
        sam_optax.tsam(radius=-1.0)
    with pytest.raises(ValueError, match="one of them learns from d"):
        descents.tilt([ascents.msam()])
    with pytest.raises(ValueError, match="filter_noise needs the parameters"):
        part = ascents.replace_by_filter_noise()
        part.update(jnp.ones(2), part.init(jnp.ones(2)))


@pytest.mark.parametrize("kind", ["determinant", "frobenius", "tsam"])
def test_a_gradient_without_a_loss_is_not_enough(kind):
    make = functools.partial(sam_optax.universal_sam, kind=kind, samples=2)
    sam = (sam_optax.tsam if kind == "tsam" else make)()
    w = jnp.ones(3)
    with pytest.raises(ValueError, match="needs the loss beside each gradient"):
        sam.update(w, sam.init(w), w, grad_fn=lambda q: q)
    with pytest.raises(ValueError, match="'perturbed_loss' is one that"):
        sam.update(w, sam.init(w), w, grad_fn=lambda q: q, perturbed_loss=1.0)


def test_filters_lie_along_the_last_axis():
    w = {
        "kernel": jnp.ones((3, 3, 4, 2)),
        "bias": jnp.full(4, 2.0),
        "scale": -jnp.ones(()),
    }
    part = ascents.replace_by_filter_noise()
    ones = jax.tree.map(jnp.ones_like, w)
    u, _ = part.update(ones, part.init(w), w)
    plain, _ = part.update(ones, part.init(w), jax.tree.map(jnp.zeros_like, w))
    assert not any(np.any(x) for x in jax.tree.leaves(plain))
    double = w | {"kernel": w["kernel"].at[..., 1].multiply(2.0)}
    v, _ = part.update(ones, part.init(w), double)
    np.testing.assert_allclose(v["kernel"][..., 1], 2 * u["kernel"][..., 1], rtol=1e-6)
    np.testing.assert_array_equal(v["kernel"][..., 0], u["kernel"][..., 0])
    assert jnp.std(u["kernel"]) == pytest.approx(6.0, rel=0.3)
    assert u["scale"].shape == ()
