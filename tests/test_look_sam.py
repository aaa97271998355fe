"""LookSAM by value: what is kept of a second gradient, and what is made of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from quadratic import H, W, assert_same, descend, grad_fn, orthogonal_to, split, whole
from sam_optax import ascents, cadences

ALPHAS = [0.3, 0.7, 1.1, 0.2, 0.9, 0.5, 1.3]


def scheduled(step):
    return jnp.asarray(ALPHAS)[step]


def trees(seed, n):
    return [split(x) for x in np.random.default_rng(seed).normal(size=(n, 3))]


def unit(x):
    return x / (np.linalg.norm(x) or 1)


def leaves(x):
    return [x[:2], x[2:]]


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("per_tensor", [False, True])
def test_each_step_between_has_its_own_alpha_and_the_last_direction(per_tensor):
    """A second gradient on steps 0, 3 and 6; every gradient is another one."""
    cadence = cadences.every_k_reusing(3, scheduled, per_tensor=per_tensor)
    state = cadence.init(split(W))
    gs, gas = trees(0, 7), trees(1, 7)
    parts = leaves if per_tensor else lambda x: [x]
    for t, (g, ga) in enumerate(zip(gs, gas, strict=True)):
        ascends, state = cadence.decide(g, state)
        assert ascends == (t % 3 == 0)
        assert state.reusing_step == t + 1
        flat_g, flat_ga = whole(g), whole(ga)
        if ascends:
            state = cadence.remember(ga, g, state)
            pairs = zip(parts(flat_g), parts(flat_ga), strict=True)
            v = np.concatenate([unit(orthogonal_to(*pair)) for pair in pairs])
            if per_tensor:  # a single number has no other direction
                v[2] = 0
            assert_same(whole(state.kept_direction), v)
        else:
            sizes = np.concatenate(
                [np.full(len(x), np.linalg.norm(x)) for x in parts(flat_g)]
            )
            d = cadence.substitute(g, state)
            assert_same(whole(d), flat_g + ALPHAS[t] * sizes * v)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("per_tensor", [False, True])
def test_the_method_passes_on_what_it_is_given(per_tensor):
    """Two periods of training, with every argument away from its default."""
    w, visited = W, []
    parts = leaves if per_tensor else lambda x: [x]
    for t in range(5):
        g = H @ w
        if t % 2 == 0:
            d = H @ (w + 0.3 * unit(g))
            pairs = zip(parts(g), parts(d), strict=True)
            v = [unit(orthogonal_to(*pair)) for pair in pairs]
            if per_tensor:
                v[1] = np.zeros(1)
        else:
            sizes = [np.linalg.norm(x) for x in parts(g)]
            kept = [size * x for size, x in zip(sizes, v, strict=True)]
            d = g + ALPHAS[t] * np.concatenate(kept)
        w = w - 0.1 * d
        visited.append(w)
    sam = sam_optax.look_sam(0.3, k=2, alpha=scheduled, per_tensor=per_tensor)
    assert_same(descend(sam, steps=5), np.stack(visited))


def test_the_defaults_are_those_of_the_paper():
    """rho 0.05, α 0.7 and k 5, so steps 0 and 5 are SAM's, and the others alike."""
    trajectories = []
    for sam in (
        sam_optax.look_sam(),
        sam_optax.look_sam(0.05, 5, 0.7, per_tensor=False),
    ):
        w, seen = split(W), []
        state = sam.init(w)
        for _ in range(6):
            d, state = sam.update(grad_fn(w), state, w, grad_fn=grad_fn)
            seen.append(whole(d))
        trajectories.append(np.stack(seen))
    assert_same(*trajectories)
    first, *between, last = trajectories[0]
    assert_same(first, last)
    for d in between:
        assert_same(d, between[0])
    assert np.all(first != between[0])


@pytest.mark.usefixtures("double_precision")
def test_sam_every_k_keeps_no_direction():
    w, visited = W, []
    for t in range(5):
        g = H @ w
        w = w - 0.1 * (H @ (w + 0.3 * unit(g)) if t % 3 == 0 else g)
        visited.append(w)
    assert_same(descend(sam_optax.sam_every_k(0.3, 3), steps=5), np.stack(visited))


# --- A direction that is only rounding.


def kept(d, g, **options):
    cadence = cadences.every_k_reusing(2, 0.7, **options)
    state = cadence.init(split(W))
    return cadence.remember(split(d), split(g), state).kept_direction


def test_rounding_is_judged_by_the_second_gradient():
    """v is as long as g, and still less than the rounding error of a gᵃ 1e8 as long."""
    g = np.array([1.0, 0.0, 0.0], np.float32)
    long = 1e8 * g + np.array([0.0, 1.0, 0.0], np.float32)
    np.testing.assert_array_equal(whole(kept(long, g)), 0)
    # Beside a gᵃ as short as v itself, the same v counts, however long g is.
    short = np.array([0.0, 1e-8, 0.0], np.float32)
    np.testing.assert_allclose(whole(kept(short, g)), [0, 1, 0], atol=1e-6)


def test_each_tensor_judges_its_own_rounding():
    g = np.array([1.0, 0.0, 1.0], np.float32)
    d = np.array([1e8, 1.0, 1.0], np.float32)
    np.testing.assert_array_equal(whole(kept(d, g, per_tensor=True)), 0)
    g, d = np.array([[1e-8, 0, 1], [1, 1e-3, 1e8]], np.float32)
    np.testing.assert_array_equal(whole(kept(d, g)), 0)
    found = whole(kept(d, g, per_tensor=True))
    np.testing.assert_allclose(found, [0, 1, 0], atol=1e-6)


def test_a_kept_direction_of_zero_leaves_the_gradient_as_it_is():
    """Bit for bit, and only until the next second gradient."""
    sam, w = sam_optax.look_sam(0.1, k=2), split(W.astype(np.float32))
    g = split(np.array([0.3, -0.7, 0.2], np.float32))
    along = jax.tree.map(lambda x: 3 * x, g)
    across = split(np.array([0.3, 0.7, -0.2], np.float32))
    _, state = sam.update(g, sam.init(w), w, grad_fn=lambda p: along)
    d, state = sam.update(g, state, w, grad_fn=lambda p: across)
    np.testing.assert_array_equal(whole(d), whole(g))
    _, state = sam.update(g, state, w, grad_fn=lambda p: across)
    d, _ = sam.update(g, state, w, grad_fn=lambda p: along)
    v = unit(orthogonal_to(whole(g), whole(across)))
    wanted = whole(g) + 0.7 * np.linalg.norm(whole(g)) * v
    np.testing.assert_allclose(whole(d), wanted, rtol=1e-6)


# --- Precision, and values that are not finite.


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.filterwarnings("ignore:Some perturbed parameters")
def test_half_precision_keeps_its_direction_in_float32(dtype):
    """The direction is computed from gradients whose squares leave float16."""

    def half(x):
        return jax.tree.map(lambda x: jnp.asarray(x, dtype), split(x))

    def wide(tree):
        return whole(jax.tree.map(lambda x: x.astype(jnp.float32), tree)).astype(float)

    g, ga = half(np.array([290.0, 410, 30])), half(np.array([310.0, -50, 390]))
    for options in ({}, {"per_tensor": True}):
        sam, w = sam_optax.look_sam(0.1, k=2, **options), half(W)
        _, state = sam.update(g, sam.init(w), w, grad_fn=lambda p: ga)
        kept = state.cadence_state.kept_direction
        assert {x.dtype for x in jax.tree.leaves(kept)} == {jnp.dtype(jnp.float32)}
        d, state = sam.update(g, state, w, grad_fn=lambda p: ga)
        assert {x.dtype for x in jax.tree.leaves(d)} == {jnp.dtype(dtype)}
        v, sizes = unit(orthogonal_to(wide(g), wide(ga))), np.linalg.norm(wide(g))
        if options:  # a single number has no other direction
            v = np.append(unit(orthogonal_to(wide(g)[:2], wide(ga)[:2])), 0)
            sizes = np.linalg.norm(wide(g)[:2])
        np.testing.assert_allclose(wide(kept), v, rtol=1e-5)
        np.testing.assert_allclose(wide(d), wide(g) + 0.7 * sizes * v, rtol=1e-2)


def test_a_bad_second_gradient_leaves_the_direction_and_not_the_average():
    """The average of the ascent is made of g alone, which was good."""
    sam = sam_optax.sharpness_aware(
        ascents.vasso(0.1, 0.5), cadence=cadences.every_k_reusing(1, 0.7)
    )
    w, g = split(W), grad_fn(split(W))
    _, state = sam.update(g, sam.init(w), w, grad_fn=grad_fn)
    bad = jax.tree.map(lambda x: x * jnp.nan, g)
    d, after = sam.update(g, state, w, grad_fn=lambda p: bad)
    assert np.all(np.isnan(whole(d)))
    before = whole(state.cadence_state.kept_direction)
    np.testing.assert_array_equal(whole(after.cadence_state.kept_direction), before)
    average = after.ascent_state[0].gradient_ema
    np.testing.assert_allclose(whole(average), 0.75 * whole(g), rtol=1e-6)


@pytest.mark.parametrize("k", [0, 2.0, True])
def test_the_period_is_a_positive_integer(k):
    for make in (cadences.every_k, cadences.every_k_reusing, sam_optax.look_sam):
        with pytest.raises(ValueError, match="k must be an integer >= 1"):
            make(k=k)


def test_strict_dtype_promotion():
    with jax.numpy_dtype_promotion("strict"):
        for alpha in (0.7, scheduled):
            sam, w = sam_optax.look_sam(0.1, k=2, alpha=alpha), split(W)
            state = sam.init(w)
            for _ in range(2):
                d, state = sam.update(grad_fn(w), state, w, grad_fn=grad_fn)
        assert np.all(np.isfinite(whole(d)))


# --- The variant of the paper for large batches.


@pytest.mark.usefixtures("double_precision")
def test_look_layer_sam():
    """The composition that the docstring of look_sam shows."""
    layer_sam = optax.chain(
        ascents.normalize_by_leaf_norm(),
        ascents.scale_by_leaf_norm(),
        ascents.scale_by_rho(0.2),
    )
    sam = sam_optax.sharpness_aware(
        layer_sam, cadence=cadences.every_k_reusing(k=2, alpha=0.7)
    )
    w, visited = W, []
    for t in range(4):
        g = H @ w
        if t % 2 == 0:
            layers = zip(leaves(g), leaves(w), strict=True)
            epsilon = [0.2 * np.linalg.norm(w_l) * unit(g_l) for g_l, w_l in layers]
            d = H @ (w + np.concatenate(epsilon))
            v = unit(orthogonal_to(g, d))
        else:
            d = g + 0.7 * np.linalg.norm(g) * v
        w = w - 0.1 * d
        visited.append(w)
    assert_same(descend(sam, steps=4), np.stack(visited))
