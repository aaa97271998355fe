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


@pytest.mark.parametrize(
    ("ulps", "is_rounding"), [(1, True), (31.5, True), (32.5, False)]
)
def test_a_part_of_up_to_32_ulps_is_rounding_error(ulps, is_rounding):
    whole = jnp.array([30.0, 40.0])
    part = jnp.array([0.0, ulps * np.finfo(np.float32).eps * 50], jnp.float32)
    kept = _tree.zero_if_rounding_of(whole, part)
    np.testing.assert_array_equal(kept, 0 * part if is_rounding else part)
    unit = _tree.unit_unless_rounding_of(whole, part)
    np.testing.assert_allclose(unit, [0, 0 if is_rounding else 1], rtol=1e-6)


def test_the_mean_of_groups_takes_the_first_counter():
    means = _tree.mean_of_groups(
        {"x": jnp.array([[1.0, 2.0, 6.0], [3.0, 4.0, 8.0]]), "n": jnp.array([5, 7])}
    )
    np.testing.assert_array_equal(means["x"], [2.0, 3.0, 7.0])
    assert means["n"] == 5


def test_the_reciprocal_of_what_has_none():
    tiny = float(np.finfo(np.float32).tiny)
    values = jnp.array([0.0, 1e-40, tiny, 2.0, 3e38, jnp.inf, jnp.nan])
    inverses = [float(_tree.reciprocal_or_zero(value)) for value in values]
    np.testing.assert_allclose(
        inverses, [0, 0, 1 / tiny, 0.5, 4 * tiny, np.nan, np.nan]
    )


def test_arithmetic_keeps_the_dtype_of_the_first_tree():
    half, single = jnp.array([1.0, 2.0], jnp.bfloat16), jnp.array([3.0, 5.0])
    for actual, expected in (
        (_tree.add_scaled(half, 2.0, single), [7, 12]),
        (_tree.subtract(half, single), [-2, -3]),
        (_tree.multiply(half, single), [3, 10]),
        (_tree.cast_like(single, half), [3, 5]),
    ):
        assert actual.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(actual, np.float32), expected)
    assert _tree.zeros_like(half).dtype == jnp.float32
    assert _tree.at_least_float32(jnp.arange(3)).dtype == jnp.int32


def test_projections_by_value():
    x, along = {"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([3.0, 0.0])}
    np.testing.assert_array_equal(_tree.projection(x, along)["a"], [1, 0])
    np.testing.assert_array_equal(_tree.orthogonal(x, along)["a"], [0, 2])
    y = {"a": jnp.array([0.0, 5.0])}
    np.testing.assert_array_equal(
        _tree.orthogonal_difference(x, y, along)["a"], [0, -3]
    )
    zero = {"a": jnp.zeros(2)}
    np.testing.assert_array_equal(_tree.projection(x, zero)["a"], [0, 0])


@pytest.mark.parametrize(
    ("found", "expected", "words"),
    [
        ({"a": 1.0}, {"a": 1.0}, None),
        ({"a": 1.0, "b": 1.0}, {"a": 1.0}, "['b'] should not be there"),
        ({"a": 1.0}, {"a": 1.0, "b": 1.0}, "['b'] is missing"),
        ({"c": 1.0}, {"a": 1.0}, "['a'] is missing"),
        ({"a": np.ones(2)}, {"a": np.ones(3)}, "['a'] has shape (2,) in place of (3,)"),
        (np.ones(2), np.ones(3), "it has shape (2,) in place of (3,)"),
        ({"a": 1.0}, 1.0, "it is not a single array"),
        (1.0, {}, "an array should not be there"),
        ([1.0], (1.0,), "it is of another type"),
    ],
)
def test_where_two_trees_differ(found, expected, words):
    assert _tree.mismatch(found, expected) == words


def test_drawn_numbers_differ_from_leaf_to_leaf_and_are_uniform():
    tree = {"a": jnp.zeros(1000), "b": jnp.zeros(1000, jnp.bfloat16)}
    drawn = _tree.uniform_like(jax.random.key(0), tree)
    assert np.any(np.asarray(drawn["a"]) != np.asarray(drawn["b"]))
    assert drawn["b"].dtype == jnp.float32
    for leaf in jax.tree.leaves(drawn):
        assert 0 <= leaf.min() < 0.01
        assert 0.99 < leaf.max() < 1
    normal = _tree.normal_like(jax.random.key(0), tree)
    assert abs(float(normal["a"].mean())) < 0.13
    assert float(normal["b"].std()) == pytest.approx(1, abs=0.1)


def test_a_tree_that_is_known_to_be_zero_has_no_direction_and_is_finite():
    """When the step is compiled: such as a momentum that the same program starts."""

    @jax.jit
    def unit_and_square(x):
        zeros = {"a": jnp.zeros_like(x), "b": jnp.zeros(2)}
        return _tree.unit(zeros), _tree.scaled_norm(zeros).square, x

    zeros, square, _ = unit_and_square(jnp.ones((2, 3)))
    assert square == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(zeros))
