"""Eigenvalues, trace and spectral density of a matrix, from its products alone."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sam_optax import _sharding as sharding
from sam_optax import _tree
from sam_optax._checks import check_positive_integer
from sam_optax._random import Key, typed_key
from sam_optax.sharpness._batches import run_over
from sam_optax.sharpness._estimate import (
    Estimate,
    check_at_least_two,
    estimate_over_keys,
)
from sam_optax.sharpness._matrices import Matrix
from sam_optax.sharpness._printing import describe

Which = Literal["largest", "smallest"]


class Eigenpairs(NamedTuple):
    """Eigenvalues and eigenvectors, the most extreme first.

    Attributes:
      values: the eigenvalues λ.
      vectors: the eigenvectors v: a tree like the parameters, with all vectors stacked
        along a new first axis of each leaf. Each has norm 1 and an arbitrary sign.
      residuals: ‖Av − λv‖, plus an estimate of the rounding errors, which is the
        rounding error of the largest eigenvalue times the square root of the dimension.
        A has an eigenvalue within about this distance of λ. The residuals cannot show
        whether another eigenvalue was missed.
    """

    values: jax.Array  # shape=(k,), at least float32
    vectors: Any  # shapes=(k, ...), at least float32
    residuals: jax.Array  # shape=(k,), at least float32

    def __repr__(self) -> str:
        return describe("Eigenpairs", self._asdict())

    def vector(self, index: int) -> Any:
        """One of the vectors, as a tree like the parameters."""
        return jax.tree.map(lambda leaf: leaf[index], self.vectors)


class SpectralDensity(NamedTuple):
    """The distribution of the eigenvalues, as weighted nodes for each random vector.

    Attributes:
      nodes: points on the real line.
      weights: the share of the spectrum at each node; their sum is 1 for each random
        vector.
    """

    nodes: jax.Array  # shape=(num_samples, num_matvecs), at least float32
    weights: jax.Array  # shape=(num_samples, num_matvecs), at least float32

    def __repr__(self) -> str:
        return describe("SpectralDensity", self._asdict())

    def moment(self, power: int) -> jax.Array:
        """Estimates the mean of λ^power over the spectrum, tr(A^power) / dimension.

        The estimate has no bias, apart from rounding, for powers up to
        2 num_matvecs − 1.
        """
        return jnp.mean(jnp.sum(self.weights * self.nodes**power, axis=1))

    def on_grid(self, grid: Any, width: Any) -> jax.Array:
        """The density at the points of a grid, with a Gaussian in place of each node.

        Args:
          grid: real numbers, shape (points,).
          width: the standard deviation of the Gaussians, above 0.

        Returns:
          Shape (points,); its integral over the real line is 1.

        Raises:
          ValueError: if the width is not positive.
        """
        if not isinstance(width, Tracer) and not width > 0:
            raise ValueError(f"width must be > 0, got {width}.")
        grid, width = (jnp.asarray(x, self.nodes.dtype) for x in (grid, width))
        distance = (grid[:, None, None] - self.nodes) / width
        peak = self.weights / (width * jnp.sqrt(2 * jnp.pi))
        return jnp.mean(jnp.sum(peak * jnp.exp(-(distance**2) / 2), axis=2), axis=1)


def eigenpairs(
    matrix: Matrix,
    k: int = 1,
    *,
    which: Which = "largest",
    num_matvecs: int | None = None,
    key: Key = 0,
) -> Eigenpairs:
    r"""The k largest or smallest eigenvalues and their eigenvectors, by Lanczos.

    .. math::
      A v_i = \lambda_i v_i, \qquad \lambda_1 \ge \lambda_2 \ge \dots

    Full reorthogonalisation keeps Lanczos from finding the same eigenvalue twice. But
    an eigenvalue that A has several times, as in regressions with several outputs, can
    be found fewer times.

    Args:
      matrix: A, from `hessian`, `gauss_newton` or `empirical_fisher`.
      k: how many eigenvalues to return.
      which: "largest" or "smallest", as real numbers with their sign: the smallest
        eigenvalues of a Hessian are the most negative ones. Default "largest".
      num_matvecs: how many products with A to spend, at least k. Default 4k + 20, or
        the dimension if that is less. With as many products as the dimension, the
        result is exact up to rounding; otherwise the `residuals` show how close it is.
      key: seed or JAX random key of the start vector. Default 0.

    Returns:
      `Eigenpairs`. Eigenvalues much smaller than the largest need float64 to have
      correct digits.

    Raises:
      ValueError: if k or num_matvecs is not an integer from 1 to the dimension, or
        num_matvecs < k.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sam_optax import sharpness
      >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> H = sharpness.hessian(lambda w, x: jnp.mean((x @ w) ** 2), jnp.ones(2), x)
      >>> pairs = sharpness.eigenpairs(H, 2)
      >>> print(pairs.values.round(3), jnp.abs(pairs.vector(0)).round(3))
      [9. 1.] [0. 1.]

    References:
      Ghorbani et al., `An Investigation into Neural Net Optimization via Hessian
      Eigenvalue Density <https://arxiv.org/abs/1901.10159>`_, ICML 2019.

    Cost: num_matvecs + 1 products with the matrix, and num_matvecs vectors in memory.
    """
    check_positive_integer("k", k)
    if which not in ("largest", "smallest"):
        raise ValueError(f'which must be "largest" or "smallest", got {which!r}.')
    size = matrix.dimension
    if k > size:
        raise ValueError(f"k must be at most the dimension, {size}, got {k}.")
    count = min(size, 4 * k + 20) if num_matvecs is None else num_matvecs
    _check_matvecs(count, size)
    if count < k:
        raise ValueError(f"num_matvecs must be at least k = {k}, got {count}.")
    key, options = typed_key(key), {"k": k, "which": which, "num_matvecs": count}
    return run_over(matrix.data, _eigenpairs, matrix, key, **options)


def trace(matrix: Matrix, *, num_samples: int = 100, key: Key = 0) -> Estimate:
    r"""The trace, estimated by Hutchinson's method.

    .. math::
      \mathrm{tr} A = \mathbb{E} \, v^\top A v, \qquad v_i = \pm 1

    Args:
      matrix: A, from `hessian`, `gauss_newton` or `empirical_fisher`.
      num_samples: how many random vectors v. Default 100.
      key: seed or JAX random key of these vectors. Default 0.

    Returns:
      An `Estimate` of the trace, which is the sum of the eigenvalues.

    Raises:
      ValueError: if num_samples < 2.
      ImportError: if matfree is not installed (`pip install "sam_optax[sharpness]"`).

    Examples:
      For a diagonal matrix the estimate is exact, because every v_i² is 1.

      >>> import jax.numpy as jnp
      >>> from sam_optax import sharpness
      >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> H = sharpness.hessian(lambda w, x: jnp.mean((x @ w) ** 2), jnp.ones(2), x)
      >>> print(*sharpness.trace(H))
      10.0 0.0

    References:
      Hutchinson, `A Stochastic Estimator of the Trace of the Influence Matrix
      <https://doi.org/10.1080/03610919008812866>`_, 1990. The implementation uses
      `matfree <https://github.com/pnkraemer/matfree>`_.

    Cost: num_samples products with the matrix.
    """
    _matfree()
    check_at_least_two("num_samples", num_samples)
    key = typed_key(key)
    return run_over(matrix.data, _trace, matrix, key, num_samples=num_samples)


def spectral_density(
    matrix: Matrix,
    *,
    num_matvecs: int | None = None,
    num_samples: int = 10,
    key: Key = 0,
) -> SpectralDensity:
    r"""The density of all eigenvalues, by stochastic Lanczos quadrature.

    .. math::
      \phi(t) = \frac{1}{p} \sum_i \delta(t - \lambda_i) \approx
        \frac{1}{S} \sum_s \sum_j \omega_{sj} \, \delta(t - \theta_{sj})

    where p is the dimension. From each of S random vectors, Lanczos makes a small
    tridiagonal matrix: θ are its eigenvalues, and ω the squared first entries of its
    eigenvectors.

    Args:
      matrix: A, from `hessian`, `gauss_newton` or `empirical_fisher`.
      num_matvecs: how many products with A for each random vector. Default 50, or the
        dimension if that is less.
      num_samples: how many random vectors. Default 10.
      key: seed or JAX random key of these vectors. Default 0.

    Returns:
      A `SpectralDensity`. Its smallest and largest nodes are close to the smallest and
      largest eigenvalues.

    Raises:
      ValueError: if a count is not a positive integer, or num_matvecs is above the
        dimension.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sam_optax import sharpness
      >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> H = sharpness.hessian(lambda w, x: jnp.mean((x @ w) ** 2), jnp.ones(2), x)
      >>> density = sharpness.spectral_density(H)
      >>> print(f"{density.moment(1):.3f} {density.moment(2):.3f}")
      5.000 41.000

    References:
      Ghorbani et al., `An Investigation into Neural Net Optimization via Hessian
      Eigenvalue Density <https://arxiv.org/abs/1901.10159>`_, ICML 2019.

    Cost: num_samples · (num_matvecs + 1) products with the matrix, and num_matvecs
      vectors in memory.
    """
    size = matrix.dimension
    count = min(size, 50) if num_matvecs is None else num_matvecs
    _check_matvecs(count, size)
    check_positive_integer("num_samples", num_samples)
    key, options = typed_key(key), {"num_matvecs": count, "num_samples": num_samples}
    return run_over(matrix.data, _spectral_density, matrix, key, **options)


def _matfree() -> Any:
    """Imports matfree when it is needed, because it is an optional dependency."""
    try:
        import matfree.stochtrace
    except ImportError as error:
        raise ImportError(
            "Traces are computed with matfree. To install it: "
            'pip install "sam_optax[sharpness]".'
        ) from error
    return matfree


def _check_matvecs(count: Any, size: int) -> None:
    check_positive_integer("num_matvecs", count)
    if count > size:
        raise ValueError(
            f"num_matvecs must be at most the dimension, {size}, got {count}."
        )


class _Flat(NamedTuple):
    """A matrix that multiplies flat vectors, in the widest dtype of the parameters."""

    multiply: Callable[[jax.Array], jax.Array]
    like: jax.Array  # shape=(dimension,)
    unravel: Callable[[jax.Array], Any]  # a vector -> a tree like the parameters


def _flat(matrix: Matrix) -> _Flat:
    leaves, structure = jax.tree.flatten(matrix.params)
    dtype = _tree.widest(*[leaf.dtype for leaf in leaves])
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]

    def ravel(tree):
        parts = [
            sharding.replicate(x).ravel().astype(dtype) for x in jax.tree.leaves(tree)
        ]
        return jnp.concatenate(parts)

    def unravel(vector):
        parts = jnp.split(vector, ends)
        shaped = [x.reshape(w.shape) for x, w in zip(parts, leaves, strict=True)]
        return structure.unflatten(shaped)

    return _Flat(
        lambda v: ravel(matrix(unravel(v))),
        jnp.zeros(matrix.dimension, dtype),
        unravel,
    )


class _Tridiagonal(NamedTuple):
    """The matrix on the span of the basis, as scale · basisᵀ · small · basis."""

    scale: jax.Array  # shape=()
    small: jax.Array  # shape=(num_matvecs, num_matvecs)
    basis: jax.Array  # shape=(num_matvecs, dimension), orthonormal rows
    residual: jax.Array  # shape=(), the norm of what one more product would add


def _tridiagonalise(matrix: Matrix, start: jax.Array, num_matvecs: int) -> _Tridiagonal:
    """Lanczos' decomposition, with full reorthogonalisation.

    matfree's would divide by what a product adds to the basis, and that is nothing but
    rounding errors once the basis spans an invariant subspace, which for a multiple of
    the identity is after one product. Here the next direction is then a random one,
    orthogonal to all that came before.
    """
    multiply, _, _ = _flat(matrix)
    # Products are scaled to entries of about 1, because squares of entries could
    # overflow or underflow.
    scale = jnp.max(jnp.abs(multiply(start)))
    shrink = _tree.reciprocal_or_zero(scale)
    config: Any = jax.config
    of_caller = config.jax_default_matmul_precision

    def orthogonal(v, basis):
        return v - jnp.matmul(basis.T, jnp.matmul(basis, v))

    def norm(v):
        square = jnp.vdot(v, v)  # the derivative of the root would be infinite at zero
        return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))

    def unit(v):
        return v / norm(v)

    def step(i, carry):
        basis, diagonal, off_diagonal, v = carry
        basis = basis.at[i].set(v)
        with jax.default_matmul_precision(of_caller):
            product = multiply(v) * shrink
        rest = orthogonal(orthogonal(product, basis), basis)
        length = norm(rest)
        rounding = 4 * jnp.finfo(v.dtype).eps * norm(product)
        adds_nothing = length <= rounding
        noise_key = jax.random.fold_in(jax.random.key(0), i)
        noise = jax.random.normal(noise_key, v.shape, v.dtype)
        rest = rest / jnp.where(adds_nothing, 1, length)
        following = jnp.where(adds_nothing, noise, rest)
        for _ in range(2):  # once would leave rounding errors where little is left
            following = unit(orthogonal(following, basis))
        diagonal = diagonal.at[i].set(jnp.vdot(v, product))
        added = jnp.where(adds_nothing, 0, length)
        return basis, diagonal, off_diagonal.at[i].set(added), following

    zeros = jnp.zeros(num_matvecs, start.dtype)
    basis = jnp.zeros((num_matvecs, start.size), start.dtype)
    # GPUs and TPUs multiply matrices of float32 with fewer digits by default. The basis
    # would then not be orthogonal, and eigenvalues would be found several times.
    with jax.default_matmul_precision("highest"):
        basis, diagonal, off_diagonal, _ = jax.lax.fori_loop(
            0, num_matvecs, step, (basis, zeros, zeros, unit(start))
        )
    sides = jnp.diag(off_diagonal[:-1], 1)
    small = jnp.diag(diagonal) + sides + sides.T
    return _Tridiagonal(scale, small, basis, off_diagonal[-1])


@functools.partial(jax.jit, static_argnames=("k", "which", "num_matvecs"))
def _eigenpairs(matrix, key, *, k, which, num_matvecs):
    _, like, unravel = _flat(matrix)
    start = jax.random.normal(key, like.shape, like.dtype)
    scale, small, basis, residual = _tridiagonalise(matrix, start, num_matvecs)
    small_values, coefficients = jnp.linalg.eigh(small)  # ascending
    chosen = slice(None, k) if which == "smallest" else slice(None, -k - 1, -1)
    values, coefficients = small_values[chosen], coefficients[:, chosen]
    vectors = jnp.matmul(coefficients.T, basis, precision="highest")
    rounding = jnp.finfo(values.dtype).eps * like.size**0.5
    rounding = rounding * jnp.max(jnp.abs(small_values))
    residuals = residual * jnp.abs(coefficients[-1]) + rounding
    return Eigenpairs(scale * values, jax.vmap(unravel)(vectors), scale * residuals)


@functools.partial(jax.jit, static_argnames=("num_samples",))
def _trace(matrix, key, *, num_samples):
    multiply, like, _ = _flat(matrix)
    integrand = _matfree().stochtrace.monte_carlo_trace()

    def sample(key):
        return integrand(multiply, _signs(key, like))

    return estimate_over_keys(sample, key, num_samples)


def _signs(key: jax.Array, like: jax.Array) -> jax.Array:
    return jax.random.rademacher(key, like.shape, like.dtype)


@functools.partial(jax.jit, static_argnames=("num_matvecs", "num_samples"))
def _spectral_density(matrix, key, *, num_matvecs, num_samples):
    _, like, _ = _flat(matrix)

    def sample(key):
        tridiagonal = _tridiagonalise(matrix, _signs(key, like), num_matvecs)
        nodes, vectors = jnp.linalg.eigh(tridiagonal.small)
        return tridiagonal.scale * nodes, vectors[0] ** 2

    keys = jax.random.split(key, num_samples)
    return SpectralDensity(*jax.lax.map(sample, keys))
