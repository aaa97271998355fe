"""SAF's and MESA's numbers at steps other than the first, and in half precision."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax


def kl_term(past, now, tau, weight):
    """λ τ² KL(σ(past/τ) ‖ σ(now/τ)) of each row, in float64."""

    def softmax(z):
        e = np.exp(np.asarray(z, np.float64) / tau)
        return e / e.sum(-1, keepdims=True)

    p, q = softmax(past), softmax(now)
    return weight * tau**2 * np.sum(p * np.log(p / q), axis=-1)


def outputs(seed, rows=3, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return jnp.asarray(4 * rng.normal(size=(rows, 5)), dtype)


def weight(t):
    return 0.3 + 0.1 * t


def tau(t):
    return 2.0 + 0.5 * t


def decay(t):
    return 0.9 - 0.2 * t


INDEX = jnp.array([4, 0, 2])


def test_saf_takes_step_ks_weight_and_temperature():
    saf = sam_optax.saf(6, 5, lag=2, weight=weight, temperature=tau)
    state = saf.init()
    for t in range(5):
        term = saf.penalty(state, outputs(t), INDEX)
        wanted = 0.0
        if t >= 2:
            wanted = kl_term(outputs(t - 2), outputs(t), tau(t), weight(t))
        np.testing.assert_allclose(term, wanted, rtol=1e-5, atol=1e-6)
        state = saf.update(state, outputs(t), INDEX)


def test_mesa_takes_step_ks_decay_weight_and_temperature():
    """Its average is one of the parameters that each update was given."""
    mesa = sam_optax.mesa(decay, weight, tau)
    params = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
    state = mesa.init(params)
    average = jax.tree.map(np.asarray, params)
    for t in range(4):
        term = mesa.penalty(state, outputs(t), outputs(t + 9))
        wanted = kl_term(outputs(t + 9), outputs(t), tau(t), weight(t))
        np.testing.assert_allclose(term, wanted, rtol=1e-5)
        new = jax.tree.map(lambda w, t=t: w * (t + 2.0), params)
        state = mesa.update(state, new)
        average = jax.tree.map(
            lambda a, w, t=t: decay(t) * a + (1 - decay(t)) * np.asarray(w),
            average,
            new,
        )
        assert state.mesa_step == t + 1
        for name in params:
            np.testing.assert_allclose(state.average[name], average[name], rtol=1e-6)


HALVES = [jnp.bfloat16, jnp.float16]


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_outputs_have_the_term_of_single_precision(dtype):
    """Outputs far from zero, whose exponentials leave float16, and close together."""
    past = (outputs(0) * 0.01 + 90).astype(dtype)
    now = (past.astype(jnp.float32) + jnp.arange(5) * 0.5).astype(dtype)
    saf = sam_optax.saf(6, 5, lag=1, weight=0.5, temperature=3.0)
    mesa = sam_optax.mesa(0.5, 0.5, 3.0)
    wanted = kl_term(past, now, 3.0, 0.5)
    state = saf.update(saf.init(), past, INDEX)
    assert state.past_outputs.dtype == jnp.float32
    for term in (
        saf.penalty(state, now, INDEX),
        mesa.penalty(mesa.init(jnp.zeros(())), now, past),
    ):
        assert term.dtype == jnp.float32
        np.testing.assert_allclose(term, wanted, rtol=1e-4)


def test_double_precision_outputs_have_its_digits():
    with jax.enable_x64(True):
        past, now = outputs(0, dtype=jnp.float64), outputs(1, dtype=jnp.float64)
        mesa = sam_optax.mesa(0.5, 0.5, 3.0)
        term = mesa.penalty(mesa.init(jnp.zeros(())), now, past)
        np.testing.assert_allclose(term, kl_term(past, now, 3.0, 0.5), rtol=1e-12)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_average_of_half_precision_parameters_keeps_single_precision(dtype):
    """1 + 1e-4 is 1 in half precision, and products have few digits there."""
    mesa = sam_optax.mesa(decay=0.9999)
    state = mesa.init(jnp.ones(2, dtype))
    state = jax.jit(mesa.update)(state, jnp.full(2, 2, dtype))
    assert state.average.dtype == jnp.float32
    np.testing.assert_allclose(state.average, 1.0001, rtol=1e-6)
    mesa = sam_optax.mesa(decay=0.7)
    state = mesa.update(mesa.init(jnp.zeros(2, dtype)), jnp.full(2, 1 + 2**-7, dtype))
    np.testing.assert_allclose(state.average, 0.3 * (1 + 2**-7), rtol=1e-6)


def test_the_average_is_a_copy_of_the_parameters():
    """So that a step may donate the parameters."""
    params = jnp.ones(3)
    state = sam_optax.mesa().init(params)
    pointer = state.average.unsafe_buffer_pointer()
    assert pointer != params.unsafe_buffer_pointer()


def test_saf_stores_in_the_dtype_that_is_asked_for():
    saf = sam_optax.saf(6, 5, lag=2, dtype=jnp.bfloat16)
    state = saf.init()
    assert state.past_outputs.shape == (6, 2, 5)
    assert state.past_outputs.dtype == jnp.bfloat16
    for t in range(3):
        state = saf.update(state, outputs(t), INDEX)
    stored = np.asarray(state.past_outputs[INDEX], np.float32)
    for slot, t in ((0, 2), (1, 1)):  # the third visit takes the place of the first
        wanted = outputs(t).astype(jnp.bfloat16).astype(jnp.float32)
        np.testing.assert_array_equal(stored[:, slot], wanted)


def test_saf_has_no_gradient_through_what_it_stores():
    saf = sam_optax.saf(6, 5, lag=1)

    def stored(z):
        return jnp.sum(saf.update(saf.init(), z, INDEX).past_outputs)

    np.testing.assert_array_equal(jax.grad(stored)(outputs(0)), 0)


def test_the_defaults_are_those_of_the_docstrings():
    past, now = outputs(0), outputs(1)
    saf, mesa = sam_optax.saf(6, 5), sam_optax.mesa()
    state = saf.init()
    for z in (past, outputs(5), outputs(6)):  # three visits
        np.testing.assert_array_equal(saf.penalty(state, now, INDEX), 0)
        state = saf.update(state, z, INDEX)
    term = saf.penalty(state, now, INDEX)
    np.testing.assert_allclose(term, kl_term(past, now, 5.0, 0.3), rtol=1e-4)
    state = mesa.init(jnp.zeros(()))
    term = mesa.penalty(state, now, past)
    np.testing.assert_allclose(term, kl_term(past, now, 5.0, 0.8), rtol=1e-4)
    state = mesa.update(state, jnp.ones(()))
    np.testing.assert_allclose(state.average, 0.0005, rtol=1e-4)


def test_saf_in_training_is_its_equation():
    """Two epochs of SGD on a linear model: the second one's gradient has the term."""
    saf = sam_optax.saf(2, 2, lag=1, weight=0.5, temperature=2.0)
    x, y, index = jnp.array([[1.0], [2.0]]), jnp.array([0, 1]), jnp.array([1, 0])

    def loss_fn(w, state):
        z = x * w
        losses = optax.softmax_cross_entropy_with_integer_labels(z, y)
        return jnp.mean(losses + saf.penalty(state, z, index)), z

    def by_hand(w, past):
        z = np.asarray(x, np.float64) * w
        p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
        slope = p - np.eye(2)
        if past is not None:
            now, then = (np.exp(v / 2) for v in (z, past))
            now, then = (v / v.sum(-1, keepdims=True) for v in (now, then))
            slope = slope + 0.5 * 2.0 * (now - then)
        return (slope * np.asarray(x)).mean(0), z

    w, state, wanted, past = (
        jnp.array([1.0, -1.0]),
        saf.init(),
        np.array([1.0, -1]),
        None,
    )
    for _ in range(3):
        g, z = jax.grad(loss_fn, has_aux=True)(w, state)
        w, state = w - g, saf.update(state, z, index)
        g, past = by_hand(wanted, past)
        wanted = wanted - g
        np.testing.assert_allclose(w, wanted, rtol=1e-5)


def test_outputs_may_be_numpy_arrays():
    past, now = np.asarray(outputs(0)), np.asarray(outputs(1))
    mesa = sam_optax.mesa(0.5, 0.5, 3.0)
    term = mesa.penalty(mesa.init(np.zeros(())), jnp.asarray(now), past)
    np.testing.assert_allclose(term, kl_term(past, now, 3.0, 0.5), rtol=1e-5)


def test_the_average_keeps_its_dtype_beside_a_decay_in_double_precision():
    """So that it goes through a scan."""
    with jax.enable_x64(True):
        mesa = sam_optax.mesa(lambda t: jnp.asarray(0.75, jnp.float64))
        params = jnp.ones(2, jnp.float32)
        state = mesa.update(mesa.init(params), 5 * params)
        assert state.average.dtype == jnp.float32
        np.testing.assert_array_equal(state.average, 2)
