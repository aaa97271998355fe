"""Decoupled WSAM: what it passes on, and its step beside the base optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from doors import DOORS
from quadratic import H, W, assert_same, grad_fn, split, visit, whole


def rate(t):
    return 0.1 / (1 + t)


def gamma(t):
    return 0.8 - 0.1 * t


def reference(keep, steps=4):
    """With SGD after it, where ε is zero on the entries that are not kept."""
    w, points = W, []
    for t in range(steps):
        g = H @ w
        ga = H @ (w + 0.5 * keep * g / np.linalg.norm(keep * g))
        w = w - rate(t) * g - rate(t) * gamma(t) / (1 - gamma(t)) * (ga - g)
        points.append(w)
    return np.stack(points)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("door", DOORS)
def test_a_mask_keeps_the_perturbation_to_its_leaves(door):
    sam, tx = sam_optax.decoupled_wsam(
        optax.sgd(rate), rate, 0.5, gamma, mask={"x": True, "y": False}
    )
    wanted = reference(np.array([1.0, 1.0, 0.0]))
    assert_same(visit(sam, tx, door=DOORS[door]), wanted)


@pytest.mark.usefixtures("double_precision")
def test_the_gap_of_a_step_is_that_steps():
    """The state holds gᵃ − g of the last step, and counts the steps."""
    _, tx = sam_optax.decoupled_wsam(optax.sgd(rate), rate, 0.5, gamma)
    params = split(W)
    state = tx.init(params)
    for t in range(3):
        w = whole(params)
        g = H @ w
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        ga = H @ (w + 0.5 * g / np.linalg.norm(g))
        assert_same(whole(state.sharpness_state.descent_state), ga - g)
        assert state.decoupled_step == t + 1
        params = optax.apply_updates(params, updates)


def test_the_base_optimizer_sees_the_gradient_the_parameters_and_extra_arguments():
    seen = []

    def update_fn(updates, state, params=None, **extra):
        seen.append((updates, state, params, extra))
        return updates, state + 1

    base = optax.GradientTransformationExtraArgs(lambda params: 0, update_fn)
    _, tx = sam_optax.decoupled_wsam(base, 0.1, rho=0.5)
    w, g = jnp.ones(2), jnp.array([3.0, 4.0])
    state = tx.init(w)
    for t in range(2):
        _, state = tx.update(g, state, w, grad_fn=lambda p: 5 * p, value=7)
        updates, before, params, extra = seen.pop()
        np.testing.assert_array_equal(updates, g)
        assert before == t
        assert params is w
        assert extra["value"] == 7


def test_stochastic_rounding_moves_half_precision_parameters():
    """To nearest, w + ε is w in bfloat16, and there is no gap."""
    w = jnp.ones(1000, jnp.bfloat16)
    g = jnp.ones(1000, jnp.bfloat16)

    def gap(**options):
        _, tx = sam_optax.decoupled_wsam(optax.sgd(0.1), 0.1, rho=0.03, **options)
        points = []
        tx.update(g, tx.init(w), w, grad_fn=lambda p: points.append(p) or g)
        return np.asarray(points[0] - w)

    with pytest.warns(UserWarning, match="Some perturbed parameters"):
        assert not np.any(gap())
    moved = gap(stochastic_rounding=3)
    assert 0 < np.count_nonzero(moved) < 1000
    np.testing.assert_array_equal(moved, gap(stochastic_rounding=3))
    assert np.any(moved != gap(stochastic_rounding=4))


@pytest.mark.filterwarnings("ignore:Some perturbed parameters")
def test_half_precision_gradients_make_a_gap_in_single_precision():
    """1.0078 − 1 has 3 digits less in bfloat16; updates keep the dtype of g."""
    w = {"a": jnp.zeros(2, jnp.bfloat16), "b": jnp.zeros(2)}
    _, tx = sam_optax.decoupled_wsam(optax.sgd(1.0), 1.0, rho=0.5, gamma=0.9)
    g = jax.tree.map(jnp.ones_like, w)
    above = jax.tree.map(lambda g: g * (1 + 2**-7), g)
    updates, state = tx.update(g, tx.init(w), w, grad_fn=lambda p: above)
    for name, gap in state.sharpness_state.descent_state.items():
        assert gap.dtype == jnp.float32
        np.testing.assert_array_equal(gap, 2**-7)
        assert updates[name].dtype == w[name].dtype
        wanted = jnp.asarray(-1 - 9 * 2**-7, jnp.float32).astype(w[name].dtype)
        np.testing.assert_allclose(
            np.asarray(updates[name], np.float32), np.float32(wanted), rtol=1e-6
        )


@pytest.mark.parametrize("guard", [True, False])
def test_after_a_bad_step_no_gap_is_added_unless_the_guard_is_off(guard):
    """Neither that of the step nor that of the step before, which was 2."""
    _, tx = sam_optax.decoupled_wsam(
        optax.identity(), 0.1, rho=0.5, gamma=0.5, guard=guard
    )
    w = jnp.ones(3)
    _, state = tx.update(w, tx.init(w), w, grad_fn=lambda p: 3 * w)
    bad = jnp.array([4.0, jnp.nan, 1.0])
    updates, _ = tx.update(w, state, w, grad_fn=lambda p: bad)
    np.testing.assert_allclose(updates, [1.0 if guard else 0.7, np.nan, 1.0])


@pytest.mark.parametrize("bad", [-0.1, 1.0, 1.5])
def test_a_gamma_that_cannot_be_says_so(bad):
    with pytest.raises(ValueError, match="gamma must be >= 0 and < 1"):
        sam_optax.decoupled_wsam(optax.sgd(0.1), 0.1, gamma=bad)
