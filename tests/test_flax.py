"""Flax training loops: Linen's TrainState unmodified, and NNX's Optimizer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from flax.training.train_state import TrainState

import sam_optax
import sam_optax.nnx
from lab import assert_trees_close
from methods import BOTH_DOORS, TABLE


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.tanh(nn.Dense(4)(x)))[..., 0]


def data(t):
    rng = np.random.default_rng(t)
    x = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    return x, jnp.sin(x[:, 0])


@pytest.mark.parametrize(
    "options", [{"m": -1}, {"map_groups": "x"}, {"data": 3}, {"batch_argnums": "x"}]
)
def test_nnx_gradients_check_their_options_when_built(options):
    with pytest.raises((TypeError, ValueError)):
        sam_optax.nnx.value_and_ascent_grad(lambda model, x: x, **options)


@pytest.mark.parametrize(
    ("name", "frozen"), [*[(name, False) for name in TABLE], ("sam", True)]
)
def test_train_state_works_unmodified(name, frozen):
    """And gives what SAM written by hand gives, frozen dict or not."""
    row = TABLE[name]
    model = Linen()
    params = model.init(jax.random.key(0), data(0)[0])["params"]
    if frozen:
        params = freeze(params)
    sam = row()
    tx = optax.chain(sam, optax.adamw(0.01))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    def loss_fn(params, batch):
        x, y = batch
        return jnp.mean(jnp.square(state.apply_fn({"params": params}, x) - y))

    loss_and_grads = sam_optax.sam_value_and_grad(loss_fn, sam)

    @jax.jit
    def train_step(state, batch):
        loss, grads = loss_and_grads(state.params, batch, opt_state=state.opt_state)
        return state.apply_gradients(grads=grads), loss

    w, opt_state = params, tx.init(params)
    for t in range(2):
        state, loss = train_step(state, data(t))

        def grad_fn(w, t=t):
            return jax.grad(loss_fn)(w, data(t))

        np.testing.assert_allclose(loss, loss_fn(w, data(t)), rtol=1e-5)
        updates, opt_state = tx.update(grad_fn(w), opt_state, w, grad_fn=grad_fn)
        w = optax.apply_updates(w, updates)
    assert int(state.step) == 2
    assert_trees_close(state.params, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(BOTH_DOORS))
def test_nnx_optimizer_forwards_grad_fn(name):
    row = TABLE[name]

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(3, 4, rngs=rngs)
            self.out = nnx.Linear(4, 1, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.tanh(self.hidden(x)))[..., 0]

    model = Model(nnx.Rngs(0))
    sam = row()
    tx = optax.chain(sam, optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    graph, params = nnx.split(model, nnx.Param)

    def loss_of_params(params, batch):
        x, y = batch
        return jnp.mean(jnp.square(nnx.merge(graph, params, copy=True)(x) - y))

    w = nnx.to_pure_dict(params)
    opt_state = tx.init(w)
    for t in range(2):

        def grad_fn(params, t=t):
            return jax.grad(loss_of_params)(params, data(t))

        g = grad_fn(nnx.state(model, nnx.Param))
        optimizer.update(model, g, grad_fn=grad_fn)

        def pure_grad_fn(w, t=t):
            def loss(w):
                state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
                nnx.replace_by_pure_dict(state, w)
                return loss_of_params(state, data(t))

            return jax.grad(loss)(w)

        updates, opt_state = tx.update(
            pure_grad_fn(w), opt_state, w, grad_fn=pure_grad_fn
        )
        w = optax.apply_updates(w, updates)
    actual = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert_trees_close(actual, w, rtol=1e-5, atol=1e-6)
