"""Random SAM and R-SAM: the options that they pass on, and their radii by schedule."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sam_optax

METHODS = [sam_optax.random_sam, sam_optax.rsam]
W = {"a": jnp.ones(50), "b": jnp.ones((2, 25))}
G = jax.tree.map(lambda w: 3 * w, W)


def points(sam, w=W, g=G, steps=1):
    """Where the last gradient of each step is taken, and d of the last."""
    state, seen = sam.init(w), []

    def grad_fn(point):
        last.append(point)
        return g

    for _ in range(steps):
        last = []
        d, state = sam.update(g, state, w, grad_fn=grad_fn)
        seen.append(last[-1])
    return seen, d, state


@pytest.mark.parametrize("make", METHODS)
def test_a_mask_keeps_the_noise_to_its_leaves(make):
    """Its variance is over their number: E‖ε‖² = ρ² whatever else there is."""
    (point,), _, _ = points(make(2.0, mask={"a": False, "b": True}))
    np.testing.assert_array_equal(point["a"], W["a"])
    norm = np.linalg.norm(point["b"] - W["b"])
    assert norm == pytest.approx(2.0, rel=0.3)


@pytest.mark.parametrize("make", METHODS)
def test_stochastic_rounding_is_drawn_from_its_own_key(make):
    w = jax.tree.map(lambda w: w.astype(jnp.bfloat16), W)
    rounded = [
        points(make(0.05, stochastic_rounding=key), w, w)[0][0] for key in (0, 0, 1)
    ]
    same, other = (np.asarray(point["a"]) for point in rounded[1:])
    np.testing.assert_array_equal(rounded[0]["a"], same)
    assert np.any(other != same)


@pytest.mark.parametrize("make", METHODS)
def test_a_gradient_that_is_not_used_is_not_looked_at(make):
    """Neither by default nor by the guard, which goes by d."""
    bad = G | {"a": G["a"].at[0].set(jnp.nan)}

    def d(**options):
        sam = make(0.1, **options)
        return sam.update(bad, sam.init(W), W, grad_fn=lambda p: G)[0]

    for options in ({}, {"guard": False}, {"guard": True}):
        np.testing.assert_array_equal(d(**options)["a"], G["a"])


def radii(seen):
    """‖point − w‖ of each step."""
    moved = [[np.asarray(p[k] - W[k], np.float64) for k in W] for p in seen]
    return [np.sqrt(sum(np.sum(e**2) for e in leaves)) for leaves in moved]


def test_normalised_noise_has_the_radius_of_its_step():
    sam = sam_optax.random_sam(lambda t: 0.5 * (1 + t), normalized=True)
    seen, _, _ = points(sam, steps=4)
    np.testing.assert_allclose(radii(seen), [0.5, 1.0, 1.5, 2.0], rtol=1e-5)
    for one, other in itertools.pairwise(seen):
        assert np.all(one["a"] != other["a"])


def test_noise_that_is_not_normalised_has_a_radius_of_its_own():
    seen, _, _ = points(sam_optax.random_sam(1.0), steps=4)
    assert np.all(np.abs(np.array(radii(seen)) - 1) > 1e-4)
    np.testing.assert_allclose(radii(seen), 1.0, rtol=0.3)


def test_rsam_ascends_by_the_radius_of_its_step():
    """Where the noise has none."""
    sam = sam_optax.rsam(lambda t: 0.5 * (1 + t), sigma=0.0)
    seen, _, _ = points(sam, steps=4)
    np.testing.assert_allclose(radii(seen), [0.5, 1.0, 1.5, 2.0], rtol=1e-5)


def test_rsams_noise_has_the_size_of_its_step():
    sam = sam_optax.rsam(0.0, sigma=lambda t: 10.0**t)
    seen, _, _ = points(sam, steps=3)
    np.testing.assert_allclose(radii(seen), [1.0, 10.0, 100.0], rtol=0.3)


def test_a_tree_without_parameters_has_no_noise():
    for make in METHODS:
        sam = make(0.5)
        d, _ = sam.update({}, sam.init({}), {}, grad_fn=lambda p: {})
        assert d == {}


def test_one_parameter_has_noise_of_size_one():
    """A division by the number of parameters, of which there is one."""
    w = jnp.zeros(())
    tx, squares = sam_optax.ascents.replace_by_noise(), []
    state = tx.init(w)
    for _ in range(300):
        e, state = tx.update(w, state)
        squares.append(float(e) ** 2)
    assert np.mean(squares) == pytest.approx(1.0, abs=4 * np.sqrt(2 / 300))


def test_half_precision_parameters_have_noise_of_single_precision():
    w = jnp.zeros(100, jnp.bfloat16)
    tx = sam_optax.ascents.replace_by_noise()
    e, _ = tx.update(w, tx.init(w))
    assert e.dtype == jnp.float32
    assert np.any(e != e.astype(jnp.bfloat16).astype(jnp.float32))


def test_the_registry_counts_their_gradients():
    assert sam_optax.METHODS["random_sam"].gradients() == 1
    assert sam_optax.METHODS["rsam"].gradients() == 2
    assert sam_optax.METHODS["multi_step_sam"].gradients(steps=3) == 4
    assert sam_optax.METHODS["rst"].gradients(probability=0.25) == 1.25
    assert np.isnan(sam_optax.METHODS["rst"].gradients(probability=lambda t: 0.5))
    for name in ("ae_sam", "ae_look_sam"):
        assert np.isnan(sam_optax.METHODS[name].gradients())


@pytest.mark.parametrize("bad", [-0.1, np.nan, np.inf])
def test_a_size_that_cannot_be(bad):
    for build in (
        lambda: sam_optax.ascents.ascend_from_noise(sam_optax.ascents.sam(), bad),
        lambda: sam_optax.rsam(sigma=bad),
    ):
        with pytest.raises(ValueError, match="sigma must be >= 0"):
            build()


def test_what_the_ascent_from_noise_needs():
    tx = sam_optax.ascents.ascend_from_noise(sam_optax.ascents.sam())
    with pytest.raises(ValueError, match="ascend_from_noise needs the parameters"):
        tx.update(G, tx.init(W), grad_fn=lambda p: G)
    with pytest.raises(ValueError, match=r"ascend_from_noise needs grad_fn="):
        tx.update(G, tx.init(W), W)
