"""How much the loss rises in a ball around the parameters."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from sam_optax import _layout as layout
from sam_optax import _tree
from sam_optax._hyperparameters import check_number, check_positive_integer
from sam_optax._random import Key, typed_key
from sam_optax.sharpness._batches import check_data, finish, mean_over_groups
from sam_optax.sharpness._checks import check_params
from sam_optax.sharpness._estimate import (
    Estimate,
    check_at_least_two,
    estimate_over_keys,
)
from sam_optax.sharpness._loss import Function, mean_loss, mean_loss_and_gradient

Norm = Literal["l2", "linf"]


class Sharpness(NamedTuple):
    """How much the loss rises; scalars, and the perturbation that does it.

    Attributes:
      loss: L(w).
      perturbed_loss: L(w + ε).
      sharpness: L(w + ε) − L(w).
      perturbation: ε, with the structure of the parameters; None under `m`, where every
        group of examples has its own.
    """

    loss: jax.Array  # shape=(), at least float32
    perturbed_loss: jax.Array  # shape=(), at least float32
    sharpness: jax.Array  # shape=(), at least float32
    perturbation: Any = None


class _Ball(NamedTuple):
    """{ε : ‖ε / c‖ ≤ ρ}, described in coordinates δ = ε / c, in which it is round.

    c is |w| in the adaptive case, and else 1.
    """

    norm: Norm
    stretch: Callable[[Any], Any]  # δ -> ε, and a gradient by ε -> one by δ
    rho: Any

    def steepest(self, gradient: Any) -> Any:
        """The δ on the boundary along which the loss rises fastest."""
        gradient = self.stretch(gradient)
        if self.norm == "l2":
            return _tree.scale(self.rho, _tree.unit(gradient))
        return _tree.scale(self.rho, jax.tree.map(jnp.sign, gradient))

    def project(self, delta: Any) -> Any:
        """The nearest δ inside."""
        if self.norm == "l2":
            size = _tree.norm(delta)
            return _tree.scale(
                jnp.where(size > self.rho, self.rho / jnp.where(size > 0, size, 1), 1),
                delta,
            )
        rho = self.rho
        return jax.tree.map(lambda d: jnp.clip(d, -rho, rho).astype(d.dtype), delta)

    def draw(self, key: jax.Array, like: Any) -> Any:
        """A random δ: on the sphere (where nearly all of a large ball is), or inside
        the cube."""
        if self.norm == "l2":
            return _tree.scale(self.rho, _tree.unit(_tree.normal_like(key, like)))
        uniform = _tree.uniform_like(key, like)
        return _tree.scale(self.rho, jax.tree.map(lambda u: 2 * u - 1, uniform))


def surrogate_gap(
    loss_fn: Callable[..., Any],
    params: Any,
    data: Any,
    *,
    rho: float,
    norm: Norm = "l2",
    adaptive: bool = False,
    m: int | None = None,
    batch_size: int | None = None,
) -> Sharpness:
    r"""The rise of the loss after SAM's one step: GSAM's surrogate gap.

    .. math::
      h(w) = L(w + \varepsilon) - L(w), \qquad
      \varepsilon = \rho \, \frac{\nabla L(w)}{\|\nabla L(w)\|_2}

    `eigenvalue_from_gap` makes an estimate of the largest eigenvalue from it.

    Args:
      loss_fn: (params, *data) -> a scalar, the mean over the examples it is given.
      params: w, a tree of real arrays. Half-precision leaves are measured in float32.
      data: the arguments of the loss after the parameters, as a tuple of trees of
        arrays with the examples along their first axis, or a `stream`.
      rho: the radius, at least 0.
      norm: "l2", or "linf" with ε = ρ sign(∇L). Default "l2".
      adaptive: measure ε in units of \|w\|, elementwise, as ASAM does:
        ε = ρ w² ∇L / ‖w ∇L‖, or ρ \|w\| sign(∇L). It does not change where neurons are
        rescaled. Default False.
      m: m-sharpness: an ε for each group of m consecutive examples, and the mean of
        their gaps. Default None: one for all examples.
      batch_size: how many examples to evaluate at once. Default None: all, or one
        group. An incomplete last batch counts by its examples.

    Returns:
      A `Sharpness`. A large ρ can step over the hill: the gap is negative then. One of
      a small ρ drowns in rounding: in float32, keep it well above 1e-7 of the loss.

    Raises:
      ValueError: if rho < 0, the data are empty or uneven, or params is not finite
        (where it is not traced).
      TypeError: if the loss is no scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sam_optax import sharpness
      >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> gap = sharpness.surrogate_gap(
      ...     lambda w, x: jnp.mean((x @ w) ** 2), jnp.array([0.0, 1.0]), x, rho=0.1)
      >>> print(f"{gap.loss:.3f} {gap.perturbed_loss:.3f} {gap.sharpness:.3f}")
      4.500 5.445 0.945

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, ICLR 2022. Adaptive: Kwon et al., `ASAM
      <https://arxiv.org/abs/2102.11600>`_, ICML 2021.

    Cost: one gradient and a forward pass over the data.
    """
    params, data = _check(params, data, rho, norm, m, batch_size)
    gap = _surrogate_gap(
        Function(loss_fn),
        params,
        data,
        rho,
        norm=norm,
        adaptive=adaptive,
        m=m,
        batch_size=batch_size,
    )
    return finish(data, gap)


def worst_case(
    loss_fn: Callable[..., Any],
    params: Any,
    data: Any,
    *,
    rho: float,
    steps: int = 20,
    restarts: int = 2,
    step_size: float = 1.0,
    norm: Norm = "l2",
    adaptive: bool = False,
    m: int | None = None,
    batch_size: int | None = None,
    key: Key = 0,
) -> Sharpness:
    r"""The largest rise of the loss that projected ascent finds in a ball.

    .. math::
      \max_{\|\varepsilon\|_p \le \rho} L(w + \varepsilon) - L(w), \qquad
      \varepsilon \leftarrow \Pi\big(\varepsilon + \alpha_t \, \rho \,
        \tfrac{\nabla L(w + \varepsilon)}{\|\nabla L(w + \varepsilon)\|_2}\big)

    with steps that shrink linearly, α_t = α (1 − t / n), and the best point of all
    restarts kept. It is a lower bound of the true maximum; more steps and restarts come
    closer.

    Args:
      loss_fn: (params, *data) -> a scalar, the mean over the examples it is given.
      params: w, a tree of real arrays. Half-precision leaves are measured in float32.
      data: the arguments of the loss after the parameters, as a tuple of trees of
        arrays with the examples along their first axis, or a `stream`.
      rho: the radius, at least 0.
      steps: n. Default 20, as in Andriushchenko et al. With one step and one restart it
        is the `surrogate_gap`, or 0 where that is negative.
      restarts: the first starts at w and the others at random; more than one is needed
        where the gradient is zero. Default 2.
      step_size: α, of the first step, in units of ρ. Default 1.
      norm: "l2", or "linf" with the sign of the gradient as its direction. Default
        "l2".
      adaptive: measure ε in units of \|w\|, elementwise: ‖ε / w‖ ≤ ρ. Weights of 0
        stay. Default False.
      m: m-sharpness: the maximum for each group of m consecutive examples, and the
        mean of these. Default None: one ε for all examples.
      batch_size: how many examples to evaluate at once; under `m`, a multiple of it.
        Default None: all, or one group.
      key: of the random starts. Default 0.

    Returns:
      A `Sharpness`, at least 0. Where ρ is 0 or nothing higher was found, ε is 0.

    Raises:
      ValueError: if rho < 0, a count is no positive integer, the data are empty or no
        whole number of groups, or params is not finite (where it is not traced).
      TypeError: if the loss is no scalar.

    Examples:
      At the minimum of L = (w₁² + 9 w₂²) / 2 the gradient is zero. The second start
      finds the sharp direction, in which the loss rises by 9 ρ² / 2.

      >>> import jax.numpy as jnp
      >>> from sam_optax import sharpness
      >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> worst = sharpness.worst_case(
      ...     lambda w, x: jnp.mean((x @ w) ** 2), jnp.zeros(2), x, rho=0.1)
      >>> print(f"{worst.sharpness:.4f}", jnp.abs(worst.perturbation).round(3))
      0.0450 [0.  0.1]

    References:
      Foret et al., `Sharpness-Aware Minimization
      <https://arxiv.org/abs/2010.01412>`_, ICLR 2021 (m-sharpness); Kwon et al., `ASAM
      <https://arxiv.org/abs/2102.11600>`_, ICML 2021 (adaptive); Andriushchenko et al.,
      `A Modern Look at the Relationship between Sharpness and Generalization
      <https://arxiv.org/abs/2302.07011>`_, ICML 2023 (the measures compared).

    Cost: restarts · steps gradients and restarts + 1 forward passes over the data.
    """
    check_positive_integer("steps", steps)
    check_positive_integer("restarts", restarts)
    check_number("step_size", step_size, at_least=0)
    params, data = _check(params, data, rho, norm, m, batch_size)
    worst = _worst_case(
        Function(loss_fn),
        params,
        data,
        rho,
        step_size,
        typed_key(key),
        steps=steps,
        restarts=restarts,
        norm=norm,
        adaptive=adaptive,
        m=m,
        batch_size=batch_size,
    )
    return finish(data, worst)


def average_case(
    loss_fn: Callable[..., Any],
    params: Any,
    data: Any,
    *,
    rho: float,
    samples: int = 100,
    adaptive: bool = False,
    batch_size: int | None = None,
    key: Key = 0,
) -> Estimate:
    r"""The mean rise of the loss under Gaussian noise.

    .. math::
      \mathbb{E}_{\varepsilon \sim N(0, \rho^2)} [L(w + \varepsilon) - L(w)]
        \approx \tfrac{\rho^2}{2} \, \mathrm{tr} \, \nabla^2 L(w)

    Args:
      loss_fn: (params, *data) -> a scalar, the mean over the examples it is given.
      params: w, a tree of real arrays. Half-precision leaves are measured in float32.
      data: the arguments of the loss after the parameters, as a tuple of trees of
        arrays with the examples along their first axis, or a `stream`.
      rho: the standard deviation of each entry of ε, at least 0; ‖ε‖ is about ρ times
        the root of the number of parameters.
      samples: how many ε are drawn. Default 100.
      adaptive: noise of standard deviation ρ \|w\|, elementwise. Default False.
      batch_size: how many examples to evaluate at once. Default None: all.
      key: of the noise. Default 0.

    Returns:
      An `Estimate`. Each sample is on all examples, so groups of m would not change the
      mean.

    Raises:
      ValueError: if rho < 0, samples < 2, the data are empty or uneven, or params is
        not finite (where it is not traced).
      TypeError: if the loss is no scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sam_optax import sharpness
      >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0]])  # tr ∇²L = 10
      >>> rise = sharpness.average_case(
      ...     lambda w, x: jnp.mean((x @ w) ** 2), jnp.zeros(2), x, rho=0.1)
      >>> bool(abs(rise.mean - 0.05) < 3 * rise.standard_error)
      True

    References:
      Andriushchenko et al., `A Modern Look at the Relationship between Sharpness and
      Generalization <https://arxiv.org/abs/2302.07011>`_, ICML 2023.

    Cost: samples + 1 forward passes over the data.
    """
    check_at_least_two("samples", samples)
    params, data = _check(params, data, rho, "l2", None, batch_size)
    rise = _average_case(
        Function(loss_fn),
        params,
        data,
        rho,
        typed_key(key),
        samples=samples,
        adaptive=adaptive,
        batch_size=batch_size,
    )
    return finish(data, rise)


def eigenvalue_from_gap(gap: Any, rho: Any) -> Any:
    r"""GSAM's estimate of the largest eigenvalue of the Hessian, from a gap.

    .. math::
      \sigma_{max} \approx 2 h / \rho^2

    Holds at a minimum, for small ρ, and an h that is the largest in the ball: there
    `worst_case(...).sharpness`. Away from a minimum, h also holds the gradient's part,
    ρ ‖∇L‖, and the estimate is too large; SAM's one step does not find the direction of
    the largest rise, and with its `surrogate_gap` it is too small.

    Args:
      gap: h, a number or an array.
      rho: the radius that it was measured with, above 0.

    Returns:
      2h / ρ².

    Raises:
      ValueError: if rho <= 0.

    Examples:
      >>> from sam_optax import sharpness
      >>> round(sharpness.eigenvalue_from_gap(0.045, rho=0.1), 6)
      9.0

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, ICLR 2022, Lemma 3.3.

    Cost: none.
    """
    _check_radius(rho)
    if not isinstance(rho, Tracer) and rho == 0:
        raise ValueError("rho must be > 0, got 0.")
    return 2 * gap / rho**2


def _check_radius(rho: Any) -> None:
    if callable(rho):
        raise TypeError("rho must be a number: a measure has no step for a schedule.")
    is_known = hasattr(rho, "dtype") and not isinstance(rho, Tracer)
    check_number("rho", float(rho) if is_known else rho, at_least=0)


def _check(params, data, rho, norm, m, batch_size):
    _check_radius(rho)
    if norm not in ("l2", "linf"):
        raise ValueError(f'norm must be "l2" or "linf", got {norm!r}.')
    return check_params(params), check_data(data, batch_size, m)


def _stretch_by(params: Any, adaptive: bool) -> Callable[[Any], Any]:
    if not adaptive:
        return lambda tree: tree
    return functools.partial(_tree.multiply, _tree.magnitude(params))


@functools.partial(
    jax.jit,
    static_argnames=("norm", "adaptive", "m", "batch_size"),
)
def _surrogate_gap(loss_fn, params, data, rho, *, norm, adaptive, m, batch_size):
    ball = _Ball(norm, _stretch_by(params, adaptive), rho)

    def measure(key, data, batch_size):
        del key
        loss, gradient = mean_loss_and_gradient(loss_fn, params, data, batch_size)
        perturbation = ball.stretch(ball.steepest(gradient))
        point = _tree.add_scaled(params, 1, perturbation)
        perturbed_loss = mean_loss(loss_fn, point, data, batch_size)
        return Sharpness(loss, perturbed_loss, perturbed_loss - loss, perturbation)

    return _over_groups(measure, data, batch_size, m, jax.random.key(0))


@functools.partial(
    jax.jit,
    static_argnames=("steps", "restarts", "norm", "adaptive", "m", "batch_size"),
)
def _worst_case(
    loss_fn,
    params,
    data,
    rho,
    step_size,
    key,
    *,
    steps,
    restarts,
    norm,
    adaptive,
    m,
    batch_size,
):
    ball = _Ball(norm, _stretch_by(params, adaptive), rho)

    def measure(key, data, batch_size):
        def at(delta, function):
            point = _tree.add_scaled(params, 1, ball.stretch(delta))
            return function(loss_fn, point, data, batch_size)

        def keep_higher(best, loss, delta):
            is_higher = loss > best[0]
            return jax.tree.map(
                lambda new, old: jnp.where(is_higher, new, old), (loss, delta), best
            )

        def climb(t, carry):
            delta, best = carry
            loss, gradient = at(delta, mean_loss_and_gradient)
            best = keep_higher(best, loss, delta)
            shrunk = step_size * (1 - t / steps)
            delta = _tree.add_scaled(delta, shrunk, ball.steepest(gradient))
            return ball.project(delta), best

        def restart(index, best):
            drawn = ball.draw(jax.random.fold_in(key, index), params)
            drawn = layout.like(drawn, params)
            start = _tree.scale(jnp.where(index == 0, 0, 1), drawn)
            delta, best = jax.lax.fori_loop(0, steps, climb, (start, best))
            return keep_higher(best, at(delta, mean_loss), delta)

        start = layout.like(_tree.zeros_like(params), params)
        loss = at(start, mean_loss)
        best = jax.lax.fori_loop(0, restarts, restart, (loss, start))
        return Sharpness(loss, best[0], best[0] - loss, ball.stretch(best[1]))

    return _over_groups(measure, data, batch_size, m, key)


def _over_groups(measure, data, batch_size, m, key) -> Sharpness:
    """measure(key, data, batch_size) -> Sharpness on all data, or per group of m."""
    if m is None:
        return measure(key, data, batch_size)
    return mean_over_groups(
        lambda key, *group: measure(key, group, None)._replace(perturbation=None),
        data,
        batch_size,
        m,
        key,
    )


@functools.partial(jax.jit, static_argnames=("samples", "adaptive", "batch_size"))
def _average_case(loss_fn, params, data, rho, key, *, samples, adaptive, batch_size):
    stretch = _stretch_by(params, adaptive)

    loss = mean_loss(loss_fn, params, data, batch_size)

    def rise(key):
        noise = stretch(layout.like(_tree.normal_like(key, params), params))
        point = _tree.add_scaled(params, rho, noise)
        return mean_loss(loss_fn, point, data, batch_size) - loss

    return estimate_over_keys(rise, key, samples)
