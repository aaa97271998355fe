"""Curvature as matrices that are never formed, only multiplied by vectors."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sam_optax import _sharding as sharding
from sam_optax import _tree
from sam_optax.sharpness._batches import (
    Stream,
    check_data,
    mean_over_batches,
    run_over,
)
from sam_optax.sharpness._checks import check_params, check_same_outline
from sam_optax.sharpness._loss import (
    Function,
    mean_loss_and_gradient,
    one_loss,
    scalar,
)
from sam_optax.sharpness._printing import describe


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Matrix:
    """A symmetric matrix that is given by its products with vectors.

    `hessian`, `gauss_newton` and `empirical_fisher` return one; `eigenpairs`, `trace`
    and `spectral_density` take one. To multiply, call it: `matrix(v)` takes a tree like
    the parameters and returns one. Each product visits all data once. A matrix is a
    pytree, so it can be an argument of jitted functions.

    Attributes:
      params: the parameters at which the curvature is taken, in at least float32.
      data: the data over which the matrix is a mean: a tuple of trees, or a `stream`.
      product: `product(params, v, *batch)` returns the product with v for one batch. It
        must be a pytree, such as a `jax.tree_util.Partial`.
      batch_size: how many examples are evaluated at once, or None for all.
    """

    params: Any
    data: Any
    product: Callable[..., Any]
    batch_size: int | None = dataclasses.field(default=None, metadata={"static": True})

    def __repr__(self) -> str:
        is_stream = isinstance(self.data, Stream)
        fields = {
            "dimension": self.dimension,
            "data": repr(self.data) if is_stream else self.data,
            "product": type(self.product).__name__.strip("_"),
            "batch_size": self.batch_size,
        }
        return describe("Matrix", fields)

    @property
    def dimension(self) -> int:
        """The number of rows: how many numbers the parameters hold."""
        return optax.tree.size(self.params)

    def __call__(self, vector: Any) -> Any:
        check_same_outline("The vector", vector, self.params)
        if any(map(jnp.iscomplexobj, jax.tree.leaves(vector))):
            raise TypeError("The vector must be real, and it holds complex numbers.")
        vector = sharding.like(_tree.cast_like(vector, self.params), self.params)
        return run_over(self.data, _multiply, self, vector)


@jax.jit
def _multiply(matrix: Matrix, vector: Any) -> Any:
    return mean_over_batches(
        lambda index, *batch: matrix.product(matrix.params, vector, *batch),
        matrix.data,
        matrix.batch_size,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _HessianProduct:
    loss_fn: Callable[..., Any]

    def __call__(self, params, vector, *batch):
        gradient = jax.grad(lambda w: scalar(self.loss_fn)(w, *batch))
        return jax.jvp(gradient, (params,), (vector,))[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _GaussNewtonProduct:
    model_fn: Callable[..., Any]
    loss_fn: Callable[..., Any]

    def __call__(self, params, vector, *batch):
        def model(w):
            return self.model_fn(w, *batch)

        outputs, forwards = jax.linearize(model, params)
        gradient = jax.grad(lambda z: scalar(self.loss_fn)(z, *batch))
        curved = jax.jvp(gradient, (outputs,), (forwards(vector),))[1]
        return jax.linear_transpose(forwards, vector)(curved)[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _FisherProduct:
    loss_fn: Callable[..., Any]

    def __call__(self, params, vector, *batch):
        def losses(w):
            one = one_loss(self.loss_fn)
            return jax.vmap(lambda *example: one(w, *example))(*batch)

        values, forwards = jax.linearize(losses, params)
        slopes = forwards(vector) / len(values)
        return jax.linear_transpose(forwards, vector)(slopes)[0]


def hessian(
    loss_fn: Callable[..., Any],
    params: Any,
    data: Any,
    *,
    batch_size: int | None = None,
) -> Matrix:
    r"""The Hessian of the loss: `hessian(...)(v)` is the Hessian-vector product.

    .. math::
      H v = \nabla^2 L(w) \, v

    Args:
      loss_fn: `loss_fn(params, *data)` returns a scalar, the mean of the loss over the
        examples it is given.
      params: w, a tree of real arrays. Half-precision leaves are cast to float32.
      data: the arguments of the loss after the parameters: a tuple of trees of arrays
        with the examples along their first axis, or a `stream`. A single argument needs
        no tuple.
      batch_size: how many examples to evaluate at once. Default None: all.

    Returns:
      A `Matrix`.

    Raises:
      ValueError: if the data are empty, their arrays hold different numbers of
        examples, or a parameter is not finite. Traced parameters are not checked.
      TypeError: if the loss does not return a real scalar. It is raised when the matrix
        is multiplied.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sam_optax import sharpness
      >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> H = sharpness.hessian(lambda w, x: jnp.mean((x @ w) ** 2), jnp.ones(2), x)
      >>> print(H(jnp.array([1.0, 1.0])))
      [1. 9.]

    References:
      Pearlmutter, `Fast Exact Multiplication by the Hessian
      <https://doi.org/10.1162/neco.1994.6.1.147>`_, Neural Computation 1994.

    Cost: a product takes the forward derivative of one gradient over the data, which
      costs about two gradients.
    """
    return Matrix(
        check_params(params),
        check_data(data, batch_size),
        _HessianProduct(Function(loss_fn)),
        batch_size,
    )


def gauss_newton(
    model_fn: Callable[..., Any],
    loss_fn: Callable[..., Any],
    params: Any,
    data: Any,
    *,
    batch_size: int | None = None,
) -> Matrix:
    r"""The generalised Gauss–Newton matrix: the Hessian without the model's curvature.

    .. math::
      G = J^\top \, \nabla_z^2 \ell(z) \, J, \qquad
      z = f(w), \quad J = \frac{\partial f}{\partial w}

    If ℓ is the cross-entropy of logits, or half the squared error, G is the Fisher
    matrix: that of the model's own distribution of labels, not of the labels in the
    data. If ℓ is convex in the outputs z, G has no negative eigenvalues.

    Args:
      model_fn: f; `model_fn(params, *data)` returns the outputs, a tree of arrays. It
        must have a forward derivative, so it cannot contain a `jax.custom_vjp`.
      loss_fn: ℓ; `loss_fn(outputs, *data)` returns a scalar, the mean of the loss over
        the examples.
      params: w, a tree of real arrays. Half-precision leaves are cast to float32.
      data: the arguments of both functions after the first: a tuple of trees of arrays
        with the examples along their first axis, or a `stream`. A single argument needs
        no tuple.
      batch_size: how many examples to evaluate at once. Default None: all.

    Returns:
      A `Matrix`.

    Raises:
      ValueError: if the data are empty, their arrays hold different numbers of
        examples, or a parameter is not finite. Traced parameters are not checked.
      TypeError: if the loss does not return a real scalar. It is raised when the matrix
        is multiplied.

    Examples:
      For z = w², the Hessian of (z − x)² / 2 at w = 1 is 2 (3 − x), and G is 4.

      >>> import jax.numpy as jnp
      >>> from sam_optax import sharpness
      >>> G = sharpness.gauss_newton(
      ...     lambda w, x: w**2, lambda z, x: jnp.mean((z - x) ** 2) / 2,
      ...     jnp.array(1.0), jnp.array([5.0, 7.0]))
      >>> print(G(1.0))
      4.0

    References:
      Martens, `New Insights and Perspectives on the Natural Gradient Method
      <https://arxiv.org/abs/1412.1193>`_, JMLR 2020.

    Cost: a product takes a forward and a backward derivative of the model.
    """
    return Matrix(
        check_params(params),
        check_data(data, batch_size),
        _GaussNewtonProduct(Function(model_fn), Function(loss_fn)),
        batch_size,
    )


def empirical_fisher(
    loss_fn: Callable[..., Any],
    params: Any,
    data: Any,
    *,
    batch_size: int | None = None,
) -> Matrix:
    r"""The empirical Fisher matrix, made of the gradients of single examples.

    .. math::
      F = \frac{1}{N} \sum_i \nabla \ell_i(w) \, \nabla \ell_i(w)^\top

    It takes the labels from the data. The true Fisher matrix takes them from the
    model's own distribution; see `gauss_newton`. `fisher_trace` is the exact trace of
    the empirical one.

    Args:
      loss_fn: `loss_fn(params, *data)` returns a scalar, the mean of the loss over the
        examples it is given. It is called with one example at a time, under `jax.vmap`.
        It must have a forward derivative, so it cannot contain a `jax.custom_vjp`.
      params: w, a tree of real arrays. Half-precision leaves are cast to float32.
      data: the arguments of the loss after the parameters: a tuple of trees of arrays
        with the examples along their first axis, or a `stream`. A single argument needs
        no tuple.
      batch_size: how many examples to evaluate at once. Default None: all.

    Returns:
      A `Matrix`.

    Raises:
      ValueError: if the data are empty, their arrays hold different numbers of
        examples, or a parameter is not finite. Traced parameters are not checked.
      TypeError: if the loss does not return a real scalar. It is raised when the matrix
        is multiplied.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sam_optax import sharpness
      >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> F = sharpness.empirical_fisher(lambda w, x: jnp.mean(x @ w), jnp.ones(2), x)
      >>> print(F(jnp.array([1.0, 1.0])))
      [0.5 4.5]

    References:
      Kunstner et al., `Limitations of the Empirical Fisher Approximation
      <https://arxiv.org/abs/1905.12558>`_, NeurIPS 2019.

    Cost: a product takes a forward and a backward derivative of the losses.
    """
    return Matrix(
        check_params(params),
        check_data(data, batch_size),
        _FisherProduct(Function(loss_fn)),
        batch_size,
    )


def gradient_norm(
    loss_fn: Callable[..., Any],
    params: Any,
    data: Any,
    *,
    batch_size: int | None = None,
) -> jax.Array:
    r"""The norm of the gradient over all data.

    .. math::
      \|\nabla L(w)\|_2

    Args:
      loss_fn: `loss_fn(params, *data)` returns a scalar, the mean of the loss over the
        examples it is given.
      params: w, a tree of real arrays. Half-precision leaves are cast to float32.
      data: the arguments of the loss after the parameters: a tuple of trees of arrays
        with the examples along their first axis, or a `stream`. A single argument needs
        no tuple.
      batch_size: how many examples to evaluate at once. Default None: all.

    Returns:
      A scalar, at least float32.

    Raises:
      ValueError: if the data are empty, their arrays hold different numbers of
        examples, or a parameter is not finite. Traced parameters are not checked.
      TypeError: if the loss does not return a real scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sam_optax import sharpness
      >>> x = jnp.array([[6.0, 0.0], [0.0, 8.0]])
      >>> print(sharpness.gradient_norm(lambda w, x: jnp.mean(x @ w), jnp.ones(2), x))
      5.0

    Cost: one gradient over the data.
    """
    data = check_data(data, batch_size)
    params = check_params(params)
    return run_over(data, _gradient_norm, Function(loss_fn), params, data, batch_size)


@functools.partial(jax.jit, static_argnames="batch_size")
def _gradient_norm(loss_fn, params, data, batch_size):
    return _tree.norm(mean_loss_and_gradient(loss_fn, params, data, batch_size)[1])


def fisher_trace(
    loss_fn: Callable[..., Any],
    params: Any,
    data: Any,
    *,
    batch_size: int | None = None,
) -> jax.Array:
    r"""The exact trace of the empirical Fisher matrix.

    It is the mean of the squared gradient norms of single examples:

    .. math::
      \mathrm{tr} F = \frac{1}{N} \sum_i \|\nabla \ell_i(w)\|_2^2

    Args:
      loss_fn: `loss_fn(params, *data)` returns a scalar, the mean of the loss over the
        examples it is given. It is called with one example at a time, under `jax.vmap`.
      params: w, a tree of real arrays. Half-precision leaves are cast to float32.
      data: the arguments of the loss after the parameters: a tuple of trees of arrays
        with the examples along their first axis, or a `stream`. A single argument needs
        no tuple.
      batch_size: how many examples to evaluate at once. Each of them has a gradient of
        its own in memory. Default None: all.

    Returns:
      A scalar, at least float32. `trace(empirical_fisher(...))` only estimates it.

    Raises:
      ValueError: if the data are empty, their arrays hold different numbers of
        examples, or a parameter is not finite. Traced parameters are not checked.
      TypeError: if the loss does not return a real scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sam_optax import sharpness
      >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> print(sharpness.fisher_trace(lambda w, x: jnp.mean(x @ w), jnp.ones(2), x))
      5.0

    Cost: one gradient over the data, taken example by example.
    """
    data = check_data(data, batch_size)
    params = check_params(params)
    return run_over(data, _fisher_trace, Function(loss_fn), params, data, batch_size)


@functools.partial(jax.jit, static_argnames="batch_size")
def _fisher_trace(loss_fn, params, data, batch_size):
    def squared_norms(index, *batch):
        del index
        gradients = jax.vmap(lambda *one: jax.grad(one_loss(loss_fn))(params, *one))
        return jnp.mean(jax.vmap(_tree.squared_norm)(gradients(*batch)))

    return mean_over_batches(squared_norms, data, batch_size)
