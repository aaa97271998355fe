"""The descent axis: transformations that turn the perturbed gradient gᵃ into d.

A descent receives gᵃ as its updates, in at least float32, and g and ε as the extra
arguments `ascent_gradient=` and `perturbation=`. Each is written as gᵃ or g plus
something built on gᵃ − g: the same mathematics as in the papers, exactly g where the
two gradients agree, and accurate where they nearly do.
"""

import math
from typing import Any

import jax.numpy as jnp
import optax

from sam_optax import _tree
from sam_optax._hyperparameters import ScalarOrSchedule, check_number, scheduled


def _descent(function: Any) -> optax.GradientTransformationExtraArgs:
    """A stateless descent from a function (gᵃ, g, ε, w) -> d."""

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        ascent_gradient: Any = None,
        perturbation: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        del extra_args
        return function(updates, ascent_gradient, perturbation, params), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update_fn
    )


def surrogate_gap(
    alpha: ScalarOrSchedule = 0.4, *, minimize: str = "perturbed_loss"
) -> optax.GradientTransformationExtraArgs:
    r"""GSAM's descent: one loss goes down, and the surrogate gap without raising it.

    .. math::
      d = g^a - \alpha \, (g - \mathrm{proj}_{g^a}\, g)
      \qquad\text{or, to minimize the loss,}\qquad
      d = g + \alpha \, (g^a - \mathrm{proj}_{g}\, g^a)

    The gap is h = L(w + ε) − L(w). The part of g orthogonal to gᵃ is that of −(gᵃ − g),
    which is how it is computed.

    Args:
      alpha: weight α of the gap. Default 0.4, the paper's for two of four ViTs (Table
        4); its ResNets take 0.005 to 0.01, its Mixers 0.01 to 0.6.
      minimize: `"perturbed_loss"` (default), the paper's Algorithm 1, or `"loss"`, the
        other form of the authors' JAX code.

    Returns:
      A descent for `sharpness_aware`.

    Raises:
      ValueError: if minimize is neither of the two.

    Examples:
      "ASAM + ascent" of the paper:

      >>> import sam_optax
      >>> sam = sam_optax.sharpness_aware(
      ...     sam_optax.asam_ascent(rho=0.5), descent=sam_optax.surrogate_gap(0.4))

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, ICLR 2022.
    """
    check_number("alpha", alpha)
    if minimize not in ("perturbed_loss", "loss"):
        raise ValueError(
            f"minimize must be 'perturbed_loss' or 'loss', got {minimize!r}."
        )

    def part(alpha):
        def descend(ga, g, perturbation, params):
            kept = ga if minimize == "perturbed_loss" else g
            residual = _tree.orthogonal_difference(ga, g, kept)
            return _tree.add_scaled(kept, alpha, residual)

        return _descent(descend)

    return scheduled(part, alpha=alpha)


def blend(weight: ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """d = g + a (gᵃ − g): the gradient of the loss plus a times the surrogate gap.

    Args:
      weight: a. 1 is SAM, 0 the base optimizer, γ/(1−γ) WSAM, 1 + λ the sum of the
        perturbed loss and λ times the gap.

    Returns:
      A descent for `sharpness_aware`.

    Examples:
      >>> import sam_optax
      >>> sam = sam_optax.sharpness_aware(
      ...     sam_optax.fsam_ascent(rho=0.1), descent=sam_optax.blend(0.5))
    """
    check_number("weight", weight)

    def part(weight):
        def descend(ga, g, perturbation, params):
            return _tree.add_scaled(g, weight, _tree.subtract(ga, g))

        return _descent(descend)

    return scheduled(part, weight=weight)


def renormalize(
    minimum: ScalarOrSchedule = 0.0,
    maximum: ScalarOrSchedule = math.inf,
    *,
    weighted: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""StableSAM's descent: gᵃ, with the norm of g.

    .. math::
      d = \gamma g^a, \qquad \gamma = \frac{\|g\|}{\|g^a\|}

    Args:
      minimum: lower bound of the factor γ. Default 0: none.
      maximum: upper bound of the factor. Default infinity: none. The paper's Remark 19
        takes γ₀ and √γ₀ as the two bounds, for some γ₀ < 1; a maximum of 1 never
        lengthens a step. Where a bound binds, d is not g even if gᵃ is.
      weighted: weigh the entries of g by |w| and those of gᵃ by |w + ε| in the norms,
        as the authors' code does for its adaptive form. Default False.

    Returns:
      A descent for `sharpness_aware`. d is zero where gᵃ is.

    Raises:
      ValueError: if a bound is negative, or the minimum above the maximum.

    Examples:
      >>> import sam_optax
      >>> sam = sam_optax.sharpness_aware(
      ...     sam_optax.fsam_ascent(rho=0.1), descent=sam_optax.renormalize())

    References:
      Tan et al., `Stabilizing Sharpness-aware Minimization Through A Simple
      Renormalization Strategy <https://arxiv.org/abs/2401.07250>`_, 2024.
    """
    check_number("minimum", minimum, at_least=0)
    if not (isinstance(maximum, float) and maximum == math.inf):
        check_number("maximum", maximum, at_least=0)
    if (
        isinstance(minimum, (int, float))
        and isinstance(maximum, (int, float))
        and minimum > maximum
    ):
        raise ValueError(
            f"minimum must not be above maximum, got {minimum} and {maximum}."
        )

    def part(minimum, maximum):
        def descend(ga, g, perturbation, params):
            if weighted:
                point = _tree.add_scaled(perturbation, 1, params)
                length = _tree.norm(_tree.multiply(_tree.magnitude(params), g))
                reach = _tree.norm(_tree.multiply(_tree.magnitude(point), ga))
            else:
                length, reach = _tree.norm(g), _tree.norm(ga)
            is_zero = reach == 0
            factor = length / jnp.where(is_zero, 1, reach)
            return _tree.scale(jnp.clip(factor, minimum, maximum), ga)

        return _descent(descend)

    return scheduled(part, minimum=minimum, maximum=maximum)


def weigh_gap(
    gamma: ScalarOrSchedule = 0.9,
) -> optax.GradientTransformationExtraArgs:
    """WSAM's descent: `blend` with the weight γ/(1−γ), for γ in [0, 1).

    Args:
      gamma: γ. ½ is SAM, 0 the base optimizer. Default 0.9, from the paper.

    Returns:
      A descent for `sharpness_aware`.

    Raises:
      ValueError: if gamma is a Python number outside [0, 1).
    """
    check_number("gamma", gamma, at_least=0, below=1)
    return scheduled(lambda gamma: blend(gamma / (1 - gamma)), gamma=gamma)


def penalize_gap(
    lam: ScalarOrSchedule = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """The gradient of f_p + λh, the perturbed loss plus λ times the surrogate gap.

    That is gᵃ + λ (gᵃ − g), or `blend` with the weight 1 + λ.

    Args:
      lam: λ. Default 1.

    Returns:
      A descent for `sharpness_aware`.
    """
    check_number("lam", lam)
    return scheduled(lambda lam: blend(1 + lam), lam=lam)
