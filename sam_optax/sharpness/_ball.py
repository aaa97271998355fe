"""How much the loss rises in a ball around the parameters."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from sam_optax import _sharding as sharding
from sam_optax import _tree
from sam_optax._checks import check_constant, check_positive_integer
from sam_optax._random import Key, typed_key
from sam_optax.sharpness._batches import check_data, mean_over_groups, run_over
from sam_optax.sharpness._checks import check_params
from sam_optax.sharpness._estimate import (
    Estimate,
    check_at_least_two,
    estimate_over_keys,
)
from sam_optax.sharpness._loss import Function, mean_loss, mean_loss_and_gradient
from sam_optax.sharpness._printing import describe

Norm = Literal["l2", "linf"]


class Sharpness(NamedTuple):
    """How much the loss rises from w to w + ε.

    Attributes:
      loss: L(w).
      perturbed_loss: L(w + ε).
      sharpness: L(w + ε) − L(w).
      perturbation: ε, a tree like the parameters. With `m`, every group of examples has
        its own ε: then this is None, and the losses are means over the groups.
    """

    loss: jax.Array  # shape=(), at least float32
    perturbed_loss: jax.Array  # shape=(), at least float32
    sharpness: jax.Array  # shape=(), at least float32
    perturbation: Any = None

    def __repr__(self) -> str:
        return describe("Sharpness", self._asdict())


class _Ball(NamedTuple):
    """The ball ‖ε / c‖ ≤ ρ, in coordinates δ = ε / c, where it is ‖δ‖ ≤ ρ.

    c is the magnitude of w, by entry, in the adaptive case, and 1 otherwise.
    """

    norm: Norm
    stretch: Callable[[Any], Any]  # times c: turns δ into ε, and ∂L/∂ε into ∂L/∂δ
    rho: Any

    def steepest(self, gradient: Any) -> Any:
        """The δ with ‖δ‖ = ρ along which the loss rises fastest."""
        # With ρ = 0 there is no way to go, even where the gradient is NaN.
        known = jax.tree.map(lambda g: jnp.where(self.rho == 0, 0, g), gradient)
        gradient = self.stretch(known)
        if self.norm == "l2":
            return _tree.scale(self.rho, _tree.unit(gradient))
        return _tree.scale(self.rho, jax.tree.map(jnp.sign, gradient))

    def project(self, delta: Any) -> Any:
        """The point of the ball that is nearest to δ."""
        if self.norm == "l2":
            size = _tree.norm(delta)
            rho = jnp.asarray(self.rho, size.dtype)
            shrink = jnp.where(size > rho, rho / jnp.where(size > 0, size, 1), 1)
            return _tree.scale(shrink, delta)

        def clip(d):
            rho = jnp.asarray(self.rho, d.dtype)
            return jnp.clip(d, -rho, rho)

        return jax.tree.map(clip, delta)

    def draw(self, key: jax.Array, like: Any) -> Any:
        """A random δ: on the sphere for "l2", anywhere in the cube for "linf".

        In many dimensions nearly all of a ball's volume lies close to the sphere.
        """
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
    r"""The rise of the loss at SAM's perturbed point: the surrogate gap of GSAM.

    .. math::
      h(w) = L(w + \varepsilon) - L(w), \qquad
      \varepsilon = \rho \, \frac{\nabla L(w)}{\|\nabla L(w)\|_2}

    This is the rise after a single step along the gradient. `worst_case` searches the
    ball for a larger one.

    Args:
      loss_fn: `loss_fn(params, *data)` returns a scalar, the mean of the loss over the
        examples it is given.
      params: w, a tree of real arrays. Half-precision leaves are cast to float32.
      data: the arguments of the loss after the parameters: a tuple of trees of arrays
        with the examples along their first axis, or a `stream`. A single argument needs
        no tuple.
      rho: the radius, at least 0.
      norm: the norm of ε that is ρ: "l2" as above, or "linf", where ε = ρ sign(∇L).
        Default "l2".
      adaptive: whether ε is measured relative to \|w\|, entry by entry, as in ASAM:
        ε = ρ w² ∇L / ‖w ∇L‖ for "l2", and ε = ρ \|w\| sign(∇L) for "linf". The gap
        then stays the same if neurons are rescaled such that the network computes the
        same function. Default False.
      m: if given, each group of m consecutive examples has its own ε, and the result is
        the mean over the groups (m-sharpness). Default None: one ε for all examples.
      batch_size: how many examples to evaluate at once; with `m`, a multiple of m.
        Default None: all, or with `m` one group. An incomplete last batch is weighted
        by its number of examples.

    Returns:
      A `Sharpness`. For a large ρ the step can go beyond the hill, and the gap can be
      negative. For a small ρ the gap is lost in rounding: in float32, choose ρ such
      that the gap is well above 1e-7 of the loss.

    Raises:
      ValueError: if rho < 0, the data are empty or cannot be divided into groups of m,
        their arrays hold different numbers of examples, or a parameter is not finite.
        Traced values are not checked.
      TypeError: if the loss does not return a real scalar.

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
    return run_over(
        data,
        _surrogate_gap,
        Function(loss_fn),
        params,
        data,
        rho,
        norm=norm,
        adaptive=adaptive,
        m=m,
        batch_size=batch_size,
    )


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

    where p is 2 or ∞ and Π projects onto the ball. The steps t = 0, …, n − 1 shrink
    linearly, α_t = α (1 − t / n). The best point of all restarts counts. It is a lower
    bound of the true maximum; more steps and restarts come closer to it.

    Args:
      loss_fn: `loss_fn(params, *data)` returns a scalar, the mean of the loss over the
        examples it is given.
      params: w, a tree of real arrays. Half-precision leaves are cast to float32.
      data: the arguments of the loss after the parameters: a tuple of trees of arrays
        with the examples along their first axis, or a `stream`. A single argument needs
        no tuple.
      rho: the radius, at least 0.
      steps: n, the ascent steps of each restart. Default 20, as in Andriushchenko et
        al. With one step, one restart and the default step size, the result is the
        `surrogate_gap`, or 0 if that is negative.
      restarts: how many times to start. The first start is w itself, which the ascent
        cannot leave if the gradient there is zero; the others are random points, on the
        surface of the ball for "l2", and anywhere in the cube for "linf". Default 2.
      step_size: α, the size of the first step in units of ρ. Default 1.
      norm: of the ball: "l2" (p = 2), or "linf" (p = ∞), where the ascent follows the
        sign of the gradient. Default "l2".
      adaptive: whether ε is measured relative to \|w\|, entry by entry: ‖ε / w‖ ≤ ρ.
        Weights that are 0 then stay 0. Default False.
      m: if given, the maximum is taken for each group of m consecutive examples, and
        the result is the mean over the groups (m-sharpness). Default None: one ε for
        all examples.
      batch_size: how many examples to evaluate at once; with `m`, a multiple of m.
        Default None: all, or with `m` one group.
      key: seed or JAX random key of the random starts. Default 0.

    Returns:
      A `Sharpness`; its `sharpness` is at least 0. If ρ is 0, or no higher point was
      found, ε is 0. It is NaN if the loss or its gradient is NaN at a point that the
      ascent visits.

    Raises:
      ValueError: if rho or step_size is negative, a count is not a positive integer,
        the data are empty or cannot be divided into groups of m, their arrays hold
        different numbers of examples, or a parameter is not finite. Traced values are
        not checked.
      TypeError: if the loss does not return a real scalar.

    Examples:
      At the minimum of L = (w₁² + 9 w₂²) / 2 the gradient is zero, so the first start
      stays there. The second one finds the sharp direction, along which the loss rises
      by 9 ρ² / 2.

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
    _check_at_least_zero("step_size", step_size)
    params, data = _check(params, data, rho, norm, m, batch_size)
    return run_over(
        data,
        _worst_case,
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
    r"""The mean rise of the loss when Gaussian noise is added to the parameters.

    .. math::
      \mathbb{E}_{\varepsilon \sim N(0, \rho^2)} [L(w + \varepsilon) - L(w)]
        \approx \tfrac{\rho^2}{2} \, \mathrm{tr} \, \nabla^2 L(w)

    The approximation holds for small ρ.

    Args:
      loss_fn: `loss_fn(params, *data)` returns a scalar, the mean of the loss over the
        examples it is given.
      params: w, a tree of real arrays. Half-precision leaves are cast to float32.
      data: the arguments of the loss after the parameters: a tuple of trees of arrays
        with the examples along their first axis, or a `stream`. A single argument needs
        no tuple.
      rho: the standard deviation of each entry of ε, at least 0. ‖ε‖ is then about ρ
        times the square root of the number of parameters.
      samples: how many ε are drawn. Default 100.
      adaptive: whether the standard deviation of each entry is ρ \|w\| instead of ρ.
        Default False.
      batch_size: how many examples to evaluate at once. Default None: all.
      key: seed or JAX random key of the noise. Default 0.

    Returns:
      An `Estimate`. There is no `m` here: the noise does not depend on the examples, so
      groups of them would have the same expected rise.

    Raises:
      ValueError: if rho < 0, samples < 2, the data are empty, their arrays hold
        different numbers of examples, or a parameter is not finite. Traced values are
        not checked.
      TypeError: if the loss does not return a real scalar.

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
    return run_over(
        data,
        _average_case,
        Function(loss_fn),
        params,
        data,
        rho,
        typed_key(key),
        samples=samples,
        adaptive=adaptive,
        batch_size=batch_size,
    )


def eigenvalue_from_gap(gap: Any, rho: Any) -> Any:
    r"""GSAM's estimate of the largest eigenvalue of the Hessian, from a surrogate gap.

    .. math::
      \sigma_{max} \approx 2 h / \rho^2

    This holds at a minimum and for small ρ, as long as h is well above the rounding of
    the loss (in float32, 1e-7 of it), and if h is the largest rise in the ball: use
    `worst_case(...).sharpness`. The `surrogate_gap` there is too small, because SAM's
    single step does not find the direction of the largest rise. Away from a minimum, h
    also contains the rise along the gradient, ρ ‖∇L‖, and the estimate is too large.

    Args:
      gap: h, a number or an array.
      rho: the radius with which h was measured, above 0.

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

    Cost: no pass over the data.
    """
    _check_at_least_zero("rho", rho)
    if not isinstance(rho, Tracer) and rho == 0:
        raise ValueError("rho must be > 0, got 0.")
    if hasattr(rho, "dtype") and isinstance(gap, jax.Array) and _tree.is_inexact(gap):
        rho = jnp.asarray(rho, gap.dtype)
    return 2 * (gap / rho) / rho


def _check_at_least_zero(name: str, value: Any) -> None:
    is_known = hasattr(value, "dtype") and not isinstance(value, Tracer)
    check_constant(name, float(value) if is_known else value, at_least=0)


def _check(params, data, rho, norm, m, batch_size):
    _check_at_least_zero("rho", rho)
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

    def gap(key, data, batch_size):
        del key
        loss, gradient = mean_loss_and_gradient(loss_fn, params, data, batch_size)
        perturbation = ball.stretch(ball.steepest(gradient))
        point = _tree.add_scaled(params, 1, perturbation)
        perturbed_loss = mean_loss(loss_fn, point, data, batch_size)
        return Sharpness(loss, perturbed_loss, perturbed_loss - loss, perturbation)

    return _over_groups(gap, data, batch_size, m, jax.random.key(0))


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

    def search(key, data, batch_size):
        def at(delta, function):
            point = _tree.add_scaled(params, 1, ball.stretch(delta))
            return function(loss_fn, point, data, batch_size)

        def keep_higher(best, loss, delta):
            is_higher = (loss > best[0]) | jnp.isnan(loss)
            return jax.tree.map(
                lambda new, old: jnp.where(is_higher, new, old), (loss, delta), best
            )

        def climb(t, carry):
            delta, best = carry
            loss, gradient = at(delta, mean_loss_and_gradient)
            best = keep_higher(best, loss, delta)
            first, t = (jnp.asarray(x, loss.dtype) for x in (step_size, t))
            shrunk = first * (1 - t / steps)
            delta = _tree.add_scaled(delta, shrunk, ball.steepest(gradient))
            return ball.project(delta), best

        def restart(index, best):
            drawn = ball.draw(jax.random.fold_in(key, index), params)
            drawn = sharding.like(drawn, params)
            start = _tree.scale(jnp.where(index == 0, 0, 1), drawn)
            delta, best = jax.lax.fori_loop(0, steps, climb, (start, best))
            return keep_higher(best, at(delta, mean_loss), delta)

        start = sharding.like(_tree.zeros_like(params), params)
        loss = at(start, mean_loss)
        best = jax.lax.fori_loop(0, restarts, restart, (loss, start))
        return Sharpness(loss, best[0], best[0] - loss, ball.stretch(best[1]))

    return _over_groups(search, data, batch_size, m, key)


def _over_groups(function, data, batch_size, m, key) -> Sharpness:
    """function(key, data, batch_size) on all data, or its mean over groups of m."""
    if m is None:
        return function(key, data, batch_size)
    return mean_over_groups(
        lambda key, *group: function(key, group, None)._replace(perturbation=None),
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
        noise = stretch(sharding.like(_tree.normal_like(key, params), params))
        point = _tree.add_scaled(params, rho, noise)
        return mean_loss(loss_fn, point, data, batch_size) - loss

    return estimate_over_keys(rise, key, samples)
