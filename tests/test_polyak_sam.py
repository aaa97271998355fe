"""SAM with Polyak's step: its step size, and where that comes from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from doors import DOORS
from quadratic import H, W, assert_same, quadratic, split, whole

door2 = functools.partial(DOORS["door2"], value_at="parameters")  # with losses


def loss(w):
    return 0.5 * w @ H @ w


def visit(sam, tx, *, ascend=None, steps=4, door=door2):
    """(the points, the step sizes) of some steps on the quadratic."""
    step = jax.jit(functools.partial(door(sam, tx, quadratic), ascend=ascend))
    params, found = split(W), []
    state = tx.init(params)
    for _ in range(steps):
        params, state, _ = step(params, state)
        found.append((whole(params), optax.tree.get(state, "polyak_step")))
    return map(np.stack, zip(*found, strict=True))


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("door", [DOORS["door1"], door2], ids=DOORS)
def test_the_tangent_reaches_the_bound(door):
    """Where neither limit is met: L(w+ε) − ⟨gᵃ, ε⟩ − γ ‖gᵃ‖² is the lower bound."""
    sam, tx = sam_optax.polyak_sam(0.3, 0.5, lower_bound=-0.2, weight_decay=0.1)
    points, sizes = visit(sam, tx, door=door)
    w = W
    for point, size in zip(points, sizes, strict=True):
        g = H @ w
        e = 0.3 * (0.5 + 0.5 / np.linalg.norm(g)) * g
        ga = H @ (w + e)
        wanted = (loss(w + e) + 0.2 - ga @ e) / (ga @ ga)
        assert 0 < wanted < 1
        assert_same(size, wanted)
        w = w - wanted * (ga + 0.1 * w)
        assert_same(point, w)


@pytest.mark.usefixtures("double_precision")
def test_the_step_stays_between_zero_and_its_maximum():
    for lower_bound, limit in ((-1e3, 0.01), (1e3, 0.0)):
        sam, tx = sam_optax.polyak_sam(0.3, lower_bound=lower_bound, max_step=0.01)
        _, sizes = visit(sam, tx)
        assert_same(sizes, limit)


@pytest.mark.usefixtures("double_precision")
def test_a_step_that_does_not_ascend_has_polyaks_step_at_the_parameters():
    for ascend in (False, jnp.asarray(False)):
        points, sizes = visit(*sam_optax.polyak_sam(0.3), ascend=ascend, steps=1)
        g = H @ W
        assert_same(sizes[0], loss(W) / (g @ g))
        assert_same(points[0], W - sizes[0] * g)


def test_a_mask_keeps_the_perturbation_to_its_leaves():
    sam, tx = sam_optax.polyak_sam(0.3, mask={"x": True, "y": False})
    (point,), _ = visit(sam, tx, steps=1)
    g = (H @ W) * [1, 1, 0]
    e = 0.3 * g / np.linalg.norm(g)
    ga = H @ (W + e)
    step = (loss(W + e) - ga @ e) / (ga @ ga)
    np.testing.assert_allclose(point, W - step * ga, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_gradients_whose_squares_leave_the_range_of_floats(scale):
    """On a linear loss, the step leads to where it is zero."""
    sam, tx = sam_optax.polyak_sam(max_step=jnp.inf)
    w = jnp.array([1.0, 1.0])
    helper = sam_optax.sam_value_and_grad(lambda w: scale * jnp.sum(w), sam)
    _, grads = helper(w, opt_state=tx.init(w))
    updates, _ = tx.update(grads, tx.init(w), w)
    np.testing.assert_allclose(w + updates, 0, atol=1e-5)


def test_a_zero_gradient_moves_nothing():
    sam, tx = sam_optax.polyak_sam()
    w = jnp.ones(2)
    helper = sam_optax.sam_value_and_grad(lambda w: 1.0 + 0 * jnp.sum(w), sam)
    _, grads = helper(w, opt_state=tx.init(w))
    updates, state = tx.update(grads, tx.init(w), w)
    np.testing.assert_array_equal(updates, 0)
    assert jnp.isfinite(optax.tree.get(state, "polyak_step"))


@pytest.mark.parametrize(
    ("lower_bound", "max_step", "expected"),
    [(0.3, 0.5, 0.5), (1.0, 0.5, 0.0), (2.0, 0.5, 0.0), (0.3, np.inf, 0.0)],
)
def test_without_a_slope_the_longest_step_decays_the_weights(
    lower_bound, max_step, expected
):
    """The formula is [1 − ℓ]₊/0 there; an infinite step would make NaN of 0 · ∞."""
    sam, tx = sam_optax.polyak_sam(
        lower_bound=lower_bound, max_step=max_step, weight_decay=0.1
    )
    w = jnp.full(2, 3.0)
    helper = sam_optax.sam_value_and_grad(lambda w: 1.0 + 0 * jnp.sum(w), sam)
    _, grads = helper(w, opt_state=tx.init(w))
    updates, state = tx.update(grads, tx.init(w), w)
    assert optax.tree.get(state, "polyak_step") == expected
    np.testing.assert_allclose(updates, -expected * 0.1 * w, rtol=1e-6)


@pytest.mark.parametrize("guard", [True, False])
def test_what_is_not_finite_is_seen_and_with_the_guard_not_carried(guard):
    sam, tx = sam_optax.polyak_sam(0.3, guard=guard)

    def step(w, state, factor):
        helper = sam_optax.sam_value_and_grad(lambda w: factor * jnp.sum(w**2), sam)
        _, grads = helper(w, opt_state=state)
        return tx.update(grads, state, w)

    w = jnp.ones(2)
    _, state = step(w, tx.init(w), 1.0)
    updates, after = step(w, state, jnp.nan)
    assert jnp.isnan(updates).all()
    sizes = [optax.tree.get(s, "polyak_step") for s in (state, after)]
    assert bool(jnp.isnan(sizes[1])) is not guard
    assert not guard or sizes[0] == sizes[1]


@pytest.mark.filterwarnings("ignore:Some perturbed parameters")
def test_updates_keep_the_dtype_of_the_parameters():
    sam, tx = sam_optax.polyak_sam(0.3)
    w = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2)}
    helper = sam_optax.sam_value_and_grad(
        lambda w: jnp.sum(w["a"].astype(jnp.float32) ** 2) + jnp.sum(w["b"] ** 2), sam
    )
    state = tx.init(w)
    updates, after = tx.update(helper(w, opt_state=state)[1], state, w)
    assert jax.tree.map(jnp.result_type, updates) == jax.tree.map(jnp.result_type, w)
    for carried in (state, after):
        assert optax.tree.get(carried, "polyak_step").dtype == jnp.float32


@pytest.mark.slow
def test_under_groups_the_step_is_made_of_the_means():
    """Of the loss, gᵃ and ε; the last of these is that of the whole batch."""
    sam, tx = sam_optax.polyak_sam(0.3)

    def losses(w, x):
        return jnp.sum((w - x) ** 2, -1)

    w, x = jnp.array([1.0, 2.0]), jnp.array([[0.0, 1.0], [2.0, -1.0]])
    helper = sam_optax.sam_value_and_grad(losses, sam, m=1)
    state = tx.init(w)
    updates, after = tx.update(helper(w, x, opt_state=state)[1], state, w)

    def perturbed(g):
        return w + 0.3 * g / jnp.linalg.norm(g)

    there = jnp.stack([perturbed(2 * (w - example)) for example in x])
    ga = jnp.mean(2 * (there - x), 0)
    e = perturbed(2 * (w - x.mean(0))) - w
    step = (jnp.mean(jnp.sum((there - x) ** 2, -1)) - ga @ e) / (ga @ ga)
    found = optax.tree.get(after, "polyak_step")
    np.testing.assert_allclose(found, step, rtol=1e-5)
    np.testing.assert_allclose(updates, -step * ga, rtol=1e-5)


# --- Bad input.


def test_the_optimizer_in_the_place_of_sam_is_refused():
    """It would scale the gradients by −γ, and its own update once more: uphill."""
    _, tx = sam_optax.polyak_sam()
    w = jnp.ones(2)
    helper = sam_optax.sam_value_and_grad(lambda w: jnp.sum(w**2), tx)
    with pytest.raises(ValueError, match="must be the SAM transformation itself"):
        helper(w, opt_state=tx.init(w))


def test_a_grad_fn_without_losses_says_where_they_come_from():
    _, tx = sam_optax.polyak_sam()
    w = jnp.ones(2)
    with pytest.raises(ValueError, match="needs the loss"):
        tx.update(w, tx.init(w), w, grad_fn=lambda p: 2 * p)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rho": -0.1}, "rho must be"),
        ({"lam": 1.5}, "lam must be"),
        ({"lower_bound": float("nan")}, "lower_bound must be"),
        ({"max_step": 0.0}, "max_step must be > 0"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
    ],
)
def test_numbers_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        sam_optax.polyak_sam(**arguments)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_loss_that_is_not_finite_makes_no_step_though_its_gradient_is(bad):
    def loss_fn(params, offset):
        return quadratic(params) + jax.lax.stop_gradient(offset)

    sam, tx = sam_optax.polyak_sam(0.3)
    helper = sam_optax.sam_value_and_grad(loss_fn, sam)
    params = split(W)
    state = tx.init(params)
    for offset in (0.0, bad):
        before = state
        _, grads = helper(params, jnp.asarray(offset), opt_state=state)
        updates, state = tx.update(grads, state, params)
    assert all(jnp.isnan(x).all() for x in jax.tree.leaves(updates))
    sizes = [optax.tree.get(s, "polyak_step") for s in (before, state)]
    assert sizes[0] == sizes[1] > 0
