"""The gradient-norm penalty as its authors released it: g/‖g‖ in the place of g."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sam_optax
from doors import DOORS
from quadratic import H, W, assert_same, descend


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("door", DOORS)
def test_as_released_mixes_the_normalised_gradient(door):
    """With every number on a schedule; one norm runs over both leaves."""

    def rho(t):
        return 0.5 - 0.1 * t

    def alpha(t):
        return 0.2 + 0.15 * t

    w, wanted = W, []
    for t in range(4):
        g = H @ w
        unit = g / np.linalg.norm(g)
        ga = H @ (w + rho(t) * unit)
        w = w - 0.1 * ((1 - alpha(t)) * unit + alpha(t) * ga)
        wanted.append(w)
    sam = sam_optax.gradient_norm_penalty(rho, alpha, as_released=True)
    assert_same(descend(sam, door=DOORS[door]), np.stack(wanted))


def test_as_released_is_zero_where_the_gradient_is():
    sam, w = sam_optax.gradient_norm_penalty(0.5, as_released=True), jnp.zeros(3)
    d, _ = sam.update(w, sam.init(w), w, grad_fn=lambda p: 2 * p)
    np.testing.assert_array_equal(d, 0)


def test_as_released_shows_a_gradient_that_is_not_finite():
    sam, w = sam_optax.gradient_norm_penalty(0.5, as_released=True), jnp.ones(3)
    d, _ = sam.update(
        w.at[0].set(jnp.inf), sam.init(w), w, grad_fn=lambda p: jnp.ones(3)
    )
    assert not np.any(np.isfinite(d))


@pytest.mark.filterwarnings("ignore:Some perturbed parameters")
def test_as_released_in_half_precision():
    """The norm of 300 leaves float16, but d = (1 − α) g/‖g‖ + α gᵃ does not."""
    w = {"a": jnp.zeros(4, jnp.float16), "b": jnp.zeros((), jnp.float16)}
    g = jax.tree.map(lambda w: jnp.full_like(w, 300), w)
    sam = sam_optax.gradient_norm_penalty(0.5, 0.5, as_released=True)
    d, _ = jax.jit(lambda g, w: sam.update(g, sam.init(w), w, grad_fn=lambda p: p))(
        g, w
    )
    for leaf in jax.tree.leaves(d):
        assert leaf.dtype == jnp.float16
        np.testing.assert_allclose(leaf, 0.75 / np.sqrt(5), rtol=1e-3)
