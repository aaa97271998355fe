"""w + ε in half precision: to the nearest, with a warning, or stochastically."""

import functools
import warnings

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import problem
import sam_optax
from doors import DOORS
from lab import assert_trees_equal, bench, train
from methods import TABLE, norm
from sam_optax import _rounding as rounding

# --- Dtypes.


@pytest.mark.gradients_alone
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_updates_keep_dtypes_and_state_is_at_least_float32(kind, dtype):
    with jax.enable_x64(dtype == "float64"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sam, w = TABLE[kind](), problem.params(dtype)

        def step(w, state):
            def grad_fn(point):
                return jax.grad(problem.loss)(point, problem.batch())

            return sam.update(grad_fn(w), state, w, grad_fn=grad_fn)

        d, state = jax.eval_shape(step, w, sam.init(w))
        assert {x.dtype for x in jax.tree.leaves(d)} == {jnp.dtype(dtype)}
        for leaf in jax.tree.leaves(state):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                assert jnp.finfo(leaf.dtype).bits >= 32


def test_injected_hyperparameters_widen_no_state():
    """They are as wide as the widest float of the process."""
    with jax.enable_x64(True):
        sam = optax.inject_hyperparams(sam_optax.ae_sam)(rho=0.1)
        w = jnp.ones(3)
        _, state = sam.update(w, sam.init(w), w, grad_fn=lambda p: p)
        assert jax.tree.map(jnp.result_type, state) == jax.tree.map(
            jnp.result_type, sam.init(w)
        )


def test_a_narrow_perturbation_takes_no_digits_from_the_parameters():
    def update_fn(updates, state, params=None):
        return jax.tree.map(lambda u: jnp.zeros(u.shape, jnp.bfloat16), updates), state

    ascent = optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn)
    sam = sam_optax.sharpness_aware(ascent)
    w, seen = jnp.array([1.001, 2.003]), []
    sam.update(w, sam.init(w), w, grad_fn=lambda p: seen.append(p) or w)
    np.testing.assert_array_equal(seen[0], w)


@pytest.mark.parametrize("door", DOORS)
def test_bfloat16_parameters_are_warned_of_once(kind, door):
    tx, step = bench(kind, door).step(TABLE[kind]())
    params = problem.params(jnp.bfloat16)
    with pytest.warns(UserWarning, match=r"bfloat16.*swallow.*float32") as record:
        for _ in range(2):
            jax.eval_shape(step, params, tx.init(params), problem.batch())
    assert len(record) == 1


@pytest.mark.parametrize("stochastic_rounding", [None, 0])
@pytest.mark.filterwarnings("ignore:Some perturbed parameters")
def test_a_learning_rate_of_zero_moves_no_parameter(stochastic_rounding):
    """w itself is never overwritten by w + ε, so there is nothing to return to."""
    sam = sam_optax.sam(0.5, stochastic_rounding=stochastic_rounding)
    tx = optax.chain(sam, optax.sgd(0.0))
    w = jax.random.normal(jax.random.key(0), (64,), jnp.bfloat16)

    def grad_fn(w):
        return 2 * w

    @jax.jit
    def run(w):
        def body(carry, _):
            w, state = carry
            updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
            return (optax.apply_updates(w, updates), state), None

        return jax.lax.scan(body, (w, tx.init(w)), length=100)[0][0]

    np.testing.assert_array_equal(run(w), w)


# --- Stochastic rounding.

MANY = jnp.ones(100_000, jnp.bfloat16)
NEXT = 2.0**-7  # from 1 to the next number of bfloat16


def assert_moved_by(mean, point):
    """From 1, in the mean: a share of the entries has moved to the next number."""
    moved = np.asarray(point, np.float64) - 1
    assert set(np.unique(moved)) <= {0.0, NEXT}
    assert moved.mean() == pytest.approx(
        mean, abs=4 * np.sqrt(NEXT * mean / moved.size)
    )


def points_of(sam, steps=3, w=MANY):
    """Where the second gradients are taken, step by step."""
    state, points = sam.init(w), []
    for _ in range(steps):
        seen = []
        _, state = sam.update(w, state, w, grad_fn=lambda p, s=seen: s.append(p) or w)
        points.append(np.asarray(seen[-1], np.float32))
    return points


def test_every_step_is_rounded_without_bias_and_independently_of_the_others():
    points = points_of(sam_optax.sam(0.5, stochastic_rounding=0))
    share = 0.5 / np.sqrt(MANY.size) / NEXT
    for t, point in enumerate(points):
        assert_moved_by(share * NEXT, point)
        for other in points[:t]:
            both = np.mean((point > 1) & (other > 1))
            deviation = np.sqrt(share**2 / MANY.size)
            assert both == pytest.approx(share**2, abs=4 * deviation)


def test_rounding_is_reproducible_from_its_key():
    """And a step that is taken again draws the same."""
    one, again, other = (
        points_of(sam_optax.sam(0.5, stochastic_rounding=key), steps=2)
        for key in (0, 0, 1)
    )
    assert_trees_equal(one, again)
    assert all(np.any(a != b) for a, b in zip(one, other, strict=True))


def test_stochastic_rounding_draws_anew_on_every_step(kind):
    tx, step = bench(kind, "door1").step(TABLE[kind](stochastic_rounding=0))
    step = jax.jit(functools.partial(step, ascend=True))
    params = problem.params(jnp.bfloat16)
    params, state = train(step, params, tx.init(params), 1)
    once, after, _ = step(params, state, problem.batch())
    again, _, _ = step(params, state, problem.batch())
    assert_trees_equal(once, again)
    gaps = []
    for _ in range(40):
        later_key = state[0]._replace(rounding_key=after[0].rounding_key)
        anew, after, _ = step(params, (later_key, *state[1:]), problem.batch())
        gaps.append(norm(jax.tree.map(jnp.subtract, anew, once)))
    assert max(gaps) > 0
    assert after[0].rounding_key.dtype == jnp.uint32


def test_rounding_with_the_key_of_another_part_is_unbiased():
    sam = sam_optax.esam(rho=1.0, beta=0.6, key=0, stochastic_rounding=0)
    for point in points_of(sam):
        moved = np.asarray(point, np.float64) - 1
        # Of the next number above 1 a share that makes the mean 1/sqrt(n).
        deviation = np.sqrt(NEXT * MANY.size**-0.5 / MANY.size)
        assert moved.mean() == pytest.approx(MANY.size**-0.5, abs=4 * deviation)


@pytest.mark.parametrize("make", [sam_optax.multi_step_sam, sam_optax.rsam])
def test_the_points_on_the_way_are_rounded_alike(make):
    """Rounded to the nearest, all of them would be w."""
    seen = []

    def grad_fn(point):
        seen.append(np.mean(np.asarray(point) != 1))
        return MANY

    sam = make(rho=0.05, stochastic_rounding=0)
    sam.update(MANY, sam.init(MANY), MANY, grad_fn=grad_fn)
    assert len(seen) == 2
    assert min(seen) > 0.001


@hypothesis.given(x=st.floats(-3, 3, width=32), dtype=st.sampled_from(["bf16", "f16"]))
def test_it_is_unbiased_and_goes_to_a_neighbour(x, dtype):
    dtype = {"bf16": jnp.bfloat16, "f16": jnp.float16}[dtype]
    hypothesis.assume(x == 0 or abs(x) > 1e-3)
    draws = 4096
    wide = jnp.full((draws,), x, jnp.float32)
    zero = jnp.zeros((draws,), dtype)
    rounded = rounding.round_stochastically(zero, wide, jax.random.key(0))
    values = np.unique(np.asarray(rounded, np.float32))
    assert len(values) <= 2
    assert values.min() <= x <= values.max()
    gap = values.max() - values.min()
    mean = np.asarray(rounded, np.float64).mean()
    assert abs(mean - x) <= 4 * gap / 2 / np.sqrt(draws) + 1e-12


def test_it_leaves_wide_leaves_alone_and_leaves_independent():
    tree = {"a": jnp.ones(1000, jnp.bfloat16), "b": jnp.ones(1000, jnp.bfloat16)}
    wide = {"c": jnp.ones(3, jnp.float32)}
    shift = jax.tree.map(lambda x: jnp.full(x.shape, 1e-3, jnp.float32), tree | wide)
    out = rounding.round_stochastically(tree | wide, shift, jax.random.key(1))
    np.testing.assert_array_equal(out["c"], np.float32(1) + np.float32(1e-3))
    up_a, up_b = (np.asarray(out[k], np.float32) > 1 for k in "ab")
    # 1 + 1e-3 lies 0.128 of the way to bfloat16's next value, 1 + 2^-7.
    for up in (up_a, up_b):
        assert up.mean() == pytest.approx(0.128, abs=0.05)
    assert (up_a & up_b).mean() == pytest.approx(0.128**2, abs=0.02)


def test_to_the_nearest_swallows_what_stochastic_rounding_keeps():
    """Why half-precision parameters are warned of: a usual ε moves none of 1e5."""
    epsilon = jnp.full(MANY.shape, 0.05 / np.sqrt(MANY.size), jnp.float32)
    assert not np.any(np.asarray(rounding.round_to_nearest(MANY, epsilon) != MANY))
    moved = rounding.round_stochastically(MANY, epsilon, jax.random.key(0))
    assert_moved_by(float(epsilon[0]), moved)


# --- Keys.


@pytest.mark.parametrize("key", [1.5, "seed", True])
def test_a_key_that_is_no_key(key):
    with pytest.raises(TypeError, match=r"key must be an int or a JAX random key"):
        sam_optax.sam(stochastic_rounding=key)


def test_several_keys():
    with pytest.raises(ValueError, match=r"key must be a single key"):
        sam_optax.sam(stochastic_rounding=jax.random.split(jax.random.key(0)))


@pytest.mark.parametrize("kind_of_key", ["int", "typed", "legacy", "rbg"])
def test_every_kind_of_key_is_taken(kind_of_key):
    key = {
        "int": 3,
        "typed": jax.random.key(3),
        "legacy": jax.random.PRNGKey(3),
        "rbg": jax.random.key(3, impl="rbg"),
    }[kind_of_key]
    sam = sam_optax.sam(rho=1.0, stochastic_rounding=key)
    params = problem.params(jnp.bfloat16)
    state, other = sam.init(params), sam.init(params)
    jax.jit(lambda state: state, donate_argnums=0)(other)
    assert other.rounding_key.is_deleted()  # and no other state's, nor the key given
    _, state = sam.update(params, state, params, grad_fn=lambda p: p)
    assert state.rounding_key.dtype == jnp.uint32
    if kind_of_key != "rbg":
        _, reference = sam_optax.sam(rho=1.0, stochastic_rounding=3).update(
            params, sam.init(params), params, grad_fn=lambda p: p
        )
        assert_trees_equal(state.rounding_key, reference.rounding_key)
