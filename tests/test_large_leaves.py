"""Leaves with more entries than an int32 can count, as stacked layers have."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sam_optax
from sam_optax.methods._order import Count


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


def test_a_sparse_perturbation_counts_further_than_32_bits_over_all_arrays():
    w = [jax.ShapeDtypeStruct((2**19, 2**12 + 1), jnp.float32)] * 3
    for dynamic in (False, True):
        state = jax.eval_shape(sam_optax.ssam(dynamic=dynamic).init, w)
        assert [x.shape for x in jax.tree.leaves(state)][-3:] == [w[0].shape] * 3


def test_a_sparse_perturbation_of_an_array_that_it_cannot_count_is_refused():
    w = jax.ShapeDtypeStruct((2**20, 2**12 + 1), jnp.float32)
    with pytest.raises(ValueError, match="an array of 4,296,015,872"):
        jax.eval_shape(sam_optax.ssam().init, w)


counts = st.integers(0, 2**64 - 1) | st.integers(0, 5) | st.integers(2**32 - 3, 2**33)


def as_int(count):
    assert (count.high.dtype, count.low.dtype) == (jnp.uint32, jnp.uint32)
    return int(count.high) * 2**32 + int(count.low)


@given(counts, counts)
def test_counts_are_those_of_python(a, b):
    a, b = sorted([a, b])
    small, large = Count.of(a), Count.of(b)
    assert as_int(small) == a
    assert as_int(large.minus(small)) == b - a
    assert as_int(large.minus(small).plus(small)) == b
    assert as_int(small.plus(large)) == (a + b) % 2**64
    assert bool(large.at_least(small))
    assert bool(small.at_least(large)) == (a == b)
    assert as_int(small.smaller(large)) == as_int(large.smaller(small)) == a


@given(st.integers(0, 2**24), st.integers(0, 39))
def test_a_count_of_a_float_is_exact(mantissa, exponent):
    number = mantissa * 2**exponent
    assert as_int(Count.of(jnp.float32(number))) == number


def test_zsharp_on_an_array_that_it_cannot_count_says_so():
    part = sam_optax.ascents.keep_large_z_scores()
    w = jax.ShapeDtypeStruct((2**20, 2**12 + 1), jnp.float32)
    with pytest.raises(ValueError, match="an array of 4,296,015,872"):
        jax.eval_shape(lambda g: part.update(g, part.init(g))[0], w)
