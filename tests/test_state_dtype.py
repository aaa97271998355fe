"""What an ascent carries, in bfloat16: the same numbers in the mean."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import problem
import sam_optax
from lab import assert_trees_equal, gradient
from sam_optax import ascents


def steps_of(ascent, steps=3, **options):
    """The d of some steps from the same parameters, and the last state."""
    sam, w, ds = sam_optax.sharpness_aware(ascent, **options), problem.params(), []
    state = sam.init(w)
    for t in range(steps):

        def grad_fn(point, t=t):
            return gradient(point, problem.batch(t))

        d, state = sam.update(grad_fn(w), state, w, grad_fn=grad_fn)
        ds.append(d)
    return ds, state


def test_a_slow_average_moves_on():
    """To the nearest bfloat16, it would stand still below a half."""
    part = ascents.with_state_dtype(ascents.subtract_ema(decay=0.999), key=3)
    g = jnp.ones(4096)

    def step(state, _):
        return part.update(g, state, g)[1], None

    state, _ = jax.lax.scan(step, part.init(g), length=2000)
    average = state.narrow_state.gradient_ema
    assert average.dtype == jnp.bfloat16
    expected = 1 - 0.999**2000
    assert np.mean(np.asarray(average, np.float64)) == pytest.approx(expected, rel=3e-3)
    assert len(np.unique(np.asarray(average, np.float32))) > 10


@pytest.mark.parametrize(
    "ascent", [ascents.fsam(0.1, decay=0.6), ascents.vasso(0.1), ascents.msam(0.1)]
)
def test_the_steps_are_those_in_float32_but_for_the_rounding(ascent):
    expected, plain = steps_of(ascent)
    actual, state = steps_of(ascents.with_state_dtype(ascent))
    for t, (a, b) in enumerate(zip(actual, expected, strict=True)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.01), a, b)
        # The first step comes from a state of zeros, which bfloat16 holds exactly.
        assert t > 0 or np.all(a["a"] == b["a"])
    assert np.any(actual[-1]["a"] != expected[-1]["a"])
    carried = jax.tree.leaves(state.ascent_state.narrow_state)
    assert {x.dtype for x in carried if x.ndim and x.dtype != jnp.uint32} == {
        jnp.dtype(jnp.bfloat16)
    }
    floats = jax.tree.leaves(plain)
    assert not any(x.dtype == jnp.bfloat16 for x in floats)
    # Numbers without a shape are not worth the digits.
    assert all(x.dtype != jnp.bfloat16 for x in carried if not x.ndim)


def test_a_dtype_as_wide_changes_nothing():
    ascent = ascents.fsam(0.1, decay=0.6)
    same = ascents.with_state_dtype(ascent, jnp.float32)
    (expected, plain), (actual, state) = steps_of(ascent), steps_of(same)
    assert_trees_equal(actual, expected)
    assert_trees_equal(state.ascent_state.narrow_state, plain.ascent_state)


def test_other_keys_round_otherwise_and_a_state_resumes():
    make = ascents.with_state_dtype
    fsam = ascents.fsam(0.1, decay=0.6)
    mask = {"a": True, "b": False}
    _, first = steps_of(make(fsam, key=0), mask=mask)
    _, again = steps_of(make(fsam, key=0), mask=mask)
    _, other = steps_of(make(fsam, key=1), mask=mask)
    assert_trees_equal(first, again)
    a, b = (s.ascent_state.narrow_state[0].gradient_ema["a"] for s in (first, other))
    assert a.shape == (4, 5)
    assert np.any(a != b)
    restored = flax.serialization.from_bytes(other, flax.serialization.to_bytes(first))
    assert_trees_equal(restored, first)
    # The key moves on with the steps.
    _, sooner = steps_of(make(fsam, key=0), steps=2, mask=mask)
    keys = [s.ascent_state.narrow_key for s in (sooner, first)]
    assert np.any(keys[0] != keys[1])


def test_impossible_dtypes():
    with pytest.raises(TypeError, match="dtype must be a floating-point dtype"):
        ascents.with_state_dtype(ascents.fsam(), jnp.int32)
    with pytest.raises(ValueError, match="needs the parameters"):
        part = ascents.with_state_dtype(ascents.fsam())
        part.update(jnp.ones(2), part.init(jnp.ones(2)))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float8_e4m3fn])
def test_a_number_beyond_the_dtype_is_carried_as_its_largest(dtype):
    sam = sam_optax.sharpness_aware(ascents.with_state_dtype(ascents.fsam(), dtype))
    w = jnp.array([1.0, -2.0])
    state = sam.init(w)
    for scale in (1e6, 1.0, 1.0):

        def grad_fn(point, scale=scale):
            return scale * 2 * point

        d, state = sam.update(grad_fn(w), state, w, grad_fn=grad_fn)
        assert np.all(np.isfinite(d)), scale
        if scale > 1:
            carried = jax.tree.leaves(state.ascent_state.narrow_state)[0]
            largest = float(jnp.finfo(dtype).max)
            np.testing.assert_array_equal(np.abs(carried.astype(float)), largest)


def test_keys_and_python_numbers_stay_as_they_are():
    part = optax.GradientTransformation(
        lambda params: {"key": jax.random.key(7), "count": 3.0, "mean": params * 0},
        lambda g, state, params=None: (g, state | {"mean": g}),
    )
    narrow = ascents.with_state_dtype(part)
    w = jnp.array([1.0, -2.0])
    _, state = narrow.update(2 * w, narrow.init(w), w)
    inner = state.narrow_state
    assert inner["key"] == jax.random.key(7)
    assert inner["count"] == 3.0
    assert inner["mean"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(inner["mean"], [2, -4])
