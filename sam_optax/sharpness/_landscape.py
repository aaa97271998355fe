"""The loss along lines and planes through the parameters."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sam_optax import _tree
from sam_optax._random import Key, typed_key
from sam_optax.sharpness._batches import check_data, run_over
from sam_optax.sharpness._checks import check_params, check_same_outline
from sam_optax.sharpness._loss import Function, mean_loss, mean_loss_and_gradient
from sam_optax.sharpness._printing import describe


class Line(NamedTuple):
    """The loss along a line.

    Attributes:
      distances: t, for the points w + t v on the line with direction v.
      losses: the loss at these points.
    """

    distances: jax.Array  # shape=(points,)
    losses: jax.Array  # shape=(points,), at least float32

    def __repr__(self) -> str:
        return describe("Line", self._asdict())


class Surface(NamedTuple):
    """The loss over a plane, with rows and columns as plotting libraries expect them.

    Attributes:
      xs: x, for the points w + x u + y v of the plane with directions u and v.
      ys: y.
      losses: `losses[i, j]` is the loss at y = ys[i] and x = xs[j].
    """

    xs: jax.Array  # shape=(columns,)
    ys: jax.Array  # shape=(rows,)
    losses: jax.Array  # shape=(rows, columns), at least float32

    def __repr__(self) -> str:
        return describe("Surface", self._asdict())


def along_line(
    loss_fn: Callable[..., Any],
    params: Any,
    data: Any,
    direction: Any,
    distances: Any,
    *,
    batch_size: int | None = None,
) -> Line:
    r"""The loss along a direction.

    .. math::
      L(w + t v)

    Args:
      loss_fn: `loss_fn(params, *data)` returns a scalar, the mean of the loss over the
        examples it is given.
      params: w, a tree of real arrays. Half-precision leaves are cast to float32.
      data: the arguments of the loss after the parameters: a tuple of trees of arrays
        with the examples along their first axis, or a `stream`. A single argument needs
        no tuple.
      direction: v, a tree like the parameters, for example from `random_direction`,
        `filter_normalized_direction`, `gradient_direction` or `Eigenpairs.vector`.
      distances: the values of t, shape (points,).
      batch_size: how many examples to evaluate at once. Default None: all.

    Returns:
      A `Line`.

    Raises:
      ValueError: if the direction differs from the parameters in structure or shapes,
        the data are empty, their arrays hold different numbers of examples, or a
        parameter is not finite. Traced parameters are not checked.
      TypeError: if the loss does not return a real scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sam_optax import sharpness
      >>> line = sharpness.along_line(
      ...     lambda w, x: jnp.mean((w - x) ** 2), jnp.array(0.0), jnp.zeros(4),
      ...     jnp.array(2.0), jnp.array([-1.0, 0.0, 1.0]))
      >>> print(line.losses)
      [4. 0. 4.]

    Cost: a forward pass over the data for each point.
    """
    distances = _distances("distances", distances)
    params, data = check_params(params), check_data(data, batch_size)
    direction = _check_direction("direction", direction, params)
    points = distances[:, None]
    losses = run_over(
        data, _losses, Function(loss_fn), params, data, (direction,), points, batch_size
    )
    return Line(distances, losses)


def over_plane(
    loss_fn: Callable[..., Any],
    params: Any,
    data: Any,
    directions: Sequence[Any],
    xs: Any,
    ys: Any,
    *,
    batch_size: int | None = None,
) -> Surface:
    r"""The loss over the plane that two directions span.

    .. math::
      L(w + x u + y v)

    Args:
      loss_fn: `loss_fn(params, *data)` returns a scalar, the mean of the loss over the
        examples it is given.
      params: w, a tree of real arrays. Half-precision leaves are cast to float32.
      data: the arguments of the loss after the parameters: a tuple of trees of arrays
        with the examples along their first axis, or a `stream`. A single argument needs
        no tuple.
      directions: u and v, trees like the parameters; see `along_line`.
      xs: the values of x, shape (columns,).
      ys: the values of y, shape (rows,).
      batch_size: how many examples to evaluate at once. Default None: all.

    Returns:
      A `Surface`.

    Raises:
      ValueError: if there are not two directions, both lie on one line, one differs
        from the parameters in structure or shapes, the data are empty, their arrays
        hold different numbers of examples, or a parameter is not finite. Traced
        parameters are not checked.
      TypeError: if the loss does not return a real scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sam_optax import sharpness
      >>> surface = sharpness.over_plane(
      ...     lambda w, x: jnp.mean(x @ w**2), jnp.zeros(2), jnp.ones((4, 2)),
      ...     (jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])),
      ...     xs=jnp.arange(3.0), ys=jnp.arange(2.0))
      >>> print(surface.losses)
      [[0. 1. 4.]
       [1. 2. 5.]]

    Cost: a forward pass over the data for each point.
    """
    xs, ys = _distances("xs", xs), _distances("ys", ys)
    params, data = check_params(params), check_data(data, batch_size)
    directions = tuple(directions)
    if len(directions) != 2:
        raise ValueError(f"A plane has two directions, got {len(directions)}.")
    directions = tuple(
        _check_direction("Each direction", direction, params)
        for direction in directions
    )
    _check_span_a_plane(*directions)
    widest = _tree.widest(xs.dtype, ys.dtype)
    grid = jnp.meshgrid(xs.astype(widest), ys.astype(widest))
    points = jnp.stack(grid, axis=-1).reshape(-1, 2)
    losses = run_over(
        data, _losses, Function(loss_fn), params, data, directions, points, batch_size
    )
    return Surface(xs, ys, losses.reshape(len(ys), len(xs)))


def interpolate(
    loss_fn: Callable[..., Any],
    start: Any,
    end: Any,
    data: Any,
    fractions: Any,
    *,
    batch_size: int | None = None,
) -> Line:
    r"""The loss on the straight line through two solutions.

    .. math::
      L\big((1 - t) \, w_0 + t \, w_1\big)

    Args:
      loss_fn: `loss_fn(params, *data)` returns a scalar, the mean of the loss over the
        examples it is given.
      start: w₀, a tree of real arrays. Half-precision leaves are cast to float32.
      end: w₁, a tree with the structure and shapes of w₀.
      data: the arguments of the loss after the parameters: a tuple of trees of arrays
        with the examples along their first axis, or a `stream`. A single argument needs
        no tuple.
      fractions: the values of t, shape (points,). Below 0 and above 1, the line
        continues beyond the solutions.
      batch_size: how many examples to evaluate at once. Default None: all.

    Returns:
      A `Line`.

    Raises:
      ValueError: if the two solutions differ in structure or shapes, the data are
        empty, their arrays hold different numbers of examples, or a solution is not
        finite. Traced solutions are not checked.
      TypeError: if the loss does not return a real scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sam_optax import sharpness
      >>> line = sharpness.interpolate(
      ...     lambda w, x: jnp.mean((w**2 - x) ** 2), jnp.array(-1.0), jnp.array(1.0),
      ...     jnp.ones(4), jnp.array([0.0, 0.5, 1.0]))
      >>> print(line.losses)
      [0. 1. 0.]

    References:
      Goodfellow et al., `Qualitatively Characterizing Neural Network Optimization
      Problems <https://arxiv.org/abs/1412.6544>`_, ICLR 2015.

    Cost: a forward pass over the data for each point.
    """
    start, end = check_params(start, "start"), check_params(end, "end")
    check_same_outline("end", end, start)
    direction = jax.tree.map(jnp.subtract, end, start)
    return along_line(loss_fn, start, data, direction, fractions, batch_size=batch_size)


def random_direction(params: Any, *, key: Key = 0) -> Any:
    r"""A random direction of norm 1; all directions are equally likely.

    .. math::
      v = z / \|z\|_2, \qquad z \sim N(0, 1)

    Args:
      params: a tree of real arrays.
      key: seed or JAX random key. Default 0.

    Returns:
      A tree like the parameters, in at least float32.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from sam_optax import sharpness
      >>> direction = sharpness.random_direction({"w": jnp.zeros((3, 4))})
      >>> round(float(optax.tree.norm(direction)), 5)
      1.0

    Cost: no pass over the data.
    """
    return _random_direction(check_params(params), typed_key(key))


def filter_normalized_direction(
    params: Any, *, filter_axis: int = -1, key: Key = 0
) -> Any:
    r"""A random direction in which each filter has the norm of the weights' filter.

    It makes networks comparable whose weights differ in size.

    .. math::
      v_i = \frac{\|w_i\|}{\|z_i\|} \, z_i, \qquad z \sim N(0, 1)

    for every filter i, that is all weights of one output channel: one index along the
    axis of outputs. The direction is zero for vectors and scalars (biases, and the
    scales and shifts of normalisations), as in the authors' code with
    `ignore='biasbn'`; and, with filter_axis=0, for the biases of Equinox's
    convolutions, of shape (outputs, 1, ...).

    Args:
      params: w, a tree of real arrays.
      filter_axis: the axis of the outputs, 0 or -1. Default -1, as in the kernels of
        Flax; use 0 for those of Equinox.
      key: seed or JAX random key. Default 0.

    Returns:
      A tree like the parameters, in at least float32. A distance of 1 along it moves
      every filter by its own norm.

    Raises:
      ValueError: if filter_axis is neither 0 nor -1, or a parameter is not finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sam_optax import sharpness
      >>> kernel = jnp.array([[3.0, 0.0], [4.0, 1.0]])  # filters of norm 5 and 1
      >>> v = sharpness.filter_normalized_direction(
      ...     {"kernel": kernel, "bias": kernel[0]})
      >>> print(jnp.linalg.norm(v["kernel"], axis=0).round(3), v["bias"])
      [5. 1.] [0. 0.]

    References:
      Li et al., `Visualizing the Loss Landscape of Neural Nets
      <https://arxiv.org/abs/1712.09913>`_, NeurIPS 2018.

    Differences from the authors' code: theirs always takes axis 0, which is the axis of
      outputs in PyTorch.

    Cost: no pass over the data.
    """
    if filter_axis not in (0, -1):
        raise ValueError(f"filter_axis must be 0 or -1, got {filter_axis!r}.")
    return _filter_normalized_direction(
        check_params(params), typed_key(key), filter_axis
    )


def gradient_direction(
    loss_fn: Callable[..., Any],
    params: Any,
    data: Any,
    *,
    batch_size: int | None = None,
) -> Any:
    r"""The direction of steepest ascent, of norm 1.

    .. math::
      v = \nabla L(w) / \|\nabla L(w)\|_2

    Args:
      loss_fn: `loss_fn(params, *data)` returns a scalar, the mean of the loss over the
        examples it is given.
      params: w, a tree of real arrays. Half-precision leaves are cast to float32.
      data: the arguments of the loss after the parameters: a tuple of trees of arrays
        with the examples along their first axis, or a `stream`. A single argument needs
        no tuple.
      batch_size: how many examples to evaluate at once. Default None: all.

    Returns:
      A tree like the parameters, in at least float32. It is zero if the gradient is
      zero.

    Raises:
      ValueError: if the data are empty, their arrays hold different numbers of
        examples, or a parameter is not finite. Traced parameters are not checked.
      TypeError: if the loss does not return a real scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sam_optax import sharpness
      >>> x = jnp.array([[3.0, 4.0]])
      >>> print(sharpness.gradient_direction(
      ...     lambda w, x: jnp.mean(x @ w), jnp.zeros(2), x))
      [0.6 0.8]

    Cost: one gradient over the data.
    """
    params, data = check_params(params), check_data(data, batch_size)
    return run_over(
        data, _gradient_direction, Function(loss_fn), params, data, batch_size
    )


def _check_direction(name: str, direction: Any, params: Any) -> Any:
    check_same_outline(name, direction, params)
    return check_params(direction, name)


def _check_span_a_plane(u: Any, v: Any) -> None:
    cosine = abs(_cosine(u, v))
    if not isinstance(cosine, Tracer) and cosine > 1 - 1e-6:
        raise ValueError(
            "Both directions lie on one line, so they span no plane. Draw random "
            "directions with different keys; of other directions, take the part of the "
            "second that is orthogonal to the first."
        )


_cosine = jax.jit(_tree.cosine)


def _distances(name: str, values: Any) -> jax.Array:
    values = jnp.asarray(values)
    if jnp.iscomplexobj(values):
        raise TypeError(f"{name} must be real, got {values.dtype}.")
    if not jnp.issubdtype(values.dtype, jnp.floating):
        values = values.astype(jnp.float32)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(
            f"{name} must hold at least one number, along one axis; got shape "
            f"{values.shape}."
        )
    return values


@jax.jit
def _random_direction(params, key):
    return _tree.unit(_tree.normal_like(key, params))


@functools.partial(jax.jit, static_argnames="filter_axis")
def _filter_normalized_direction(params, key, filter_axis):
    def normalize(weights, noise):
        # A bias of an Equinox convolution has axes of length 1 as well.
        has_image = filter_axis == 0 and weights.ndim > 2
        if weights.ndim < 2 or (has_image and weights.size == weights.shape[0]):
            return jnp.zeros_like(noise)
        inside = tuple(np.delete(range(weights.ndim), filter_axis))

        def norms(x):
            largest = jnp.max(jnp.abs(x), axis=inside, keepdims=True)
            scaled = x / jnp.where(largest == 0, 1, largest)  # whose squares are finite
            return largest * jnp.sqrt(jnp.sum(scaled**2, axis=inside, keepdims=True))

        return noise * (norms(weights) / norms(noise))

    return jax.tree.map(normalize, params, _tree.normal_like(key, params))


@functools.partial(jax.jit, static_argnames="batch_size")
def _gradient_direction(loss_fn, params, data, batch_size):
    return _tree.unit(mean_loss_and_gradient(loss_fn, params, data, batch_size)[1])


@functools.partial(jax.jit, static_argnames="batch_size")
def _losses(loss_fn, params, data, directions, points, batch_size):
    """The loss at w + Σ points[:, i] · directions[i], one point after another."""

    def loss_at(point):
        moved = params
        for distance, direction in zip(point, directions, strict=True):
            moved = _tree.add_scaled(moved, distance, direction)
        return mean_loss(loss_fn, moved, data, batch_size)

    return jax.lax.map(loss_at, points)
