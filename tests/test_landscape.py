"""Lines and planes through the loss, and the directions that span them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lab import assert_trees_close
from sam_optax import sharpness
from sharpness_problem import (
    loss_fn,
    network,
)

pytestmark = pytest.mark.usefixtures("double_precision")


def test_lines_and_planes_are_losses_at_their_points():
    params, data = network()
    u, v = (sharpness.random_direction(params, key=key) for key in (1, 2))
    xs, ys = np.array([-1.0, 0.0, 0.5]), np.array([0.0, 2.0])

    def at(x, y):
        moved = jax.tree.map(lambda w, a, b: w + x * a + y * b, params, u, v)
        return float(loss_fn(moved, *data))

    surface = sharpness.over_plane(loss_fn, params, data, (u, v), xs, ys, batch_size=7)
    expected = [[at(x, y) for x in xs] for y in ys]
    np.testing.assert_allclose(surface.losses, expected, rtol=1e-12)
    line = sharpness.along_line(loss_fn, params, data, v, ys)
    np.testing.assert_allclose(line.losses, [at(0, y) for y in ys], rtol=1e-12)
    np.testing.assert_array_equal(line.distances, ys)


@pytest.mark.parametrize("narrow", [np.float16, np.float32])
def test_the_two_axes_of_a_plane_may_differ_in_dtype(narrow):
    """Also where JAX refuses to promote, and no distance loses digits."""
    w, x = jnp.zeros(2), jnp.ones((1, 2))
    directions = (jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]))
    xs, ys = np.array([0.5, 2.0], narrow), np.array([0.1, 1 / 3])
    with jax.numpy_dtype_promotion("strict"):
        surface, turned = (
            sharpness.over_plane(
                loss_fn=lambda w, x: (x @ w**2).mean(),
                params=w,
                data=x,
                directions=directions,
                xs=x_values,
                ys=y_values,
            )
            for x_values, y_values in ((xs, ys), (ys, xs))
        )
    expected = xs.astype(np.float64) ** 2 + ys[:, None] ** 2
    np.testing.assert_allclose(surface.losses, expected, rtol=1e-15)
    np.testing.assert_array_equal(turned.losses, surface.losses.T)


def test_interpolation_passes_through_both_solutions():
    params, data = network()
    other = jax.tree.map(lambda w: -w, params)
    line = sharpness.interpolate(loss_fn, params, other, data, [0, 0.5, 1, 2])
    ends = [params, jax.tree.map(jnp.zeros_like, params), other]
    ends.append(jax.tree.map(lambda w: -3 * w, params))
    expected = [float(loss_fn(end, *data)) for end in ends]
    np.testing.assert_allclose(line.losses, expected, rtol=1e-12)


def test_filters_and_directions_of_a_small_kernel():
    """Each filter of noise, its last axis, has the norm of the weights' filter."""
    kernel = jnp.array([[[3.0, 0.0]], [[4.0, 0.1]]])  # (2, 1, 2): norms 5 and 0.1
    params = {"kernel": kernel, "bias": jnp.ones(3), "scale": jnp.ones(())}
    v = sharpness.filter_normalized_direction(params, key=3)
    noise = np.asarray(v["kernel"])
    np.testing.assert_allclose(np.linalg.norm(noise, axis=(0, 1)), [5, 0.1])
    assert not np.any(v["bias"]) and not np.any(v["scale"])
    # Both filters are parts of the same noise: their entries have its signs.
    first = sharpness.filter_normalized_direction(params, filter_axis=0, key=3)
    sizes = np.linalg.norm(np.asarray(first["kernel"]), axis=(1, 2))
    np.testing.assert_allclose(sizes, [3, np.hypot(4, 0.1)])
    np.testing.assert_array_equal(np.sign(first["kernel"]), np.sign(noise))
    other = sharpness.filter_normalized_direction(params, key=4)
    assert np.any(other["kernel"] != v["kernel"])


def test_two_directions_that_nearly_lie_on_one_line_span_a_plane():
    w, x = jnp.zeros(2), jnp.ones((3, 2))

    def measure(second):
        return sharpness.over_plane(
            lambda w, x: jnp.mean(x @ w),
            w,
            x,
            [jnp.array([1.0, 0.0]), second],
            [0],
            [0],
        )

    assert measure(jnp.array([1.0, 0.004])).losses == 0
    with pytest.raises(ValueError, match="orthogonal to the first"):
        measure(jnp.array([1.0, 1e-4]))


def test_biases_of_convolutions_are_not_filters():
    """Equinox gives them the axes of the image; Flax has no such biases."""
    wide = 1.0 + jnp.arange(4.0).reshape(4, 1, 1)
    params = {"weight": jnp.ones((4, 2, 3)), "bias": wide, "dense": jnp.ones((4, 1))}
    v = sharpness.filter_normalized_direction(params, filter_axis=0)
    np.testing.assert_array_equal(v["bias"], 0)
    np.testing.assert_allclose(np.abs(v["dense"]), 1)
    assert np.all(v["weight"] != 0)
    last = {"kernel": wide.reshape(1, 1, 4)}
    v = sharpness.filter_normalized_direction(last)["kernel"]
    np.testing.assert_allclose(np.abs(v), last["kernel"], rtol=1e-6)


def test_a_line_has_the_losses_of_its_points_in_its_dtype():
    def loss(w, x):
        return jnp.sum(w["a"] ** 2) * x.mean() + w["b"]

    w = {"a": jnp.ones(2, jnp.float16), "b": jnp.zeros((), jnp.float16)}
    v = {"a": jnp.array([1.0, 0.0]), "b": np.float64(1)}
    line = sharpness.along_line(loss, w, jnp.ones(3, jnp.float32), v, [0, 1, -3])
    assert line.distances.dtype == line.losses.dtype == jnp.float32
    np.testing.assert_array_equal(line.losses, [2, 6, 2])
    line = sharpness.along_line(loss, w, np.ones(3, np.float32), v, np.float16([0.5]))
    assert line.losses.dtype == jnp.float32
    np.testing.assert_allclose(line.losses, [3.75])


def test_half_precision_solutions_are_subtracted_in_float32():
    start, end = jnp.float16(2048), jnp.float16(0.25)
    line = sharpness.interpolate(
        lambda w, x: w * x.mean(), start, end, jnp.ones(2, jnp.float32), [0.0, 1.0]
    )
    np.testing.assert_array_equal(line.losses, [2048, 0.25])


def test_directions_have_the_key_zero_by_default():
    params, _ = network()
    for draw in (sharpness.random_direction, sharpness.filter_normalized_direction):
        assert_trees_close(draw(params), draw(params, key=0))
        other = draw(params, key=1)["a"]
        assert np.any(draw(params)["a"] != other)


def test_the_steepest_direction_at_a_stationary_point_is_zero():
    v = sharpness.gradient_direction(
        lambda w, x: jnp.sum(w**2) * x.mean(), jnp.zeros(3), jnp.ones(4)
    )
    np.testing.assert_array_equal(v, 0)


def test_directions():
    params, data = network()
    random = sharpness.random_direction(params)
    assert float(optax.tree.norm(random)) == pytest.approx(1)
    other = sharpness.random_direction(params, key=1)
    assert abs(float(optax.tree.vdot(random, other))) < 0.5

    params = {"conv": jax.random.normal(jax.random.key(0), (3, 3, 2, 4)), **params}
    filters = sharpness.filter_normalized_direction(params, key=1)
    for name, axes in (("conv", (0, 1, 2)), ("a", (0,))):
        np.testing.assert_allclose(
            np.sqrt(np.sum(filters[name] ** 2, axis=axes)),
            np.sqrt(np.sum(params[name] ** 2, axis=axes)),
        )
    assert not np.any(filters["b"])
    filters = sharpness.filter_normalized_direction(params, filter_axis=0)
    np.testing.assert_allclose(
        np.sqrt(np.sum(filters["a"] ** 2, axis=1)),
        np.sqrt(np.sum(params["a"] ** 2, axis=1)),
    )

    params, data = network()
    steepest = sharpness.gradient_direction(loss_fn, params, data, batch_size=7)
    gradient = jax.grad(loss_fn)(params, *data)
    norm = optax.tree.norm(gradient)
    assert_trees_close(steepest, jax.tree.map(lambda g: g / norm, gradient), rtol=1e-9)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_filters_of_any_scale_keep_their_norms(scale):
    kernel = np.float32(scale) * jnp.array([[3.0, 0.0], [4.0, 1.0]], jnp.float32)
    v = sharpness.filter_normalized_direction(kernel)
    norms = np.linalg.norm(np.asarray(v, np.float64), axis=0)
    np.testing.assert_allclose(norms, [5 * scale, scale], rtol=1e-5)
    zero = sharpness.filter_normalized_direction(jnp.zeros((2, 2), jnp.float32))
    np.testing.assert_array_equal(zero, 0)
