"""Methods that papers cite: what they are at their limits, and where they look."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import problem
import sam_optax
from lab import all_finite, are_equal, assert_trees_close, assert_trees_equal
from sam_optax import ascents, descents


def gradient(w):
    return jax.grad(problem.loss)(w, problem.batch())


def step(sam, w=None, grad_fn=gradient):
    """(d, the points at which a gradient was taken) of a first step."""
    w, points = problem.params() if w is None else w, []

    def seen(point):
        points.append(point)
        return grad_fn(point)

    d, _ = sam.update(grad_fn(w), sam.init(w), w, grad_fn=seen)
    return d, points


# --- Unified SAM and Monge SAM.


def test_unified_sam_is_sam_at_one_end_and_usam_at_the_other():
    for lam, limit in ((1.0, sam_optax.sam), (0.0, sam_optax.usam)):
        ours, _ = step(sam_optax.unified_sam(0.3, lam))
        theirs, _ = step(limit(0.3))
        assert_trees_close(ours, theirs, rtol=1e-6)
        assert not are_equal(theirs, gradient(problem.params()))


@pytest.mark.parametrize("lam", [-0.1, 1.1])
def test_unified_sam_wants_a_share(lam):
    with pytest.raises(ValueError, match="lam must be >= 0 and <= 1"):
        sam_optax.unified_sam(lam=lam)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_partly_normalized_nan_is_nan_everywhere(lam):
    g = {"a": jnp.array([1.0, jnp.nan]), "b": jnp.ones(2)}
    u, _ = ascents.normalize_partly(lam).update(g, (), g)
    assert all(jnp.isnan(x).all() for x in jax.tree.leaves(u))


def test_monge_sam_does_not_leave_the_range_of_floats():
    tx = ascents.monge_sam(rho=2.0)
    for scale in (1e-30, 1e30):
        g = {"a": jnp.array([3.0, 4.0]) * jnp.float32(scale)}
        u = tx.update(g, tx.init(g), g)[0]["a"]
        wanted = 2 * np.array([0.6, 0.8]) / np.hypot(1, 5 * scale)
        np.testing.assert_allclose(u, wanted, rtol=1e-6)


# --- LE-SAM.


def test_le_sam_raises_the_loss_by_sigma_as_far_as_the_radius_allows():
    tx = ascents.le_sam(rho=2.0, sigma=0.5)
    for slope, length in ((0.0, 0), (1e-30, 2), (0.1, 2), (0.5, 1), (5e30, 1e-31)):
        g = {"a": jnp.array([0.6, -0.8]) * jnp.float32(slope)}
        epsilon = tx.update(g, tx.init(g), g)[0]["a"]
        np.testing.assert_allclose(epsilon, length * np.array([0.6, -0.8]), rtol=1e-5)


@pytest.mark.parametrize("name", ["rho", "sigma"])
def test_le_sam_refuses_negative_numbers(name):
    with pytest.raises(ValueError, match=f"{name} must be >= 0"):
        sam_optax.le_sam(**{name: -0.1})


# --- SAGM.


def test_sagm_released_is_half_of_the_papers():
    paper, _ = step(sam_optax.sagm(0.3, 0.2))
    released, _ = step(sam_optax.sagm(0.3, 0.2, as_released=True))
    assert_trees_equal(paper, jax.tree.map(lambda d: 2 * d, released))


# --- ZSharp.


def test_zsharp_keeps_the_entries_that_stand_out_in_each_leaf():
    rng = np.random.default_rng(0)
    g = {"a": rng.normal(3.0, 1.0, (4, 5)), "b": 100 * rng.normal(size=10)}
    g = jax.tree.map(jnp.float32, g)
    tx = ascents.zsharp(rho=0.5, quantile=0.7)
    epsilon, _ = tx.update(g, tx.init(g), g)
    kept = {}
    for name, leaf in g.items():
        flat = np.asarray(leaf, np.float64).ravel()
        z = np.abs(flat - flat.mean()) / flat.std()
        kept[name] = np.where(z > np.quantile(z, 0.7), flat, 0).reshape(leaf.shape)
        assert np.count_nonzero(kept[name]) == np.ceil(0.3 * flat.size - 1e-9)
    length = np.sqrt(sum(np.sum(k**2) for k in kept.values()))
    assert_trees_close(
        epsilon, jax.tree.map(lambda k: 0.5 * k / length, kept), rtol=1e-5
    )


def test_zsharp_ascends_along_all_of_g_where_nothing_stands_out():
    g = {"a": jnp.full((2, 3), 2.0), "b": jnp.float32(-1.0)}
    for released in (False, True):
        tx = ascents.zsharp(rho=0.5, as_released=released)
        plain = ascents.sam(rho=0.5)
        assert_trees_close(
            tx.update(g, tx.init(g), g)[0],
            plain.update(g, plain.init(g), g)[0],
            rtol=1e-6,
        )


def test_zsharp_hides_no_nan():
    """In a leaf of which nothing is kept, too."""
    g = {"a": jnp.arange(20.0), "b": jnp.array([1.0, jnp.nan, 2.0])}
    for released in (False, True):
        tx = ascents.zsharp(as_released=released)
        epsilon, _ = tx.update(g, tx.init(g), g)
        assert not all_finite(epsilon["b"])


# --- CR-SAM and GAM.


def test_cr_sam_looks_on_both_sides_of_the_parameters():
    w = problem.params()
    d, (ahead, behind) = step(sam_optax.cr_sam(0.3, 0.0, 0.0))
    assert_trees_close(
        jax.tree.map(lambda a, b: (a + b) / 2, ahead, behind), w, rtol=1e-5
    )
    assert_trees_equal(d, gradient(ahead))  # SAM, with neither of the two terms


def test_gam_by_hand():
    w = problem.params()
    d, points = step(sam_optax.gam(0.3, 0.1, 0.7, 0.2, 0.6))

    def shift(point, length, direction):
        leaves = jax.tree.leaves(direction)
        norm = jnp.sqrt(sum(jnp.sum(x**2) for x in leaves))
        return jax.tree.map(lambda p, x: p + length * x / norm, point, direction)

    def mix(share, a, b):
        return jax.tree.map(lambda a, b: share * a + (1 - share) * b, a, b)

    def dot(a, b):
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))

    g = gradient(w)
    first = shift(w, 0.1, g)
    second = shift(w, 0.3, jax.tree.map(jnp.subtract, gradient(first), g))
    third = shift(second, 0.1, gradient(second))
    for point, wanted in zip(points, (first, second, third), strict=True):
        assert_trees_close(point, wanted, rtol=1e-5, atol=1e-5)
    above = mix(0.7, gradient(first), gradient(third))
    below = mix(0.2, g, gradient(second))
    share = dot(below, above) / dot(above, above)
    wanted = jax.tree.map(lambda a, b: a - 0.6 * (b - share * a), above, below)
    assert_trees_close(d, wanted, rtol=1e-4, atol=1e-5)


def test_gam_moves_no_masked_leaf_at_any_point():
    mask = {"a": True, "b": {"c": False, "d": True}}
    for adaptive in (False, True):
        sam = sam_optax.gam(0.3, 0.1, adaptive=adaptive, mask=mask)
        d, points = step(sam)
        assert len(points) == 3
        for point in points:
            assert_trees_equal(point["b"]["c"], problem.params()["b"]["c"])
            assert not are_equal(point["a"], problem.params()["a"])
        assert np.any(d["b"]["c"])


def test_gam_makes_no_direction_of_rounding():
    """The gradients differ in their last digits alone, so w₂ is w."""
    g = {"a": jnp.linspace(1.0, 2.0, 50)}
    w = {"a": jnp.zeros(50)}

    def nearly_constant(point):
        noise = 1e-7 * jnp.sin(1e4 * point["a"])
        return {"a": g["a"] * (1 + noise)}

    _, (_, second, _) = step(sam_optax.gam(0.5, 0.1), w, nearly_constant)
    assert_trees_equal(second, w)


@pytest.mark.parametrize("name", ["gam", "cr_sam"])
def test_further_gradients_need_a_grad_fn(name):
    descent, w = getattr(descents, name)(), jnp.ones(2)
    with pytest.raises(ValueError, match="needs grad_fn="):
        descent.update(w, descent.init(w), w, ascent_gradient=w, perturbation=w)
    with pytest.raises(ValueError, match="needs the parameters"):
        descent.update(w, descent.init(w), ascent_gradient=w, grad_fn=gradient)


@pytest.mark.parametrize("name", ["rho", "inner_rho", "beta", "gamma"])
def test_gam_refuses_negative_numbers(name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        sam_optax.gam(**{name: -0.1})


# --- What they cost.


@pytest.mark.parametrize(
    "name",
    ["unified_sam", "monge_sam", "le_sam", "sagm", "cr_sam", "gam", "polyak_sam"],
)
def test_the_compiler_counts_the_gradients_of_the_record(name):
    """In operations of a plain gradient, through the door that knows the losses."""

    def loss(w, x):
        return jnp.mean(jnp.square(jnp.tanh(x @ w["in"]) @ w["out"]))

    def flops(function):
        return jax.jit(function).lower(w, x).compile().cost_analysis()["flops"]

    x = jnp.ones((256, 64))
    w = {"in": jnp.ones((64, 64)), "out": jnp.ones((64, 64))}
    if name in sam_optax.METHODS:
        method = sam_optax.METHODS[name]
        sam, counted = method.make(), method.gradients()
    else:
        (sam, _), counted = getattr(sam_optax, name)(), 2
    helper = sam_optax.sam_value_and_grad(loss, sam)
    cost = flops(lambda w, x: helper(w, x, opt_state=sam.init(w))[1].gradients)
    assert cost / flops(jax.grad(loss)) == pytest.approx(counted, rel=0.06)


@pytest.mark.parametrize("size", [1, 2, 5, 41, 1000])
@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.5, 0.95])
def test_zsharp_keeps_what_is_above_the_quantile(size, quantile):
    """As numpy sorts it, with scores that are equal among them."""
    rng = np.random.default_rng(size)
    g = rng.normal(size=size).astype(np.float32).round(1)
    part = sam_optax.ascents.keep_large_z_scores(quantile)
    kept, _ = part.update(g, part.init(g))
    scores = np.abs(jnp.asarray(g) - jnp.mean(jnp.asarray(g)))
    is_above = scores > np.quantile(scores, quantile, method="lower")
    expected = np.where(is_above, g, 0) if np.any(is_above & (g != 0)) else g
    np.testing.assert_array_equal(kept, expected)
