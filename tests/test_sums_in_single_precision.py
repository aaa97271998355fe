"""Norms, products and cosines of half-precision trees, and at the ends of the range."""

import jax.numpy as jnp
import numpy as np
import pytest

from sam_optax import _tree

HALVES = [jnp.bfloat16, jnp.float16]


def trees(dtype, size=3000):
    """Entries of one sign, whose running sum outgrows the digits of half precision."""
    rng = np.random.default_rng(0)
    x, y = 1 + rng.random((2, size))
    return [
        {"a": jnp.asarray(v[:-1].reshape(-1, 1), dtype), "b": jnp.asarray(v[-1], dtype)}
        for v in (x, y)
    ]


def flat(tree):
    leaves = np.asarray(tree["a"], np.float64), np.asarray(tree["b"], np.float64)
    return np.concatenate([np.ravel(leaf) for leaf in leaves])


@pytest.mark.parametrize("dtype", HALVES)
def test_sums_of_half_precision_have_the_digits_of_single_precision(dtype):
    x, y = trees(dtype)
    u, v = flat(x), flat(y)
    both = np.linalg.norm(u) * np.linalg.norm(v)
    for actual, wanted in (
        (_tree.norm(x), np.linalg.norm(u)),
        (_tree.squared_norm(x), u @ u),
        (_tree.dot(x, y), u @ v),
        (_tree.cosine(x, y), u @ v / both),
    ):
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, wanted, rtol=1e-5)
    for tree, wanted in (
        (_tree.unit(x), u / np.linalg.norm(u)),
        (_tree.projection(x, y), u @ v / (v @ v) * v),
        (_tree.magnitude(x), np.abs(u)),
    ):
        assert tree["a"].dtype == tree["b"].dtype == jnp.float32
        np.testing.assert_allclose(flat(tree), wanted, rtol=1e-5)
    across = _tree.orthogonal(_tree.at_least_float32(x), y)
    wanted = u - u @ v / (v @ v) * v
    np.testing.assert_allclose(flat(across), wanted, atol=1e-5)


@pytest.mark.parametrize("dtype", HALVES)
def test_differences_of_half_precision_have_the_digits_of_single_precision(dtype):
    """The gap of two gradients is the difference that GSAM and LookSAM build on."""
    x, y = trees(dtype)
    u, v = flat(x), flat(y)
    wide = [_tree.at_least_float32(tree) for tree in (x, y)]
    across = _tree.orthogonal_difference(*wide, wide[1])
    gap = u - v
    np.testing.assert_allclose(flat(across), gap - gap @ v / (v @ v) * v, atol=2e-6)


@pytest.mark.parametrize(
    "scale",
    [
        (1.0, 1.0),
        (1e14, 1e14),
        (1e-14, 1e-14),
        (1e30, 1e30),
        (1e-30, 1e-30),
        (1e30, 1e-30),
        (1e14, 1e-30),
    ],
)
def test_the_cosine_is_the_same_at_every_scale(scale):
    """Each square is in the range of float32, but their product is not."""
    x = jnp.array([3.0, 4.0, 0.0]) * np.float32(scale[0])
    y = jnp.array([4.0, 3.0, 12.0]) * np.float32(scale[1])
    assert float(_tree.cosine(x, y)) == pytest.approx(24 / 65, rel=1e-6)
