"""Leaves with more entries than an int32 can count, as stacked layers have."""

import jax
import jax.numpy as jnp
import pytest

import sam_optax


@pytest.mark.parametrize("name", sam_optax.METHODS)
def test_a_step_can_be_traced_on_a_leaf_of_more_than_two_billion_entries(name):
    sam = sam_optax.METHODS[name].make()
    loss_and_grads = sam_optax.sam_value_and_grad(
        lambda w, x: jnp.sum(w["norm"] ** 2) * x, sam
    )

    def step(w, x):
        state = sam.init(w)
        extra = {"full_gradient": w}  # for those that take one
        return loss_and_grads(w, x, opt_state=state, extra_args=extra)[1].gradients

    w = {"norm": jax.ShapeDtypeStruct((2**19, 2**12 + 1), jnp.float32)}
    d = jax.eval_shape(step, w, jnp.ones(()))
    assert d["norm"].shape == w["norm"].shape


def test_a_sparse_perturbation_of_more_than_it_can_count_is_refused():
    w = jax.ShapeDtypeStruct((2**20, 2**12 + 1), jnp.float32)
    with pytest.raises(ValueError, match="4,294,967,295 of them, and these are 4,296"):
        jax.eval_shape(sam_optax.ssam().init, w)
