"""StableSAM's factor: its bounds on schedules, its weights, and numbers at the ends."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sam_optax
from quadratic import H, W, assert_same, descend
from sam_optax import descents


def minimum(t):
    return 0.2 + 0.3 * t


def maximum(t):
    return 0.6 + 0.3 * t


def trajectory(ascent, factor, steps=5):
    w, points = W, []
    for t in range(steps):
        g = H @ w
        e = ascent(g, w)
        ga = H @ (w + e)
        w = w - 0.1 * np.clip(factor(g, ga, w, e), minimum(t), maximum(t)) * ga
        points.append(w)
    return np.stack(points)


def plain(g, ga, w, e):
    return np.linalg.norm(g) / np.linalg.norm(ga)


def weighted(g, ga, w, e):
    return np.linalg.norm(w * g) / np.linalg.norm((w + e) * ga)


def along(g, w):
    return 0.9 * g / np.linalg.norm(g)


def adaptive(g, w):
    t = np.abs(w) + 0.1
    return 0.5 * t**2 * g / np.linalg.norm(t * g)


CASES = {
    "stable_sam": (lambda **b: sam_optax.stable_sam(0.9, **b), along, plain),
    "stable_asam": (lambda **b: sam_optax.stable_asam(0.5, 0.1, **b), adaptive, plain),
    "stable_asam, as released": (
        lambda **b: sam_optax.stable_asam(0.5, 0.1, as_released=True, **b),
        adaptive,
        weighted,
    ),
    "stable_usam": (
        lambda **b: sam_optax.stable_usam(0.3, **b),
        lambda g, w: 0.3 * g,
        plain,
    ),
}


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("name", CASES)
def test_the_bounds_follow_their_schedules(name):
    """The factor is 0.4 to 0.7. It meets the maximum or none, later the minimum."""
    make, ascent, factor = CASES[name]
    sam = make(minimum=minimum, maximum=maximum)
    assert_same(descend(sam, steps=5), trajectory(ascent, factor))


def descend_once(descent, ga, g, **extra):
    return descent.update(ga, descent.init(g), ascent_gradient=g, **extra)[0]


def test_the_norm_of_d_is_that_of_g_over_all_leaves():
    g = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
    ga = {"a": jnp.array([0.0, 5.0]), "b": jnp.array([12.0])}
    d = descend_once(descents.renormalize(), ga, g)
    np.testing.assert_allclose(d["a"], [0, 25 / 13], rtol=1e-6)
    np.testing.assert_allclose(d["b"], [60 / 13], rtol=1e-6)


def test_where_the_second_gradient_is_zero_so_is_d():
    g, zero = jnp.ones(3), jnp.zeros(3)
    for descent in (descents.renormalize(), descents.renormalize(0.5, 2.0)):
        np.testing.assert_array_equal(descend_once(descent, zero, g), 0)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_factor_holds_at_every_scale_of_the_loss(scale):
    g = jnp.array([3.0, 4.0]) * np.float32(scale)
    ga = jnp.array([0.0, 10.0]) * np.float32(scale)
    d = descend_once(descents.renormalize(), ga, g)
    np.testing.assert_allclose(d, [0, 5 * scale], rtol=1e-6)


def test_the_weights_are_the_magnitudes_at_w_and_at_w_plus_epsilon():
    """Also of half-precision parameters, whose sum with ε has few digits."""
    w, e = jnp.array([-2.0, 1.0], jnp.bfloat16), jnp.array([2**-9, 2.0], jnp.float32)
    g, ga = jnp.array([3.0, 4.0]), jnp.array([1.0, -2.0])
    descent = descents.renormalize(weighted=True)
    d, _ = descent.update(ga, descent.init(g), w, ascent_gradient=g, perturbation=e)
    reach = np.hypot(-2 + 2**-9, -6)
    np.testing.assert_allclose(d, np.hypot(6, 4) / reach * ga, rtol=1e-6)


@pytest.mark.parametrize("bound", [0.0, 0.5, 1.0, 2.0])
def test_equal_bounds_fix_the_factor(bound):
    descent = descents.renormalize(bound, bound)
    d = descend_once(descent, jnp.array([3.0, 4.0]), jnp.ones(2))
    np.testing.assert_allclose(d, [3 * bound, 4 * bound], rtol=1e-6)


METHODS = [
    descents.renormalize,
    sam_optax.stable_sam,
    sam_optax.stable_asam,
    sam_optax.stable_usam,
]


@pytest.mark.parametrize("make", METHODS)
@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"minimum": -0.1}, "minimum must be >= 0"),
        ({"maximum": -0.1}, "maximum must be >= 0"),
        ({"minimum": math.inf}, "minimum must be >= 0 and finite"),
        ({"maximum": -math.inf}, "maximum must be >= 0 and finite"),
        ({"maximum": math.nan}, "maximum must be >= 0 and finite"),
        ({"minimum": 2, "maximum": 1.5}, "must not be above maximum, got 2 and 1.5"),
    ],
)
def test_bounds_that_cannot_be_say_so(make, bounds, message):
    with pytest.raises(ValueError, match=message):
        make(**bounds)


@pytest.mark.parametrize("make", METHODS)
def test_bounds_that_are_known_later_pass(make):
    for later in (lambda t: 0.1, jnp.float32(0.1)):
        assert make(minimum=0.5, maximum=later)
        assert make(minimum=later, maximum=0.01)
    jax.eval_shape(lambda x: make(minimum=x, maximum=2.0).init(jnp.ones(2)), 3.0)
