"""The carrier: gradients of the first door that bring the SAM state along."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import problem
import sam_optax
from lab import assert_trees_equal
from sam_optax import sam_value_and_grad


def state_and_params(tx):
    params = problem.params()
    return tx.init(params), params


def carried(sam, params, state):
    helper = sam_value_and_grad(problem.loss, sam)
    return helper(params, problem.batch(), opt_state=state)[1]


@pytest.mark.parametrize("name", ["sam", "fsam"])
def test_a_carrier_out_of_a_jitted_function_cannot_be_unpacked_outside(name):
    sam = sam_optax.METHODS[name].make()
    state, params = state_and_params(sam)
    grads = jax.jit(lambda p, s: carried(sam, p, s))(params, state)
    with pytest.raises(ValueError, match=r"another trace.*same jitted function"):
        sam.update(grads, state, params)
    with pytest.raises(ValueError, match=r"another trace.*same jitted function"):
        jax.jit(sam.update)(grads, state, params)


@pytest.mark.parametrize("name", ["sam", "fsam"])
def test_a_carrier_made_eagerly_cannot_be_passed_to_a_jitted_update(name):
    sam = sam_optax.METHODS[name].make()
    state, params = state_and_params(sam)
    grads = carried(sam, params, state)
    with pytest.raises(ValueError, match=r"outside of a jitted function"):
        jax.jit(sam.update)(grads, state, params)
    sam.update(grads, state, params)  # eager in both is well


def test_a_carrier_may_be_unpacked_in_an_inner_trace():
    """A user's own cond around the update, inside the same jitted function."""
    sam = sam_optax.fsam()
    state, params = state_and_params(sam)

    @jax.jit
    def step(params, state, skip):
        grads = carried(sam, params, state)
        return jax.lax.cond(
            skip,
            lambda: (jax.tree.map(jnp.zeros_like, params), state),
            lambda: sam.update(grads, state, params),
        )

    expected = sam.update(carried(sam, params, state), state, params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        step(params, state, False),
        expected,
    )
    assert not np.any(step(params, state, True)[0]["a"])


def test_a_carrier_acts_as_its_gradients_alone():
    sam = sam_optax.fsam()
    state, params = state_and_params(sam)
    grads = carried(sam, params, state)
    d, _ = sam.update(grads, state, params)
    assert_trees_equal(grads.gradients, d)
    assert len(jax.tree.leaves(grads)) == len(jax.tree.leaves(d))
    assert optax.tree.norm(grads) == optax.tree.norm(d)
    assert "params" not in grads
    assert grads.report is None
    assert repr(grads).startswith("SharpnessAwareGradients({")
    halved = jax.tree.map(lambda x: x / 2, grads)
    d_halved, halved_state = sam.update(halved, state, params)
    assert_trees_equal(d_halved, jax.tree.map(lambda x: x / 2, d))
    assert_trees_equal(halved_state, sam.update(grads, state, params)[1])
