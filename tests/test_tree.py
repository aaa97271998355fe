"""Tree arithmetic at the edges of the number range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_optax import _tree

TREE = {"a": jnp.array([3.0, 0.0]), "b": [jnp.array(-4.0), None]}


def test_norm_dot_and_cosine():
    assert _tree.norm(TREE) == 5
    assert _tree.dot(TREE, TREE) == 25
    assert _tree.cosine(TREE, TREE) == pytest.approx(1)
    assert _tree.cosine(TREE, jax.tree.map(jnp.negative, TREE)) == pytest.approx(-1)
    assert _tree.cosine(TREE, jax.tree.map(jnp.zeros_like, TREE)) == 0


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-15, 1.0, 1e15, 1e30, 3e37])
def test_norm_and_unit_at_the_ends_of_float32(scale):
    tree = jax.tree.map(lambda x: x * np.float32(scale), TREE)
    assert float(_tree.norm(tree)) == pytest.approx(5 * scale, rel=1e-6)
    unit = _tree.unit(tree)
    np.testing.assert_allclose(unit["a"], [0.6, 0], rtol=1e-6)
    np.testing.assert_allclose(unit["b"][0], -0.8, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1.0, 1e150, 1e300])
def test_norm_and_unit_at_the_ends_of_float64(scale):
    with jax.enable_x64(True):
        tree = scale * jnp.array([3.0, -4.0])
        assert float(_tree.norm(tree)) == pytest.approx(5 * scale, rel=1e-14)
        np.testing.assert_allclose(_tree.unit(tree), [0.6, -0.8], rtol=1e-14)


def test_single_precision_beside_double():
    with jax.enable_x64(True):
        tree = {"single": jnp.array([3e25], jnp.float32), "double": jnp.zeros(1)}
        assert float(_tree.norm(tree)) == pytest.approx(3e25, rel=1e-6)
        assert float(_tree.unit(tree)["single"][0]) == pytest.approx(1)
        zero = jax.tree.map(jnp.zeros_like, tree)
        assert not np.any(_tree.unit(zero)["single"])


def test_mapped_and_differentiated_at_every_scale():
    trees = jnp.array([[1e-37], [1e-12], [1.0], [1e30]]) * jnp.array([3.0, -4.0])
    expected = np.tile([0.6, -0.8], (4, 1))
    np.testing.assert_allclose(jax.vmap(_tree.unit)(trees), expected, rtol=1e-6)
    slopes = jax.vmap(jax.grad(_tree.norm))(trees[1:])
    np.testing.assert_allclose(slopes, expected[1:], rtol=1e-6)


def test_zero_has_norm_zero_and_no_direction():
    zero = jax.tree.map(jnp.zeros_like, TREE)
    assert _tree.norm(zero) == 0
    assert not np.any(_tree.unit(zero)["a"])


def test_a_subnormal_tree_counts_as_zero():
    assert not np.any(_tree.unit(jnp.array([1e-40, 1e-41])))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_tree_that_is_not_finite_has_no_direction(bad):
    unit = _tree.unit({"a": jnp.array([bad, 1.0]), "b": jnp.array([2.0])})
    assert np.all(np.isnan(unit["a"]))
    assert np.all(np.isnan(unit["b"]))
    assert not np.isfinite(_tree.norm(jnp.array([bad, 1.0])))
    assert not _tree.all_finite({"a": jnp.array([bad, 1.0]), "n": jnp.arange(3)})


def test_empty_trees_and_empty_leaves():
    assert _tree.norm({}) == 0
    assert _tree.unit({"a": None}) == {"a": None}
    assert _tree.norm(jnp.zeros((0, 3))) == 0
    assert _tree.unit({"a": jnp.zeros((0,)), "b": jnp.array([2.0])})["b"] == 1
    assert _tree.all_finite({})


def test_complex_leaves_have_a_norm():
    tree = jnp.array([3 + 4j, 0])
    assert _tree.norm(tree) == pytest.approx(5)
    np.testing.assert_allclose(_tree.unit(tree), [0.6 + 0.8j, 0], rtol=1e-6)


def test_mixed_dtypes_share_one_norm_and_keep_their_own():
    with jax.enable_x64(True):
        tree = {
            "half": jnp.array([3.0], jnp.bfloat16),
            "single": jnp.array([0.0], jnp.float32),
            "double": jnp.array([4.0], jnp.float64),
        }
        unit = _tree.unit(tree)
        assert {k: str(v.dtype) for k, v in unit.items()} == {
            "half": "float32",
            "single": "float32",
            "double": "float64",
        }
        assert float(unit["double"][0]) == pytest.approx(0.8, rel=1e-7)


def test_a_wide_factor_widens_nothing():
    with jax.enable_x64(True):
        scaled = _tree.scale(jnp.float64(0.5), jnp.ones(2, jnp.float32))
        assert scaled.dtype == jnp.float32


def test_under_strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        tree = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2, jnp.float32)}
        assert _tree.norm(tree) == pytest.approx(2)
        assert _tree.unit(tree)["a"].dtype == jnp.float32


@pytest.mark.parametrize("measure", [_tree.squared_norm, lambda g: _tree.dot(g, g)])
def test_gradients_are_summed_by_rows(measure):
    """By columns, XLA cuts them into windows, slowly where these need padding."""

    def loss_fn(w, x):
        return jnp.sum(jnp.tanh(x @ w))

    def measured(w, x):
        return measure(jax.grad(loss_fn)(w, x))

    w, x = jnp.ones((100, 100)), jnp.ones((8, 100))
    assert "reduce-window" not in jax.jit(measured).lower(w, x).compile().as_text()
