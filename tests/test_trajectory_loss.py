"""SAF and MESA against their equation, written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sam_optax
from lab import assert_trees_close

TAU, WEIGHT = 2.0, 0.5


def outputs(seed, rows=4, columns=3):
    rng = np.random.default_rng(seed)
    return jnp.asarray(3 * rng.normal(size=(rows, columns)), jnp.float32)


def expected_term(past, now):
    """λ τ² KL(past ‖ now) of each row, at temperature τ."""

    def softmax(z):
        e = np.exp(np.asarray(z, np.float64) / TAU)
        return e / e.sum(-1, keepdims=True)

    p, q = softmax(past), softmax(now)
    return WEIGHT * TAU**2 * np.sum(p * np.log(p / q), axis=-1)


def make_saf(**kwargs):
    options = {"lag": 2, "weight": WEIGHT, "temperature": TAU} | kwargs
    return sam_optax.saf(6, 3, **options)


INDEX = jnp.array([4, 0, 5, 2])


def test_saf_compares_with_the_outputs_of_lag_visits_ago():
    saf = make_saf()
    state, penalty = saf.init(), jax.jit(saf.penalty)
    for t in range(5):
        term = penalty(state, outputs(t), INDEX)
        if t < 2:
            np.testing.assert_array_equal(term, 0)
        else:
            expected = expected_term(outputs(t - 2), outputs(t))
            np.testing.assert_allclose(term, expected, rtol=1e-4)
            assert np.all(expected > 0.01)
        state = jax.jit(saf.update)(state, outputs(t), INDEX)
    assert state.saf_step == 5
    np.testing.assert_array_equal(state.visits, [5, 0, 5, 0, 5, 5])
    # Nothing is stored for the examples that were not seen.
    np.testing.assert_array_equal(state.past_outputs[jnp.array([1, 3])], 0)


def test_saf_counts_the_visits_of_each_example():
    """The order of the examples changes from epoch to epoch."""
    saf = make_saf(lag=1)
    state = saf.update(saf.init(), outputs(0), INDEX)
    again = jnp.array([2, 1, 4, 3])
    term = saf.penalty(state, outputs(1), again)
    expected = expected_term(
        outputs(0)[jnp.array([3, 0])], outputs(1)[jnp.array([0, 2])]
    )
    np.testing.assert_allclose(term[jnp.array([0, 2])], expected, rtol=1e-4)
    np.testing.assert_array_equal(term[jnp.array([1, 3])], 0)


@pytest.mark.parametrize(("start", "stop"), [(0, None), (3, None), (0, 4), (2, 5)])
def test_the_term_counts_from_start_until_stop(start, stop):
    saf = make_saf(lag=1, start=start, stop=stop)
    mesa = sam_optax.mesa(0.5, WEIGHT, TAU, start=start, stop=stop)
    params = jnp.zeros(3)
    saf_state, mesa_state = saf.init(), mesa.init(params)
    for t in range(7):
        counts = start <= t < (stop or 7)
        term = saf.penalty(saf_state, outputs(t), INDEX)
        assert np.all((np.asarray(term) > 0) == (counts and t >= 1))
        term = mesa.penalty(mesa_state, outputs(t), outputs(t + 1))
        assert np.all((np.asarray(term) > 0) == counts)
        saf_state = saf.update(saf_state, outputs(t), INDEX)
        mesa_state = mesa.update(mesa_state, params)


def test_outputs_that_are_not_finite_are_not_stored():
    saf = make_saf(lag=1)
    state = saf.update(saf.init(), outputs(0), INDEX)
    state = saf.update(state, outputs(1).at[1, 2].set(jnp.nan), INDEX)
    np.testing.assert_array_equal(state.visits, [1, 0, 2, 0, 2, 2])
    term = saf.penalty(state, outputs(2), INDEX)
    past = outputs(1).at[1].set(outputs(0)[1])
    np.testing.assert_allclose(term, expected_term(past, outputs(2)), rtol=1e-4)


def test_indices_out_of_range_have_no_term_and_store_nothing():
    """Also narrow ones, for which a number beyond the examples would wrap."""
    saf = sam_optax.saf(256, 3, lag=1, weight=WEIGHT, temperature=TAU)
    index = jnp.array([5, 6, 7, 8], jnp.uint8)
    broken = outputs(0).at[0].set(jnp.nan)
    state = saf.update(saf.init(), broken, index)
    np.testing.assert_array_equal(np.flatnonzero(state.visits), [6, 7, 8])
    outside = jnp.array([-1, 256, 6, 7])
    term = saf.penalty(state, outputs(1), outside)
    np.testing.assert_array_equal(np.asarray(term) > 0, [False, False, True, True])
    after = saf.update(state, outputs(1), outside)
    np.testing.assert_array_equal(np.flatnonzero(after.visits), [6, 7, 8])


def test_classes_that_are_masked_out_have_no_divergence():
    mesa = sam_optax.mesa(0.5, WEIGHT, TAU)
    state = mesa.init(jnp.zeros(()))
    masked = outputs(0).at[:, 1].set(-jnp.inf), outputs(1).at[:, 1].set(-jnp.inf)
    both = jnp.array([0, 2])
    expected = expected_term(outputs(0)[:, both], outputs(1)[:, both])
    np.testing.assert_allclose(
        mesa.penalty(state, masked[1], masked[0]), expected, rtol=1e-4
    )


def test_the_average_of_half_precision_parameters_moves():
    mesa = sam_optax.mesa()
    state = mesa.init(jnp.ones(3, jnp.bfloat16))
    update = jax.jit(mesa.update)
    for _ in range(100):
        state = update(state, jnp.full(3, 2, jnp.bfloat16))
    np.testing.assert_allclose(state.average, 2 - 0.9995**100, rtol=1e-4)


def test_mesa_compares_with_the_averaged_model():
    mesa = sam_optax.mesa(0.75, WEIGHT, TAU)
    params = {"w": jnp.array([1.0, 2.0]), "b": jnp.array(3.0, jnp.bfloat16)}
    state = mesa.init(params)
    assert_trees_close(state.average, params)
    update = jax.jit(mesa.update, donate_argnums=0)
    state = update(state, jax.tree.map(lambda x: x + 4, params))
    assert_trees_close(state.average, jax.tree.map(lambda x: x + 1, params))
    assert state.average["b"].dtype == jnp.float32
    term = mesa.penalty(state, outputs(1), outputs(0))
    np.testing.assert_allclose(term, expected_term(outputs(0), outputs(1)), rtol=1e-4)


def test_only_the_current_outputs_have_a_gradient():
    mesa = sam_optax.mesa(0.75, WEIGHT, TAU)
    state = mesa.init(jnp.zeros(()))
    now, past = jax.grad(
        lambda now, past: jnp.sum(mesa.penalty(state, now, past)), argnums=(0, 1)
    )(outputs(1), outputs(0))
    # d/dz of τ² KL(p ‖ q(z)) is τ (q − p).
    q, p = (jax.nn.softmax(outputs(i) / TAU) for i in (1, 0))
    np.testing.assert_allclose(now, WEIGHT * TAU * (q - p), rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(past, 0)


def test_weights_and_temperatures_may_be_schedules():
    def schedule(low, high):
        return optax.piecewise_constant_schedule(low, {2: high / low})

    moving = make_saf(weight=schedule(0.1, 0.4), temperature=schedule(3.0, 1.5), lag=1)
    state = moving.update(moving.init(), outputs(0), INDEX)
    for weight, temperature in [(0.1, 3.0), (0.1, 3.0), (0.4, 1.5)][1:]:
        fixed = make_saf(weight=weight, temperature=temperature, lag=1)
        np.testing.assert_allclose(
            moving.penalty(state, outputs(1), INDEX),
            fixed.penalty(state, outputs(1), INDEX),
            rtol=1e-5,
        )
        state = moving.update(state, outputs(0), INDEX)


def test_the_states_go_through_scan():
    saf = make_saf(dtype=jnp.bfloat16)
    mesa = sam_optax.mesa(0.5)
    params = {"w": jnp.ones(3)}

    def body(states, t):
        saf_state, mesa_state = states
        logits = outputs(0) * t
        term = saf.penalty(saf_state, logits, INDEX)
        return (
            saf.update(saf_state, logits, INDEX),
            mesa.update(mesa_state, params),
        ), term

    states = saf.init(), mesa.init(params)
    final, terms = jax.lax.scan(body, states, jnp.arange(1.0, 5.0))
    assert jax.tree.map(jnp.result_type, final) == jax.tree.map(jnp.result_type, states)
    assert np.all(np.asarray(terms[2:]) > 0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sam_optax.saf(0, 3), "num_examples must be an integer >= 1"),
        (lambda: sam_optax.saf(6, 3, lag=0), "lag must be an integer >= 1"),
        (lambda: make_saf(weight=-1.0), "weight must be >= 0"),
        (lambda: make_saf(temperature=0.0), "temperature must be > 0"),
        (lambda: make_saf(start=-5), "start must be >= 0"),
        (lambda: sam_optax.mesa(stop=-1), "stop must be >= 0"),
        (lambda: make_saf(start=5, stop=5), "stop must be after start, 5, got 5"),
        (lambda: sam_optax.mesa(decay=1.0), "decay must be >= 0 and < 1"),
        (
            lambda: make_saf().penalty(make_saf().init(), outputs(0, 4, 2), INDEX),
            r"outputs must have shape \(batch, 3\).*got \(4, 2\) and \(4,\)",
        ),
        (
            lambda: make_saf().update(make_saf().init(), outputs(0, 2), INDEX),
            r"got \(2, 3\) and \(4,\)",
        ),
        (
            lambda: sam_optax.mesa().penalty(
                sam_optax.mesa().init(jnp.ones(2)), outputs(0), outputs(0, 2)
            ),
            r"must both have shape \(batch, outputs\), got \(4, 3\) and \(2, 3\)",
        ),
    ],
)
def test_what_does_not_fit_says_why(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_saf_on_a_mesh_of_explicit_axes():
    """As `jax.make_mesh` makes: the batch is spread, and each device has the past."""
    saf = make_saf(lag=1)

    def visit(state, index, z):
        state = saf.update(state, z, index)
        return saf.penalty(state, 0.5 * z, index), saf.update(state, 2 * z, index)

    expected, after = jax.jit(visit)(saf.init(), INDEX, outputs(0))
    assert (expected > 0).all()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        spread = jax.device_put((INDEX, outputs(0)), NamedSharding(mesh, P("data")))
        found = jax.jit(visit)(saf.init(), *spread)
    assert found[0].sharding.spec == P("data")
    assert_trees_close(found, (expected, after), rtol=1e-6)
