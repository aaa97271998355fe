"""Equinox: models are trees of parameters, with None where a leaf is not trained."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from lab import assert_trees_close
from methods import TABLE


@pytest.fixture
def sam(kind):
    return TABLE[kind]()


def data(t, size=8):
    rng = np.random.default_rng(t)
    x = jnp.asarray(rng.normal(size=(size, 3)), jnp.float32)
    return x, jnp.sin(x[:, 0])


def test_equinox_models_are_trees_of_parameters(sam):
    """With None where a leaf is not trained, and the numbers of plain arrays."""
    model = eqx.nn.MLP(3, "scalar", 4, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_fn(params, x, y):
        prediction = jax.vmap(eqx.combine(params, static))(x)
        return jnp.mean(jnp.square(prediction - y))

    leaves, structure = jax.tree.flatten(params)

    def loss_of_leaves(leaves, x, y):
        return loss_fn(jax.tree.unflatten(structure, leaves), x, y)

    def train(loss_fn, params):
        tx = optax.chain(sam, optax.sgd(0.1))
        helper = sam_optax.sam_value_and_grad(loss_fn, sam)
        state = tx.init(params)

        @eqx.filter_jit
        def step(params, state, x, y):
            _, grads = helper(params, x, y, opt_state=state)
            updates, state = tx.update(grads, state, params)
            return eqx.apply_updates(params, updates), state

        for t in range(3):
            params, state = step(params, state, *data(t))
        return params

    trained = train(loss_fn, params)
    assert jax.tree.structure(trained) == structure
    expected = train(loss_of_leaves, leaves)
    assert_trees_close(jax.tree.leaves(trained), expected, rtol=1e-5, atol=1e-6)
