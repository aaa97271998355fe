"""The direction of p-norm one: its values, ties, zeros, scale, dtypes and slopes."""

import fractions
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sam_optax
from sam_optax import ascents

ORDERS = [1, 1.5, 2, 3, np.inf]
TREE = {"a": jnp.array([[2.0, -3.0], [0.0, 1.0]]), "b": jnp.array([-3.0])}
EMPTY = {"a": jnp.zeros((2, 2)), "b": jnp.zeros(1)}


@functools.partial(jax.jit, static_argnames="p")
def direction(tree, p):
    tx = ascents.normalize_by_global_norm(p)
    return tx.update(tree, tx.init(tree))[0]


def flat(tree):
    return np.concatenate([np.ravel(tree["a"]), np.ravel(tree["b"])]).astype(float)


def by_hand(g, p):
    if p == 1:  # shared between the largest
        largest = np.abs(g) == np.abs(g).max()
        return np.sign(g) * largest / largest.sum()
    if p == np.inf:
        return np.sign(g)
    q = p / (p - 1)
    return np.sign(g) * np.abs(g) ** (q - 1) / (np.abs(g) ** q).sum() ** (1 / p)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("p", ORDERS)
def test_the_direction_is_its_formula_at_every_scale(p, scale):
    """With a tie between leaves, and a zero, which stays zero."""
    tree = jax.tree.map(lambda g: g * np.float32(scale), TREE)
    u = flat(direction(tree, p))
    np.testing.assert_allclose(u, by_hand(flat(TREE), p), rtol=2e-6, atol=1e-12)
    assert np.linalg.norm(u, ord=p) == pytest.approx(1, rel=2e-6)


@pytest.mark.parametrize("p", ORDERS)
def test_no_other_direction_of_that_norm_rises_more(p):
    """It maximises the linearised loss, u ↦ ⟨g, u⟩, on the sphere of the p-norm."""
    g = flat(TREE)
    best = g @ flat(direction(TREE, p))
    rng = np.random.default_rng(0)
    for _ in range(200):
        other = rng.normal(size=g.size) * np.exp(rng.normal(size=g.size))
        assert g @ other / np.linalg.norm(other, ord=p) <= best * (1 + 1e-6)


@pytest.mark.parametrize("p", ORDERS)
def test_a_zero_gradient_has_a_zero_direction_and_a_finite_slope(p):
    np.testing.assert_array_equal(flat(direction(EMPTY, p)), 0)
    slopes = jax.jacobian(lambda tree: direction(tree, p))(EMPTY)
    for slope in jax.tree.leaves(slopes):
        assert np.all(np.isfinite(slope))


@pytest.mark.parametrize("p", ORDERS)
def test_slopes_are_finite_where_some_entries_are_zero(p):
    slopes = jax.jacobian(lambda tree: direction(tree, p))(TREE)
    for slope in jax.tree.leaves(slopes):
        assert np.all(np.isfinite(slope))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("p", ORDERS)
def test_a_gradient_that_is_not_finite_has_no_direction(p, bad):
    """Not even zeros, or the signs of the other entries."""
    u = direction(TREE | {"b": jnp.array([bad])}, p)
    assert np.all(np.isnan(flat(u)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("p", ORDERS)
def test_half_precision_has_the_digits_of_single_precision(p, dtype):
    """Of 1000 entries of about 300, whose powers leave float16."""
    rng = np.random.default_rng(0)
    g = jnp.asarray(300 * (1 + 0.1 * rng.normal(size=1000)), dtype)
    u = direction(g, p)
    assert u.dtype == jnp.float32
    wanted = by_hand(np.asarray(g, np.float64), p)
    np.testing.assert_allclose(u, wanted, rtol=3e-5, atol=1e-12)


@pytest.mark.parametrize("p", [1, 1.5, 3, np.inf])
def test_the_method_scales_it_by_rho_of_the_step(p):
    sam = sam_optax.sam(lambda t: 0.1 * (1 + t), p=p)
    w, points = jax.tree.map(jnp.ones_like, TREE), []
    state = sam.init(w)
    for t in range(3):
        _, state = sam.update(
            TREE, state, w, grad_fn=lambda point: points.append(point) or TREE
        )
        e = flat(points.pop()) - 1
        np.testing.assert_allclose(
            e, 0.1 * (1 + t) * by_hand(flat(TREE), p), rtol=1e-5, atol=1e-7
        )


def test_the_default_is_the_2_norm():
    for sam in (sam_optax.sam(0.5), sam_optax.sam(0.5, p=None)):
        points = []
        sam.update(
            TREE,
            sam.init(TREE),
            EMPTY,
            grad_fn=lambda p, to=points: to.append(p) or TREE,
        )
        np.testing.assert_allclose(
            flat(points[0]), 0.5 * by_hand(flat(TREE), 2), rtol=1e-5
        )


@pytest.mark.parametrize("p", [0.5, 0, -1, np.nan, -np.inf])
def test_an_order_below_one_says_so(p):
    with pytest.raises(ValueError, match="p must be >= 1"):
        ascents.normalize_by_global_norm(p)


@pytest.mark.parametrize("p", [True, "2", None, 2j, jnp.float32(2)])
def test_an_order_that_is_no_number_says_so(p):
    with pytest.raises(TypeError, match=r"p must be a|p chooses code"):
        ascents.normalize_by_global_norm(p)


def test_rho_below_zero_says_so():
    for build in (ascents.scale_by_rho, ascents.sam, sam_optax.usam):
        with pytest.raises(ValueError, match="rho must be >= 0"):
            build(-0.1)


def test_an_order_may_be_any_real_number():
    for p, same in ((fractions.Fraction(3, 2), 1.5), (np.float32(3), 3), (2.0, 2)):
        np.testing.assert_array_equal(
            flat(direction(TREE, p)), flat(direction(TREE, same))
        )


def test_a_schedule_that_returns_a_radius_below_zero_says_so():
    tx, w = ascents.scale_by_rho(lambda t: -0.1), jnp.ones(2)
    with pytest.raises(ValueError, match="rho must be >= 0"):
        tx.update(w, tx.init(w))
