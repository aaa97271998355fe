"""Every descent's d against its formula, on a quadratic in float64."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from doors import DOORS
from quadratic import (
    H,
    W,
    assert_same,
    descend,
    descending,
    grad_fn,
    orthogonal_to,
    split,
    visit,
    whole,
)

pytestmark = pytest.mark.usefixtures("double_precision")


def test_gsam():
    assert_same(
        descend(sam_optax.gsam(0.5, alpha=0.4)),
        descending(lambda ga, g, e, w: ga - 0.4 * orthogonal_to(ga, g)),
    )


def test_gsam_that_minimizes_the_loss():
    assert_same(
        descend(sam_optax.gsam(0.5, alpha=0.4, minimize="loss")),
        descending(lambda ga, g, e, w: g + 0.4 * orthogonal_to(g, ga)),
    )


def test_gsam_leaves_the_perturbed_gradients_component_alone():
    w, sam = split(W), sam_optax.gsam(0.5, alpha=0.7)
    d, _ = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
    g = H @ W
    ga = H @ (W + 0.5 * g / np.linalg.norm(g))
    assert (whole(d) - ga) @ ga == pytest.approx(0, abs=1e-12)


def test_a_nearly_parallel_pair_keeps_its_direction_in_float32():
    """Where ‖gᵃ − g‖ is 1e-5 ‖g‖, the naive projection is off by 3e-3."""
    rng = np.random.default_rng(0)
    g = rng.normal(size=1000)
    ga = g + 1e-5 * rng.normal(size=1000)
    g32, ga32 = g.astype(np.float32), ga.astype(np.float32)
    descent = sam_optax.descents.gsam(1.0)
    d, _ = descent.update(
        jnp.asarray(ga32), descent.init(g32), ascent_gradient=jnp.asarray(g32)
    )
    exact = -orthogonal_to(ga32.astype(np.float64), g32.astype(np.float64))
    actual = np.asarray(d, np.float64) - ga32
    # d itself rounds at 1e-7 of its size, which is 1e-2 of the difference; the sum over
    # the entries averages that out.
    cosine = actual @ exact / np.linalg.norm(actual) / np.linalg.norm(exact)
    assert cosine > 1 - 1e-4


def test_sam_plus_gap():
    assert_same(
        descend(sam_optax.sam_plus_gap(0.5, lam=0.3)),
        descending(lambda ga, g, e, w: ga + 0.3 * (ga - g)),
    )


def test_stable_sam():
    def stabilized(ga, g, e, w):
        return np.linalg.norm(g) / np.linalg.norm(ga) * ga

    assert_same(descend(sam_optax.stable_sam(0.5)), descending(stabilized))


@pytest.mark.parametrize("bounds", [(0.0, 0.5), (1.5, 3.0), (0.64, 0.8)])
def test_stable_sam_with_bounds(bounds):
    def stabilized(ga, g, e, w):
        return np.clip(np.linalg.norm(g) / np.linalg.norm(ga), *bounds) * ga

    sam = sam_optax.stable_sam(0.5, minimum=bounds[0], maximum=bounds[1])
    assert_same(descend(sam), descending(stabilized))


def test_stable_asam_paper_and_released():
    for released in (False, True):
        w, visited = W, []
        for _ in range(4):
            g, t = H @ w, np.abs(w) + 0.1
            e = 0.5 * t**2 * g / np.linalg.norm(t * g)
            ga = H @ (w + e)
            if released:
                factor = np.linalg.norm(w * g) / np.linalg.norm((w + e) * ga)
            else:
                factor = np.linalg.norm(g) / np.linalg.norm(ga)
            w = w - 0.1 * factor * ga
            visited.append(w)
        sam = sam_optax.stable_asam(0.5, 0.1, as_released=released)
        assert_same(descend(sam), np.stack(visited))


def test_stable_usam():
    w, visited = W, []
    for _ in range(4):
        g = H @ w
        ga = H @ (w + 0.1 * g)
        w = w - 0.1 * np.linalg.norm(g) / np.linalg.norm(ga) * ga
        visited.append(w)
    assert_same(descend(sam_optax.stable_usam(0.1)), np.stack(visited))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.8])
def test_wsam(gamma):
    weight = gamma / (1 - gamma)
    assert_same(
        descend(sam_optax.wsam(0.5, gamma)),
        descending(lambda ga, g, e, w: (1 - 2 * gamma) / (1 - gamma) * g + weight * ga),
    )


def test_gradient_norm_penalty():
    assert_same(
        descend(sam_optax.gradient_norm_penalty(0.5, alpha=0.3)),
        descending(lambda ga, g, e, w: 0.7 * g + 0.3 * ga),
    )


# --- Decoupled WSAM, which descends beside the base optimizer.


@pytest.mark.parametrize("door", DOORS)
def test_decoupled_wsam_keeps_the_gap_out_of_the_momentum(door):
    """Every number of it on a schedule of its own."""

    def rate(t):
        return 0.1 / (1 + t)

    def rho(t):
        return 0.5 - 0.1 * t

    def gamma(t):
        return 0.8 - 0.1 * t

    sam, tx = sam_optax.decoupled_wsam(
        optax.sgd(rate, momentum=0.9), rate, rho=rho, gamma=gamma
    )
    w, m, wanted = W, np.zeros(3), []
    for t in range(4):
        g = H @ w
        ga = H @ (w + rho(t) * g / np.linalg.norm(g))
        m = 0.9 * m + g
        w = w - rate(t) * m - rate(t) * gamma(t) / (1 - gamma(t)) * (ga - g)
        wanted.append(w)
    assert_same(visit(sam, tx, door=DOORS[door]), np.stack(wanted))


@pytest.mark.parametrize("where", ["at w", "at w + ε"])
def test_decoupled_wsam_stays_where_it_is_after_a_bad_step(where):
    base = optax.apply_if_finite(optax.sgd(0.1), 3)
    _, tx = sam_optax.decoupled_wsam(base, 0.1, rho=0.5)
    w, good = jnp.asarray(W), lambda w: jnp.asarray(H @ np.asarray(w))
    bad = jnp.full(3, jnp.inf)
    updates, state = tx.update(good(w), tx.init(w), w, grad_fn=good)
    w = optax.apply_updates(w, updates)
    g = bad if where == "at w" else good(w)
    updates, after = tx.update(g, state, w, grad_fn=lambda w: bad)
    np.testing.assert_array_equal(updates, 0)
    assert after.descent_optimizer_state.total_notfinite == 1
    np.testing.assert_array_equal(
        after.sharpness_state.descent_state, state.sharpness_state.descent_state
    )
