"""VaSSO by value: its average, with θ of each step."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from quadratic import assert_same, descend, expected, split, whole
from sam_optax import ascents

THETAS = [0.9, 0.2, 0.6, 1.0, 0.0, 0.4]


def scheduled(step):
    return jnp.asarray(THETAS)[step]


def test_theta_is_that_of_the_authors():
    for make in (sam_optax.vasso, ascents.vasso, ascents.follow_ema):
        assert inspect.signature(make).parameters["theta"].default == 0.9


@pytest.mark.usefixtures("double_precision")
def test_the_default_is_the_average_of_the_paper():
    wanted = descend(sam_optax.vasso(0.05, 0.9, as_released=False), steps=3)
    assert np.all(wanted[1:] != descend(sam_optax.vasso(as_released=True), steps=3)[1:])
    for ascent in (
        ascents.vasso(),
        optax.chain(ascents.follow_ema(), ascents.sam(0.05)),
    ):
        assert_same(descend(sam_optax.sharpness_aware(ascent), steps=3), wanted)
    assert_same(descend(sam_optax.vasso(), steps=3), wanted)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("as_released", [False, True])
def test_step_k_averages_with_the_kth_theta(as_released):
    def epsilon(g, w, memory):
        t = memory["t"] = memory.get("t", -1) + 1
        m = memory.get("m", np.zeros(3))
        theta = 1.0 if as_released and t == 0 else THETAS[t]
        memory["m"] = m = (1 - theta) * m + theta * g
        return 0.5 * m / np.linalg.norm(m)

    sam = sam_optax.vasso(0.5, scheduled, as_released=as_released)
    assert_same(descend(sam, steps=6), expected(epsilon, steps=6))
    ascent = ascents.vasso(0.5, scheduled, as_released=as_released)
    assert_same(
        descend(sam_optax.sharpness_aware(ascent), steps=6), descend(sam, steps=6)
    )


def test_the_average_of_half_precision_is_in_float32():
    """It sums what bfloat16 would lose, and the strict rules of promotion allow it."""
    part = ascents.follow_ema(0.5)
    with jax.numpy_dtype_promotion("strict"):
        one = split(jnp.ones(3, jnp.bfloat16))
        tiny = jax.tree.map(lambda x: x * 2**-12, one)
        _, state = part.update(one, part.init(one), one)
        u, state = part.update(tiny, state, one)
    assert {x.dtype for x in jax.tree.leaves((u, state.gradient_ema))} == {
        jnp.dtype(jnp.float32)
    }
    np.testing.assert_array_equal(whole(u), 0.25 + 2**-13)
    np.testing.assert_array_equal(whole(state.gradient_ema), whole(u))


@pytest.mark.parametrize("theta", [-0.1, 1.1])
def test_theta_outside_of_the_unit_interval_is_refused(theta):
    for make in (sam_optax.vasso, ascents.vasso, ascents.follow_ema):
        with pytest.raises(ValueError, match="theta must be >= 0 and <= 1"):
            make(theta=theta)
