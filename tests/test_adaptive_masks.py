"""ASAM's scale under a mask of its own, in each method that has it, by value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sam_optax
from quadratic import H, W, assert_same, descend
from sam_optax import ascents

ONLY_X = {"x": True, "y": False}
IS_X = np.array([True, True, False])


def eta(t):
    return 0.1 + 0.2 * t


def rho(t):
    return 0.5 - 0.1 * t


def scaled(h, w, t):
    """ρ T² h / ‖T h‖ with T = |w| + η on one leaf, and T = 1 on the other."""
    scale = np.where(IS_X, np.abs(w) + eta(t), 1.0)
    return rho(t) * scale**2 * h / np.linalg.norm(scale * h)


def trajectory(perturbation, descent=lambda ga, g: ga, steps=4):
    w, memory, points = W, {}, []
    for t in range(steps):
        g = H @ w
        w = w - 0.1 * descent(H @ (w + scaled(perturbation(g, memory), w, t)), g)
        points.append(w)
    return np.stack(points)


def friendly(g, memory):
    memory["m"] = 0.6 * memory.get("m", 0) + 0.4 * g
    return g - 0.5 * memory["m"]


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("mask", [ONLY_X, lambda params: ONLY_X])
def test_asam(mask):
    sam = sam_optax.asam(rho, eta, adaptive_mask=mask)
    assert_same(descend(sam), trajectory(lambda g, memory: g))


def friendly_as_released(g, memory):
    before = memory.get("m")
    memory["m"] = g if before is None else 0.6 * before + 0.4 * g
    return g if before is None else g - 0.5 * before


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("as_released", [False, True])
def test_fasam(as_released):
    sam = sam_optax.fasam(
        rho, eta, 0.5, 0.6, adaptive_mask=ONLY_X, as_released=as_released
    )
    wanted = trajectory(friendly_as_released if as_released else friendly)
    assert_same(descend(sam), wanted)


@pytest.mark.usefixtures("double_precision")
def test_stable_asam():
    def stable(ga, g):
        return np.linalg.norm(g) / np.linalg.norm(ga) * ga

    sam = sam_optax.stable_asam(rho, eta, adaptive_mask=ONLY_X)
    assert_same(descend(sam), trajectory(lambda g, memory: g, stable))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_scale_of_half_precision_parameters_is_in_single_precision(dtype):
    """η = 2⁻¹² is lost beside 1 in half precision, and 300² leaves float16."""
    tx = ascents.scale_by_magnitude(eta=2**-12)
    w = {"a": jnp.ones(2, dtype), "b": jnp.full(2, -300, dtype)}
    g = {"a": jnp.ones(2, dtype), "b": jnp.full(2, 300, dtype)}
    u, _ = tx.update(g, tx.init(w), w)
    assert u["a"].dtype == u["b"].dtype == jnp.float32
    np.testing.assert_array_equal(u["a"], 1 + 2**-12)
    np.testing.assert_allclose(u["b"], 300 * (300 + 2**-12), rtol=1e-7)


def test_double_precision_gradients_have_their_digits_beside_single_parameters():
    with jax.enable_x64(True):
        tx, w = ascents.scale_by_magnitude(0.1), jnp.ones(2, jnp.float32)
        g = jnp.full(2, 1 / 3, jnp.float64)
        u, _ = tx.update(g, tx.init(w), w)
        assert u.dtype == jnp.float64
        np.testing.assert_allclose(u, 1.1 / 3, rtol=1e-15)


def test_the_scale_needs_the_parameters_and_an_eta_that_can_be():
    tx, g = ascents.scale_by_magnitude(0.1), jnp.ones(2)
    with pytest.raises(ValueError, match="scale_by_magnitude needs the parameters"):
        tx.update(g, tx.init(g))
    with pytest.raises(ValueError, match="eta must be >= 0"):
        ascents.scale_by_magnitude(-0.1)
    with pytest.raises(ValueError, match="rho must be >= 0"):
        ascents.asam(-0.1)
    with pytest.raises(TypeError, match="adaptive_mask must be a tree of bools"):
        ascents.scale_by_magnitude(adaptive_mask=True)


def test_eta_may_be_zero():
    tx, w = ascents.scale_by_magnitude(0.0), jnp.array([0.0, -2.0])
    u, _ = tx.update(jnp.ones(2), tx.init(w), w)
    np.testing.assert_array_equal(u, [0.0, 2.0])
