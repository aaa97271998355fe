"""BiSAM's ascent loss: its formula, its range and its bad inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_optax import bisam_loss

LOGITS = np.array([[[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]]])
LABELS = np.array([[0, 2]])


@pytest.mark.parametrize(
    ("options", "phi", "mu"),
    [
        ({}, lambda x: 1 - np.log(1 + np.exp(np.log(np.e - 1) - x)), 1.0),
        ({"bound": "tanh"}, lambda x: np.tanh(0.1 * x), 10.0),
        ({"bound": "tanh", "mu": 3.0, "alpha": 2.0}, lambda x: np.tanh(2 * x), 3.0),
    ],
)
def test_the_formula_on_examples_of_any_shape(options, phi, mu):
    margin = LOGITS - np.array([[[2.0], [1.0]]])
    wanted = np.log(np.exp(mu * phi(margin)).sum(-1)) / mu
    found = bisam_loss(jnp.float32(LOGITS), jnp.int32(LABELS), **options)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("bound", ["log", "tanh"])
def test_large_logits_in_half_precision_have_finite_losses_and_gradients(bound):
    logits = jnp.float16([[6e4, -6e4, 0.0]])

    def loss(z, label):
        return bisam_loss(z, label[None], bound=bound)[0]

    for label in range(3):
        value, slope = jax.value_and_grad(loss)(logits, jnp.array(label))
        assert value.dtype == jnp.float32
        assert jnp.isfinite(value)
        assert jnp.isfinite(slope).all()


def test_both_bounds_are_below_the_step_function():
    margin = jnp.linspace(-20, 20, 401)
    logits = jnp.stack([jnp.zeros(401), margin], -1)
    for bound in ("log", "tanh"):
        # With a large mu, the loss is the largest of φ(0) = 0 and φ(margin).
        loss = bisam_loss(logits, jnp.zeros(401, int), bound=bound, mu=1e4)
        assert jnp.all(loss <= (margin > 0) + 1e-3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bound": "exp"}, ValueError, "bound must be 'log' or 'tanh', got 'exp'"),
        ({"mu": 0.0}, ValueError, "mu must be > 0"),
        ({"alpha": -1.0}, ValueError, "alpha must be > 0"),
        ({"mu": "1"}, TypeError, "mu must be a number"),
        ({"labels": jnp.ones((1, 2))}, TypeError, "labels must be integers"),
        ({"labels": jnp.ones((2, 1), int)}, ValueError, "the shape of labels"),
        ({"logits": jnp.float32(1.0)}, ValueError, "the shape of labels"),
    ],
)
def test_what_cannot_be_says_why(change, error, message):
    given = {"logits": jnp.float32(LOGITS), "labels": jnp.int32(LABELS)} | change
    with pytest.raises(error, match=message):
        bisam_loss(given.pop("logits"), given.pop("labels"), **given)
