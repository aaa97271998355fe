"""A schedule of rho that follows the learning rate."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from quadratic import assert_same, descend, expected

pytestmark = pytest.mark.usefixtures("double_precision")


def test_rho_from_learning_rate_is_linear_between_the_limits():
    learning_rate = optax.cosine_decay_schedule(0.4, 100, alpha=0.25)
    rho = sam_optax.rho_from_learning_rate(
        learning_rate,
        rho_max=0.5,
        rho_min=0.05,
        learning_rate_max=0.4,
        learning_rate_min=0.1,
    )
    for step in (0, 1, 37, 99, 100, 200):
        lr = float(learning_rate(step))
        by_hand = 0.05 + (0.5 - 0.05) * (lr - 0.1) / (0.4 - 0.1)
        assert float(rho(step)) == pytest.approx(by_hand, abs=1e-12)


def test_rho_from_learning_rate_stops_at_zero_below_the_minimum():
    warmup = optax.warmup_cosine_decay_schedule(0.0, 0.4, 10, 100, end_value=0.1)
    rho = sam_optax.rho_from_learning_rate(
        warmup,
        rho_max=0.5,
        rho_min=0.05,
        learning_rate_max=0.4,
        learning_rate_min=0.1,
    )
    assert float(rho(0)) == 0.0
    assert float(rho(10)) == pytest.approx(0.5)


def test_rho_from_learning_rate_drives_a_method():
    schedule = sam_optax.rho_from_learning_rate(
        lambda step: 0.1 * (1 - jnp.asarray(step, jnp.float64) / 4),
        rho_max=0.4,
        rho_min=0.0,
        learning_rate_max=0.1,
    )

    def epsilon(g, w, memory):
        memory["t"] = t = memory.get("t", -1) + 1
        return 0.4 * (1 - t / 4) * g / np.linalg.norm(g)

    assert_same(descend(sam_optax.sam(schedule)), expected(epsilon))


def test_rho_follows_the_updates_of_accumulated_gradients():
    """SAM counts calls, and the base optimizer inside of MultiSteps counts updates."""
    learning_rate = optax.linear_schedule(0.1, 0.0, transition_steps=4)
    rho = sam_optax.rho_from_learning_rate(
        lambda call: learning_rate(call // 2),
        rho_max=0.4,
        rho_min=0.0,
        learning_rate_max=0.1,
    )
    base = optax.MultiSteps(optax.sgd(learning_rate), every_k_schedule=2)
    tx = optax.chain(sam_optax.sam(rho), base)
    w = jnp.array([3.0, 4.0])
    state, radii, rates = tx.init(w), [], []
    for _ in range(6):
        points = []
        updates, state = tx.update(
            w, state, w, grad_fn=lambda point, seen=points: seen.append(point) or w
        )
        radii.append(float(jnp.linalg.norm(points[0] - w)))
        rates.append(float(-updates[0] / w[0]))  # d is w
    np.testing.assert_allclose(radii, [0.4, 0.4, 0.3, 0.3, 0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose(rates, [0, 0.1, 0, 0.075, 0, 0.05], atol=1e-9)
