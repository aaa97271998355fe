"""Every number of a method on a schedule of its own, against formulas in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

import sam_optax
from quadratic import H, W, assert_same, descend, grad_fn, orthogonal_to, split, whole
from sam_optax import ascents, descents

pytestmark = pytest.mark.usefixtures("double_precision")

STEPS = 5


def rho(t):
    return 0.6 - 0.1 * t


def a(t):
    return 0.2 + 0.15 * t


def b(t):
    return 0.9 - 0.12 * t


def trajectory(perturb=None, combine=lambda ga, g, t: ga):
    """SGD on what `combine` makes, with ε from `perturb(g, w, memory, t)`."""
    w, memory, points = W, {"m": np.zeros(3)}, []
    for t in range(STEPS):
        g = H @ w
        if perturb is None:
            e = rho(t) * g / np.linalg.norm(g)
        else:
            e = perturb(g, w, memory, t)
        w = w - 0.1 * combine(H @ (w + e), g, t)
        points.append(w)
    return np.stack(points)


DESCENTS = {
    "wsam": (
        lambda: sam_optax.wsam(rho, b),
        lambda ga, g, t: g + b(t) / (1 - b(t)) * (ga - g),
    ),
    "gradient_norm_penalty": (
        lambda: sam_optax.gradient_norm_penalty(rho, a),
        lambda ga, g, t: (1 - a(t)) * g + a(t) * ga,
    ),
    "sam_plus_gap": (
        lambda: sam_optax.sam_plus_gap(rho, a),
        lambda ga, g, t: ga + a(t) * (ga - g),
    ),
    "gsam": (
        lambda: sam_optax.gsam(rho, a),
        lambda ga, g, t: ga - a(t) * orthogonal_to(ga, g),
    ),
    "gsam, the loss": (
        lambda: sam_optax.gsam(rho, a, minimize="loss"),
        lambda ga, g, t: g + a(t) * orthogonal_to(g, ga),
    ),
}


@pytest.mark.parametrize("name", DESCENTS)
def test_descents(name):
    make, combine = DESCENTS[name]
    assert_same(descend(make(), steps=STEPS), trajectory(None, combine))


def usam(g, w, memory, t):
    return rho(t) * g


def average(g, memory, decay):
    before = memory["m"]
    memory["m"] = decay * before + (1 - decay) * g
    return before


def fsam(g, w, memory, t):
    average(g, memory, b(t))
    h = g - a(t) * memory["m"]
    return rho(t) * h / np.linalg.norm(h)


def fsam_as_released(g, w, memory, t):
    before = average(g, memory, b(t) if t else 0.0)
    h = g - a(t) * before
    return rho(t) * h / np.linalg.norm(h)


def fsam_by_the_cosine(g, w, memory, t):
    average(g, memory, b(t))
    m = memory["m"]
    h = g - m @ g / np.linalg.norm(m) / np.linalg.norm(g) * m
    return rho(t) * h / np.linalg.norm(h)


def fsam_by_the_cosine_as_released(g, w, memory, t):
    before = average(g, memory, b(t) if t else 0.0)
    cosine = before @ g / (np.linalg.norm(before) * np.linalg.norm(g) or 1)
    h = g - cosine * before
    return rho(t) * h / np.linalg.norm(h)


def fisher(g, w, memory, t):
    inverse = 1 / (1 + a(t) * g**2)
    return rho(t) * inverse * g / np.sqrt(g @ (inverse * g))


def sam_full(g, w, memory, t):
    average(g, memory, b(t))
    u = g - orthogonal_to(memory["m"], g)
    return rho(t) * u / np.linalg.norm(u)


def sam_noise(g, w, memory, t):
    average(g, memory, b(t))
    u = orthogonal_to(memory["m"], g)
    return rho(t) * u / np.linalg.norm(u) if t else 0 * u


ASCENTS = {
    usam: lambda: sam_optax.usam(rho),
    fsam: lambda: sam_optax.fsam(rho, a, b),
    fsam_as_released: lambda: sam_optax.fsam(rho, a, b, as_released=True),
    fsam_by_the_cosine: lambda: sam_optax.fsam(rho, "cosine", b),
    fsam_by_the_cosine_as_released: lambda: sam_optax.fsam(
        rho, "cosine", b, as_released=True
    ),
    fisher: lambda: sam_optax.fisher_sam(rho, a),
    sam_full: lambda: sam_optax.sam_full(rho, b),
    sam_noise: lambda: sam_optax.sam_noise(rho, b),
}


@pytest.mark.parametrize("perturb", ASCENTS, ids=lambda perturb: perturb.__name__)
def test_ascents(perturb):
    assert_same(descend(ASCENTS[perturb](), steps=STEPS), trajectory(perturb))


def test_the_full_gradient_that_is_given_takes_the_place_of_the_average():
    """On each step, while the average goes on; g along it leaves no noise."""
    full = np.array([1.0, 2.0, -1.0])
    for part, wanted in (
        (ascents.project_on_full_gradient(b), lambda g: g - orthogonal_to(full, g)),
        (
            ascents.subtract_projection_on_full_gradient(b),
            lambda g: orthogonal_to(full, g),
        ),
    ):
        state, m = part.init(split(W)), np.zeros(3)
        for t in range(3):
            g = H @ W * (t + 1) + t
            m = b(t) * m + (1 - b(t)) * g
            u, state = part.update(split(g), state, full_gradient=split(full))
            assert_same(whole(u), wanted(g))
            assert_same(whole(state.scheduled_state.gradient_ema), m)
        u, _ = part.update(split(g), state)
        average = b(3) * m + (1 - b(3)) * g
        along = g - orthogonal_to(average, g)
        is_noise = np.allclose(wanted(full), 0)
        assert_same(whole(u), g - along if is_noise else along)
        u, _ = part.update(split(3.0 * full), state, full_gradient=split(full))
        assert_same(whole(u), 0 * full if is_noise else 3.0 * full)


def test_a_gradient_along_its_average_leaves_no_noise_to_scale_up():
    part, state = ascents.sam_noise(1.0, 0.5), None
    for dtype in (jnp.float32, jnp.float64):
        g = jnp.asarray(np.random.default_rng(0).normal(size=100), dtype)
        state = part.init(g)
        for _ in range(3):
            e, state = part.update(g, state, g)
            np.testing.assert_array_equal(e, 0)


def test_usam_and_fisher_sam_in_half_precision_have_single_precision():
    """1 + 1e-4 · 30² is 1.09, and 300² leaves float16."""
    g = jnp.array([30.0, -300.0], jnp.float16)
    tx = ascents.fisher_sam(0.5, eta=1e-4)
    e, _ = tx.update(g, tx.init(g), g, ascent_gradient=g)
    assert e.dtype == jnp.float32
    wide = np.asarray(g, np.float64)
    inverse = 1 / (1 + 1e-4 * wide**2)
    wanted = 0.5 * inverse * wide / np.sqrt(wide @ (inverse * wide))
    np.testing.assert_allclose(e, wanted, rtol=1e-5)
    tx = ascents.usam(1e-3)
    e, _ = tx.update(g, tx.init(g))
    assert e.dtype == jnp.float32
    np.testing.assert_allclose(e, 1e-3 * wide, rtol=1e-6)


def test_the_fisher_matrix_is_that_of_a_gradient_whose_square_leaves_the_range():
    for scale in (1e-25, 1e25):
        g = jnp.array([3.0, -4.0], jnp.float32) * np.float32(scale)
        tx = ascents.scale_by_inverse_root_fisher(eta=4.0)
        u, _ = tx.update(g, tx.init(g), ascent_gradient=g)
        wanted = np.asarray(g, np.float64)
        wanted = wanted / np.hypot(1, 2 * wanted)
        np.testing.assert_allclose(u, wanted, rtol=1e-6)


def test_a_moving_average_of_half_precision_gradients_keeps_single_precision():
    """0.999 + 1e-3 · 2 is 1 in half precision."""
    tx = ascents.subtract_ema(sigma=1.0, decay=0.999)
    g = jnp.full(3, 1 + 2**-7, jnp.bfloat16)
    h, state = tx.update(g, tx.init(g))
    assert state.gradient_ema.dtype == h.dtype == jnp.float32
    np.testing.assert_allclose(state.gradient_ema, 1e-3 * (1 + 2**-7), rtol=1e-5)
    np.testing.assert_allclose(h, 0.999 * (1 + 2**-7), rtol=1e-6)


def test_blend_of_the_same_gradients_is_exactly_the_gradient():
    for weight in (0.3, lambda t: 7.0):
        descent, g = descents.blend(weight), jnp.array([0.1, -1e-20])
        d, _ = descent.update(g, descent.init(g), ascent_gradient=g)
        np.testing.assert_array_equal(d, g)


def test_what_a_number_cannot_be():
    for build, message in (
        (lambda: ascents.subtract_ema(decay=1.0), "decay must be >= 0 and < 1"),
        (lambda: ascents.subtract_ema(sigma=-1.0), "sigma must be >= 0"),
        (lambda: ascents.project_on_full_gradient(1.5), "decay must be >= 0 and < 1"),
        (lambda: ascents.sam_noise(0.1, -0.5), "decay must be >= 0 and < 1"),
        (lambda: ascents.scale_by_inverse_root_fisher(-1.0), "eta must be >= 0"),
        (lambda: descents.blend(np.nan), "weight must be finite"),
        (lambda: descents.gsam(np.inf), "alpha must be finite"),
        (lambda: sam_optax.sam_plus_gap(lam=np.nan), "lam must be finite"),
        (lambda: sam_optax.wsam(gamma=-0.1), "gamma must be >= 0 and < 1"),
        (lambda: sam_optax.gsam(minimize="both"), "minimize must be"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
    with pytest.raises(TypeError, match="sigma must be a number or 'cosine'"):
        ascents.subtract_ema(sigma="sine")


def test_zero_is_a_number_that_they_can_be():
    g = grad_fn(split(W))
    for tx in (
        ascents.subtract_ema(0.0, 0.0),
        ascents.project_on_full_gradient(0.0),
        ascents.scale_by_inverse_root_fisher(0.0),
    ):
        u, _ = tx.update(g, tx.init(g), ascent_gradient=g)
        assert_same(whole(u), whole(g))
