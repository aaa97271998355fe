"""The two doors: the same step through each, and what `sam_value_and_grad` returns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import problem
import sam_optax
from doors import DOORS, door1
from lab import assert_trees_close, bench, lab, train, with_loss
from methods import TABLE


def test_the_two_doors_are_one_mathematics(kind):
    """The same parameters and the same state."""
    results = []
    for door in DOORS:
        tx, step = bench(kind, door).training
        results.append(train(step, problem.params(), tx.init(problem.params()), 5))
    assert_trees_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_a_door_trains_by_the_gradients_of_the_transformation(kind):
    """Numbers, through a door, are the schedules that a contract passes by hand."""
    row = TABLE[kind]
    for ascend in (True,) if row.ascends_always else (True, None):
        sam = row(**row.values())
        tx = optax.chain(sam, optax.sgd(0.1))
        step = door1(sam, tx, problem.loss)
        params, state = problem.params(), tx.init(problem.params())
        for t, (w, _) in enumerate(lab(kind).run(3, ascend=ascend)):
            assert_trees_close(params, w, rtol=1e-5, atol=1e-6)
            params, state, loss = step(params, state, problem.batch(t), ascend=ascend)
            np.testing.assert_allclose(loss, problem.loss(w, problem.batch(t)), 1e-5)


def test_value_and_aux_are_those_of_the_unperturbed_pass(kind):
    """And both passes draw the same dropout mask: d is the plain gradient with this key
    at the perturbed point."""
    row = TABLE[kind]

    def loss_fn(params, batch, *, dropout):
        x, y = batch
        keep = jax.random.bernoulli(dropout, 0.5, x.shape)
        loss = problem.loss(params, (x * keep, y))
        return loss, {"logits": params["a"] * 2, "loss": loss}

    sam, params = row(rho=0.3), problem.params()
    helper = sam_optax.sam_value_and_grad(loss_fn, sam, has_aux=True)
    step = jax.jit(
        lambda state, batch, dropout: helper(
            params, batch, dropout=dropout, opt_state=state, ascend=True
        )
    )
    state = sam.init(params)
    for t in range(2):
        batch, dropout = problem.batch(t), jax.random.key(7 + t)
        points = []

        def grad_fn(point, batch=batch, dropout=dropout, points=points):
            points.append(point)
            take = jax.value_and_grad(loss_fn, has_aux=True)
            (loss, _), gradient = take(point, batch, dropout=dropout)
            return with_loss(loss, gradient)

        value, grads = step(state, batch, dropout)
        expected = loss_fn(params, batch, dropout=dropout)
        assert_trees_close(value, expected, rtol=1e-6)
        g = grad_fn(params).gradient
        _, state = sam.update(g, state, params, grad_fn=grad_fn, ascend=True)
        if row.descends_on_ga:
            d = grad_fn(points[-1]).gradient
            assert_trees_close(grads.gradients, d, rtol=1e-4, atol=1e-5)
    # On the second step, for the first gradient of all may perturb nothing.
    assert optax.tree.norm(optax.tree.sub(points[-1], params)) > 0.01


def test_a_loss_with_a_shape_is_averaged():
    def per_example(params, batch):
        x, y = batch
        hidden = jnp.tanh(x @ params["a"] + params["b"]["c"])
        return jnp.square(jnp.sum(hidden, axis=-1) * params["b"]["d"] - y)

    sam, params = sam_optax.sam(0.1), problem.params()
    results = []
    for loss_fn in (per_example, problem.loss):
        helper = sam_optax.sam_value_and_grad(loss_fn, sam)
        loss, grads = helper(params, problem.batch(), opt_state=sam.init(params))
        results.append((loss, sam.update(grads, sam.init(params), params)[0]))
    assert_trees_close(*results, rtol=1e-5, atol=1e-6)


# --- The state is found by its class.

WRAPPINGS = {
    "nested": lambda sam: optax.chain(optax.chain(sam), optax.chain(optax.adam(0.1))),
    "named": lambda sam: optax.named_chain(("sam", sam), ("base", optax.sgd(0.1))),
    "masked": lambda sam: optax.masked(optax.chain(sam, optax.sgd(0.1)), True),
    "partition": lambda sam: optax.partition(
        {"all": optax.chain(sam, optax.sgd(0.1))}, "all"
    ),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_the_state_is_found_in_what_optax_wraps(kind, wrapping):
    sam = TABLE[kind]()
    tx = WRAPPINGS[wrapping](sam)
    params = problem.params()
    state = jax.eval_shape(tx.init, params)
    step = door1(sam, tx, problem.loss)
    after = jax.eval_shape(step, params, state, problem.batch())
    assert jax.tree.structure(after[1]) == jax.tree.structure(state)
