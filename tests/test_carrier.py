"""The carrier: gradients of the first door that bring the SAM state along."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import problem
import sam_optax
from lab import assert_trees_close, assert_trees_equal
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


@pytest.mark.parametrize(
    "params",
    [
        {"layer": {"kernel": jnp.ones(2)}, "none": None, "head": [jnp.ones(1), {}]},
        [jnp.ones(2), None, (jnp.ones(1),)],
        (jnp.ones(2),),
        optax.EmaState(jnp.ones(1), {"a": jnp.ones(2)}),
    ],
    ids=["dict", "list", "tuple", "namedtuple"],
)
def test_paths_are_those_of_the_parameters(params):
    sam = sam_optax.sam()
    helper = sam_value_and_grad(lambda w: optax.tree.norm(w, squared=True), sam)
    _, grads = helper(params, opt_state=sam.init(params))
    paths = [
        [
            jax.tree_util.keystr(path)
            for path, _ in jax.tree_util.tree_leaves_with_path(x)
        ]
        for x in (params, grads)
    ]
    assert paths[0] == paths[1] != []
    doubled = jax.tree.map(lambda x: 2 * x, grads)
    assert_trees_equal(doubled.gradients, optax.tree.scale(2, grads.gradients))
    assert jax.tree.structure(doubled.gradients) == jax.tree.structure(params)


def test_gradients_that_are_frozen_by_name_stay_frozen():
    sam = sam_optax.fsam()
    state, params = state_and_params(sam)

    def freeze(path, x):
        return jnp.zeros_like(x) if path[0].key == "b" else x

    @jax.jit
    def step(params, state):
        grads = carried(sam, params, state)
        return sam.update(
            jax.tree_util.tree_map_with_path(freeze, grads), state, params
        )

    d, _ = step(params, state)
    assert set(d) == {"a", "b"}
    assert all(np.all(x == 0) for x in jax.tree.leaves(d["b"]))
    assert any(np.any(x != 0) for x in jax.tree.leaves(d["a"]))


def test_nothing_of_a_trace_outlives_it():
    """JAX's caches keep the structure of what goes through an inner jit or cond."""
    sam = sam_optax.fsam()
    state, params = state_and_params(sam)
    halve = jax.jit(lambda grads: jax.tree.map(lambda x: x / 2, grads))

    def negate(grads):
        return jax.tree.map(jnp.negative, grads)

    @jax.jit
    def step(params, state):
        grads = halve(carried(sam, params, state))
        grads = jax.lax.cond(grads.gradients["a"][0, 0] > 0, negate, negate, grads)
        return sam.update(grads, state, params)

    with jax.checking_leaks():
        d, _ = step(params, state)
    whole = carried(sam, params, state).gradients
    assert_trees_close(d, optax.tree.scale(-0.5, whole), rtol=1e-5, atol=1e-6)


def test_leaves_and_structure_alone_make_gradients_without_a_state():
    sam = sam_optax.fsam()
    state, params = state_and_params(sam)
    grads = carried(sam, params, state)
    leaves, structure = jax.tree.flatten(grads)
    sam.update(structure.unflatten(leaves), state, params)  # while they are there
    del grads
    again = structure.unflatten(leaves)
    assert_trees_equal(jax.tree.leaves(again), leaves)
    with pytest.raises(ValueError, match="keep the gradients themselves"):
        sam.update(again, state, params)
    with pytest.raises(ValueError, match="belongs to a trace that has ended"):
        _ = again.report
    assert_trees_equal(again.replace(again.gradients).gradients, again.gradients)
