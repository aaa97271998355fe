"""Training in mixed precision: loss scales, overflows, and narrow computation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import problem
import sam_optax
from lab import all_finite, assert_trees_equal, floats
from methods import TABLE


@pytest.fixture
def sam(kind):
    return TABLE[kind]()


def half_loss(params, batch):
    """In float16, whatever the parameters are."""
    x, y = (a.astype(jnp.float16) for a in batch)
    a, c, d = (
        w.astype(jnp.float16) for w in (params["a"], params["b"]["c"], params["b"]["d"])
    )
    prediction = jnp.sum(jnp.tanh(x @ a + c), axis=-1) * d
    return jnp.mean(jnp.square(prediction - y)).astype(jnp.float32)


def scaled_step(sam, tx, loss_fn):
    """A step with a loss scale, as a user writes it."""
    del sam

    @jax.jit
    def step(params, state, batch, scale):
        def grad_fn(params):
            g = jax.grad(lambda w: loss_fn(w, batch) * scale)(params)
            return jax.tree.map(lambda g: g / scale, g)

        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    return step


@pytest.mark.gradients_alone
def test_the_loss_scale_changes_nothing(sam):
    """Powers of two are exact, so that not a bit may differ."""
    tx = optax.chain(sam, optax.sgd(0.05, momentum=0.9))
    step = scaled_step(sam, tx, problem.loss)
    results = []
    for scale in (1.0, 2.0**12):
        params, state = problem.params(), tx.init(problem.params())
        for t in range(3):
            params, state = step(params, state, problem.batch(t), jnp.float32(scale))
        results.append(params)
    assert_trees_equal(*results)


def test_unscaling_through_the_first_door():
    """The carrier's gradients are divided by the user; its state is not touched."""
    sam = sam_optax.fsam(0.1)
    tx = optax.chain(sam, optax.sgd(0.05))

    def train(scale):
        helper = sam_optax.sam_value_and_grad(
            lambda w, b, s: s * problem.loss(w, b), sam
        )

        @jax.jit
        def step(params, state, batch):
            _, grads = helper(params, batch, jnp.float32(scale), opt_state=state)
            grads = jax.tree.map(lambda d: d / scale, grads)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        params, state = problem.params(), tx.init(problem.params())
        for t in range(3):
            params, state = step(params, state, problem.batch(t))
        return params

    assert_trees_equal(train(1.0), train(2.0**10))


@pytest.mark.gradients_alone
def test_a_float16_overflow_is_skipped_and_poisons_nothing(sam):
    tx = optax.chain(sam, optax.apply_if_finite(optax.sgd(0.05, momentum=0.9), 100))
    step = scaled_step(sam, tx, half_loss)
    params, state = problem.params(), tx.init(problem.params())
    params, state = step(params, state, problem.batch(0), jnp.float32(1.0))
    after, state = step(params, state, problem.batch(1), jnp.float32(2.0**40))
    assert_trees_equal(after, params)
    assert state[1].total_notfinite == 1
    assert all_finite(floats(state))
    later, state = step(after, state, problem.batch(2), jnp.float32(1.0))
    assert all_finite(later)
    assert any(
        np.any(a != b)
        for a, b in zip(jax.tree.leaves(later), jax.tree.leaves(after), strict=True)
    )


def test_float32_parameters_with_bfloat16_compute_do_not_warn(sam):
    def loss_fn(params, batch):
        narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
        return problem.loss(narrow, batch).astype(jnp.float32)

    helper = sam_optax.sam_value_and_grad(loss_fn, sam)
    params = problem.params()
    loss, grads = helper(params, problem.batch(), opt_state=sam.init(params))
    assert loss.dtype == jnp.float32
    exact = sam_optax.sam_value_and_grad(problem.loss, sam)
    _, expected = exact(params, problem.batch(), opt_state=sam.init(params))
    difference = optax.tree.norm(
        optax.tree.sub(grads.gradients, expected.gradients)
    ) / optax.tree.norm(expected.gradients)
    assert 0 < difference < 0.1
