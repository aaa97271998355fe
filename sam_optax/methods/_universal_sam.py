"""Universal SAM: the loss plus a sharpness that random points estimate."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sam_optax import _tree
from sam_optax._checks import (
    check_number,
    check_static_integer,
    check_static_number,
    require_losses,
    require_params,
)
from sam_optax._hyperparameters import ScalarOrSchedule, nan_if_negative, scheduled
from sam_optax._masks import Mask, check_mask, zero_where_masked
from sam_optax._parts import Descent
from sam_optax._random import Key, key_stream
from sam_optax._rounding import round_to_nearest
from sam_optax._step import sharpness_aware
from sam_optax.methods._descent import stay
from sam_optax.methods._noise import NoiseState
from sam_optax.methods._record import record

KINDS = ("trace", "determinant", "frobenius")


def add_sharpness(
    rho: ScalarOrSchedule = 0.05,
    lam: ScalarOrSchedule = 0.0025,
    *,
    kind: str = "trace",
    samples: int = 2,
    half_width: float = 0.01,
    as_released: bool = False,
    key: Key = 0,
    mask: Mask = None,
) -> Descent:
    """The descent of `universal_sam`: gᵃ plus λ times the gradient of a sharpness.

    Args:
      rho, lam, kind, samples, half_width, as_released, key: those of the method
        `universal_sam`. Default 0.05, 0.0025, "trace", 2, 0.01, False and 0.
      mask: where False, the random points are those of the parameters. Default None.

    Returns:
      A descent for `sharpness_aware`, with an ascent that leaves the parameters where
      they are. It carries a key.

    Raises:
      ValueError: if an argument is out of its range.
    """
    check_number("rho", rho, at_least=0)
    check_number("lam", lam)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}.")
    check_static_integer("samples", samples, at_least=2 if kind == "frobenius" else 1)
    check_static_number("half_width", half_width, at_least=0)
    if mask is not None:
        check_mask("mask", mask)
    keys = key_stream(key, "universal_sam")

    def direction(key: jax.Array, params: Any) -> optax.Updates:
        if kind == "determinant":
            uniform = _tree.uniform_like(key, params)
            drawn = jax.tree.map(lambda u: half_width * (2 * u - 1), uniform)
            return zero_where_masked(drawn, mask, params)
        drawn = zero_where_masked(_tree.normal_like(key, params), mask, params)
        is_on_sphere = kind == "trace" and not as_released
        return _tree.unit(drawn) if is_on_sphere else drawn

    def part(rho, lam):
        radius = nan_if_negative(rho)

        def update_fn(
            updates: optax.Updates,
            state: Any,
            params: optax.Params | None = None,
            *,
            perturbed_loss: Any = None,
            value_and_grad_fn: Any = None,
            grad_fn: Any = None,
            perturb: Callable[..., optax.Params] = round_to_nearest,
            group: Any = None,
            **extra_args: Any,
        ) -> tuple[optax.Updates, NoiseState]:
            del extra_args
            require_params(params, "add_sharpness")
            if kind != "trace":
                require_losses(perturbed_loss, value_and_grad_fn, "add_sharpness")
            now, later = keys.next(state.noise_key, group)
            rises, gaps = [], []
            for index in range(samples):
                drawn = direction(jax.random.fold_in(now, index), params)
                point = perturb(params, _tree.scale(radius, drawn))
                if kind == "trace":
                    there = jnp.zeros(()), grad_fn(point)
                else:
                    there = value_and_grad_fn(point)
                loss, gradient = _tree.at_least_float32(there)
                rises.append(loss - (perturbed_loss if kind != "trace" else 0))
                gaps.append(_tree.subtract(gradient, updates))
            weights = _weights(kind, jnp.stack(rises), radius, as_released)
            d = updates
            for weight, gap in zip(weights, gaps, strict=True):
                d = _tree.add_scaled(d, lam * weight, gap)
            return d, NoiseState(later)

        return optax.GradientTransformationExtraArgs(
            lambda params: NoiseState(keys.start()), update_fn
        )

    return Descent.of(scheduled(part, rho=rho, lam=lam), uses_loss=kind != "trace")


def _weights(kind: str, rises: jax.Array, rho: Any, as_released: bool) -> jax.Array:
    """The weight of G(w + ρξᵢ) − g for each i; 0 where ρ is 0."""
    count = len(rises)
    rho = jnp.asarray(rho, rises.dtype)
    # At rho = 0 there is nothing to divide by, and nothing to see of the sharpness.
    inverse = jnp.where(rho == 0, 0, 1 / jnp.where(rho == 0, 1, rho * rho))
    if kind == "frobenius":
        # The covariance of losses and gradients is unchanged if g is taken from each
        # gradient, as the centred losses add up to 0.
        centred = (rises - jnp.mean(rises)) / (count - 1)
        return centred * (inverse if as_released else 2 * inverse * inverse)
    scale = jnp.where(rho == 0, 0, 1) if as_released else inverse
    if kind == "trace":
        return jnp.full(count, scale / count)
    # p/mean(p)³ with p = exp(−q/2), whose parts may leave the range alone.
    logs = -rises * inverse / 2
    log_mean = jax.nn.logsumexp(logs) - math.log(count)
    return scale * jnp.exp(logs - 3 * log_mean) / count


@record(
    title="Universal SAM",
    equation="d = g + λ ∇S, S a mean over random points that measures the Hessian",
    radius="the scale of the random points",
    source="Tahmasebi 2024",
    url="https://arxiv.org/abs/2406.03682",
    gradients=lambda samples: samples + 1,
    cost="n + 1",
)
def universal_sam(
    rho: ScalarOrSchedule = 0.05,
    lam: ScalarOrSchedule = 0.0025,
    *,
    kind: str = "trace",
    samples: int = 2,
    half_width: float = 0.01,
    as_released: bool = False,
    key: Key = 0,
    mask: Mask = None,
    guard: bool = False,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""A universal class of sharpness-aware minimization: Trace-, Det- and Frob-SAM.

    .. math::
      d = \nabla L(w) + \lambda \nabla S(w), \qquad
      q_i = \frac{L(w + \rho \xi_i) - L(w)}{\rho^2}, \qquad
      S = \begin{cases}
        \frac1n \sum_i q_i & \text{trace} \\
        \big(\frac1n \sum_i e^{-q_i/2}\big)^{-2} & \text{determinant} \\
        \mathrm{var}_i\, q_i & \text{frobenius}
      \end{cases}

    For small ρ, S follows the trace, the determinant or the Frobenius norm of the
    Hessian. The ξ_i are random: on the unit sphere for the trace, in a cube for the
    determinant, and standard normal for the Frobenius norm.

    Args:
      rho: ρ, the scale of the random points. Default 0.05, that of `sam`. At ρ = 0,
        d = g.
      lam: λ, the weight of the sharpness. Default 0.0025, the default ρ²: for the
        trace, d is then the mean gradient at the random points, as with the authors' 1
        and as_released=True. Tune it: S is of another size for each kind.
      kind: "trace", "determinant" or "frobenius". Default "trace".
      samples: the number n of points, a Python integer: at least 2 for "frobenius", and
        else 1. Default 2.
      half_width: half the edge of the cube of "determinant". Default 0.01, from
        the authors' command. S grows like exp(q), so a wide cube over a small ρ leaves
        the range of the numbers.
      as_released: whether to weigh as the authors' code does; see below. Default False.
      key: an int, a typed key or a legacy one. Default 0.
      guard: passed on to `sharpness_aware`. Default False, as for `random_sam`.
      mask, stochastic_rounding: passed on to `sharpness_aware`; the random points are
        those of the parameters where the mask is False. Default None.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.
      "determinant" and "frobenius" need losses beside gradients: take these with
      `sam_value_and_grad` or `value_and_ascent_grad`.

    Raises:
      ValueError: if rho or half_width is negative, or kind or samples is not one of the
        values above; from update, if a loss is needed and grad_fn returns none.

    Examples:
      With f(w) = w³, the second derivative is 6 w, and grows by 6. The sharpness
      q = f″/2 for small ρ has the gradient 3:

      >>> import jax, jax.numpy as jnp, sam_optax
      >>> sam = sam_optax.universal_sam(rho=0.01, lam=2.0, samples=32)
      >>> grad_fn, w = jax.grad(lambda w: w**3), jnp.array(0.0)
      >>> d, _ = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
      >>> print(f"{d:.1f}")
      6.0

    References:
      Tahmasebi et al., `A Universal Class of Sharpness-Aware Minimization Algorithms
      <https://arxiv.org/abs/2406.03682>`_, ICML 2024.

    Differences from the authors' code. With as_released=True, its trajectories are
    reproduced:
      1. For the trace and the determinant, it does not divide the difference of the
         gradients by ρ², although it divides that of the losses.
      2. For the trace, its points are standard normal and not on the sphere.
      3. For the Frobenius norm, it has the factor 1/ρ² where the gradient of S has
         2/ρ⁴.

    We could not read the paper's definition of S. Its constants are those for which ∇S
    is what the authors' code computes, but for the differences above.

    Cost: n + 1 gradients a step; a key is carried.
    """
    descent = add_sharpness(
        rho,
        lam,
        kind=kind,
        samples=samples,
        half_width=half_width,
        as_released=as_released,
        key=key,
        mask=mask,
    )
    return sharpness_aware(
        stay(),
        descent=descent,
        mask=mask,
        guard=guard,
        stochastic_rounding=stochastic_rounding,
    )
