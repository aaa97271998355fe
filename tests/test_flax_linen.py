"""Flax Linen: TrainState unmodified, batch statistics and dropout of one plain pass."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import freeze
from flax.training.train_state import TrainState

import sam_optax
from lab import assert_trees_close, assert_trees_equal
from methods import TABLE


@pytest.fixture
def sam(kind):
    return TABLE[kind]()


def data(t, size=8):
    rng = np.random.default_rng(t)
    x = jnp.asarray(rng.normal(size=(size, 3)), jnp.float32)
    return x, jnp.sin(x[:, 0])


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.tanh(nn.Dense(4)(x)))[..., 0]


@pytest.mark.gradients_alone
@pytest.mark.parametrize("frozen", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_train_state_works_unmodified(sam, frozen):
    """And gives what the second door gives, frozen dict or not."""
    model = Plain()
    params = model.init(jax.random.key(0), data(0)[0])["params"]
    if frozen:
        params = freeze(params)
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


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        x = nn.Dropout(0.5, deterministic=not train)(nn.tanh(x))
        self.sow("intermediates", "hidden", x)
        return nn.Dense(1)(x)[..., 0]


def linen_training(sam, steps=3):
    """(parameters, batch statistics, hidden layers) of a plain step if sam is None."""
    model = Linen()
    variables = model.init(jax.random.key(0), data(0)[0], train=False)
    stats = {"batch_stats": variables["batch_stats"]}

    def loss_fn(params, stats, x, y, key):
        prediction, changed = model.apply(
            {"params": params, **stats},
            x,
            rngs={"dropout": key},
            mutable=["batch_stats", "intermediates"],
        )
        hidden = changed.pop("intermediates")["hidden"][0]
        return jnp.mean(jnp.square(prediction - y)), (changed, hidden)

    base = optax.sgd(0.1)
    tx = base if sam is None else optax.chain(sam, base)
    if sam is None:
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    else:
        value_and_grad = sam_optax.sam_value_and_grad(loss_fn, sam, has_aux=True)
    state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=tx)

    @jax.jit
    def step(state, stats, batch):
        key = jax.random.fold_in(jax.random.key(1), state.step)
        keywords = {} if sam is None else {"opt_state": state.opt_state}
        (_, aux), grads = value_and_grad(state.params, stats, *batch, key, **keywords)
        return state.apply_gradients(grads=grads), *aux

    for t in range(steps):
        state, stats, hidden = step(state, stats, data(t))
    return state.params, stats, hidden


def test_linen_batch_statistics_are_those_of_a_plain_step_bit_by_bit(sam):
    """Updated once, in the pass at w, whose dropout and sown outputs are a plain
    step's too."""
    _, plain, plain_hidden = linen_training(None, steps=1)
    _, stats, hidden = linen_training(sam, steps=1)
    assert_trees_equal(stats, plain)
    assert_trees_equal(hidden, plain_hidden)


def test_linen_passes_see_the_same_dropout_mask():
    """With no perturbation, the second pass is the first, and training is plain."""
    params, stats, _ = linen_training(sam_optax.sam(0.0))
    plain, plain_stats, _ = linen_training(None)
    assert_trees_close(params, plain, rtol=1e-5, atol=1e-6)
    assert_trees_close(stats, plain_stats, rtol=1e-5, atol=1e-6)
