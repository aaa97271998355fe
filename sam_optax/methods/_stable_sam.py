"""StableSAM: the descent gradient is rescaled to the norm of the gradient at w."""

import math
import numbers
from typing import Unpack

import jax.numpy as jnp
import optax

from sam_optax import _tree
from sam_optax._checks import check_number, is_infinity
from sam_optax._hyperparameters import ScalarOrSchedule, scheduled
from sam_optax._masks import Mask
from sam_optax._parts import Descent
from sam_optax._step import Options, sharpness_aware
from sam_optax.methods._asam import asam_ascent
from sam_optax.methods._descent import stateless_descent
from sam_optax.methods._record import record
from sam_optax.methods._sam import sam_ascent
from sam_optax.methods._usam import usam_ascent


def renormalize(
    minimum: ScalarOrSchedule = 0.0,
    maximum: ScalarOrSchedule = math.inf,
    *,
    weighted: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Descends along gᵃ, with the norm of g.

    .. math::
      d = \gamma g^a, \qquad \gamma = \frac{\|g\|}{\|g^a\|}

    Args:
      minimum: lower bound of the factor γ. Default 0: no bound.
      maximum: upper bound of the factor. Default infinity: no bound. The paper's Remark
        19 takes γ₀ and √γ₀ as the two bounds, for some γ₀ < 1. With a maximum of 1, d
        is never longer than gᵃ. Where a bound changes the factor, d differs from g even
        if gᵃ = g.
      weighted: whether the norms weigh the entries of g by |w| and those of gᵃ by
        |w + ε|, as the authors' code does in its adaptive form. Default False.

    Returns:
      A descent for `sharpness_aware`. d is zero where gᵃ is zero.

    Raises:
      ValueError: if a bound is negative, or the minimum is above the maximum.

    Examples:
      >>> import jax.numpy as jnp
      >>> descent, g, ga = renormalize(), jnp.array([1.0, 0.0]), jnp.array([3.0, 4.0])
      >>> d, _ = descent.update(ga, descent.init(g), ascent_gradient=g)
      >>> [round(x, 6) for x in d.tolist()]
      [0.6, 0.8]

    References:
      Tan et al., `Stabilizing Sharpness-aware Minimization Through A Simple
      Renormalization Strategy <https://arxiv.org/abs/2401.07250>`_, 2024.
    """
    check_number("minimum", minimum, at_least=0)
    if not is_infinity(maximum):
        check_number("maximum", maximum, at_least=0)
    known = [x for x in (minimum, maximum) if isinstance(x, numbers.Real)]
    if len(known) == 2 and known[0] > known[1]:
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
            factor = length / jnp.where(reach == 0, 1, reach)
            return _tree.scale(jnp.clip(factor, minimum, maximum), ga)

        return stateless_descent(descend)

    return Descent.of(scheduled(part, minimum=minimum, maximum=maximum), compares=True)


@record(
    title="StableSAM",
    equation="d = (‖g‖/‖gᵃ‖) gᵃ",
    source="Tan 2024",
    url="https://arxiv.org/abs/2401.07250",
)
def stable_sam(
    rho: ScalarOrSchedule = 0.05,
    *,
    minimum: ScalarOrSchedule = 0.0,
    maximum: ScalarOrSchedule = math.inf,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Stable Sharpness-Aware Minimization (StableSAM).

    .. math::
      \varepsilon = \rho \frac{g}{\|g\|}, \qquad
      d = \frac{\|g\|}{\|g^a\|} g^a

    Args:
      rho: the radius ρ = ‖ε‖. Default 0.05, from the paper's experiments.
      minimum, maximum: bounds of the factor ‖g‖/‖gᵃ‖, as for `descents.renormalize`.
        Default 0 and infinity: none.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0, a bound is negative, or the minimum is above the maximum.

    References:
      Tan et al., `Stabilizing Sharpness-aware Minimization Through A Simple
      Renormalization Strategy <https://arxiv.org/abs/2401.07250>`_, 2024, Algorithm 1.

    Differences from the authors' code: no epsilon is added to the norms.

    Cost: 2 gradients a step; no tree is carried.
    """
    descent = renormalize(minimum, maximum)
    return sharpness_aware(sam_ascent(rho), descent=descent, **options)


@record(
    title="StableASAM",
    equation="ε as `asam`, d as `stable_sam`",
    radius="‖T⁻¹ε‖",
    source="Tan 2024",
    url="https://arxiv.org/abs/2401.07250",
)
def stable_asam(
    rho: ScalarOrSchedule = 0.5,
    eta: ScalarOrSchedule = 0.01,
    *,
    minimum: ScalarOrSchedule = 0.0,
    maximum: ScalarOrSchedule = math.inf,
    adaptive_mask: Mask = None,
    as_released: bool = False,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Stable Adaptive Sharpness-Aware Minimization (StableASAM).

    .. math::
      \varepsilon = \rho \frac{T_w^2 g}{\|T_w g\|}, \qquad T_w = |w| + \eta, \qquad
      d = \frac{\|g\|}{\|g^a\|} g^a

    Args:
      rho: the radius ρ = ‖T_w⁻¹ ε‖. Default 0.5, that of `asam`.
      eta, adaptive_mask: those of `asam`. Default 0.01 and None.
      minimum, maximum: bounds of the factor ‖g‖/‖gᵃ‖, as for `descents.renormalize`.
        Default 0 and infinity: none.
      as_released: whether to follow the authors' code (see below). Default False.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0, eta < 0, a bound is negative, or the minimum is above the
        maximum.

    References:
      Tan et al., `Stabilizing Sharpness-aware Minimization Through A Simple
      Renormalization Strategy <https://arxiv.org/abs/2401.07250>`_, 2024, section 5.3.

    Differences from the authors' code:
      1. Their factor is ‖ |w| g ‖ / ‖ |w + ε| gᵃ ‖, so their d differs from g even if
         gᵃ = g. as_released=True does the same.
      2. Their η is 0.

    Cost: 2 gradients a step; no tree is carried.
    """
    ascent = asam_ascent(rho, eta, adaptive_mask=adaptive_mask)
    descent = renormalize(minimum, maximum, weighted=as_released)
    return sharpness_aware(ascent, descent=descent, **options)


@record(
    title="Stable unnormalised SAM",
    equation="ε as `usam`, d as `stable_sam`",
    radius="‖ε‖/‖g‖",
    source="Tan 2024",
    url="https://arxiv.org/abs/2401.07250",
)
def stable_usam(
    rho: ScalarOrSchedule = 0.05,
    *,
    minimum: ScalarOrSchedule = 0.0,
    maximum: ScalarOrSchedule = math.inf,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Stable Unnormalised Sharpness-Aware Minimization (StableUSAM).

    .. math::
      \varepsilon = \rho g, \qquad d = \frac{\|g\|}{\|g^a\|} g^a

    Args:
      rho: ρ = ‖ε‖/‖g‖, which is the step size of the ascent. Default 0.05, that of
        `usam`.
      minimum, maximum: bounds of the factor ‖g‖/‖gᵃ‖, as for `descents.renormalize`.
        Default 0 and infinity: none.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0, a bound is negative, or the minimum is above the maximum.

    References:
      Tan et al., `Stabilizing Sharpness-aware Minimization Through A Simple
      Renormalization Strategy <https://arxiv.org/abs/2401.07250>`_, 2024. This variant
      is in its code.

    Differences from the authors' code: no epsilon is added to the norms.

    Cost: 2 gradients a step; no tree is carried.
    """
    descent = renormalize(minimum, maximum)
    return sharpness_aware(usam_ascent(rho), descent=descent, **options)
