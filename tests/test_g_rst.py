"""RST and G-RST by value, on steps whose decision is known from the key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sam_optax
from doors import DOORS
from quadratic import H, W, assert_same, descend
from sam_optax import ascents, cadences, descents
from sam_optax._random import key_stream

pytestmark = pytest.mark.usefixtures("double_precision")


def probability(t):
    return 0.8 - 0.1 * t


def decisions(steps, key):
    """Drawn from the key of each step, of which none is used twice."""
    keys = key_stream(key, "at_random")
    data, drawn = keys.start(), []
    for t in range(steps):
        now, data = keys.next(data)
        drawn.append(bool(jax.random.bernoulli(now, probability(t))))
    return drawn


def visited(ascends, alpha, steps):
    w, points = W, []
    for t in range(steps):
        g = H @ w
        ga = H @ (w + 0.5 * g / np.linalg.norm(g))
        w = w - 0.1 * (g + alpha(t) * (ga - g) * ascends[t])
        points.append(w)
    return np.stack(points)


@pytest.mark.parametrize("door", DOORS)
def test_g_rst_mixes_the_gradients_of_the_steps_that_ascend(door):
    def alpha(t):
        return 2.0 + 0.3 * t

    drawn = decisions(7, key=5)
    assert 2 <= sum(drawn) <= 5
    wanted = visited(drawn, alpha, 7)
    sam = sam_optax.rst(0.5, probability, alpha=alpha, key=5)
    assert_same(descend(sam, steps=7, door=DOORS[door]), wanted)
    composed = sam_optax.sharpness_aware(
        ascents.sam(0.5),
        descent=descents.blend(alpha),
        cadence=cadences.at_random(probability, key=5),
    )
    assert_same(descend(composed, steps=7, door=DOORS[door]), wanted)


def test_rst_is_g_rst_with_a_weight_of_one():
    wanted = visited(decisions(7, key=2), lambda t: 1.0, 7)
    assert_same(descend(sam_optax.rst(0.5, probability, key=2), steps=7), wanted)


def test_a_probability_counts_from_its_own_step_on():
    cadence = cadences.at_random(lambda t: jnp.where(t < 3, 0.0, 1.0))
    state, taken = cadence.init(None), []
    for _ in range(6):
        decision, state = cadence.decide(None, state)
        taken.append(bool(decision))
    assert taken == [False] * 3 + [True] * 3


def test_the_expectation_of_g_rst_is_sam_where_the_weight_is_one_over_p():
    w = jnp.asarray(W)
    sam = sam_optax.rst(0.5, probability=0.25, alpha=4.0)

    def step(state, _):
        d, state = sam.update(H @ w, state, w, grad_fn=lambda p: jnp.asarray(H) @ p)
        return state, d

    _, d = jax.lax.scan(step, sam.init(w), length=4000)
    g = H @ W
    ga = H @ (W + 0.5 * g / np.linalg.norm(g))
    share = np.mean(np.any(np.asarray(d) != g, axis=1))
    assert share == pytest.approx(0.25, abs=4 * np.sqrt(0.1875 / 4000))
    assert_same(np.mean(d, axis=0), g + 4 * share * (ga - g))
