"""GAM: first-order flatness, the largest gradient norm around the parameters."""

from collections.abc import Callable
from typing import Any, Unpack

import optax

from sam_optax import _tree
from sam_optax._checks import check_number, require_grad_fn, require_params
from sam_optax._hyperparameters import ScalarOrSchedule, nan_if_negative, scheduled
from sam_optax._masks import Mask, restrict
from sam_optax._parts import Descent
from sam_optax._rounding import round_to_nearest
from sam_optax._step import Options, sharpness_aware
from sam_optax.methods._asam import asam_ascent
from sam_optax.methods._record import record
from sam_optax.methods._sam import sam_ascent


def gam_descent(
    rho: ScalarOrSchedule = 0.2,
    inner_rho: ScalarOrSchedule = 0.02,
    alpha: ScalarOrSchedule = 0.6,
    beta: ScalarOrSchedule = 0.5,
    gamma: ScalarOrSchedule = 0.03,
    *,
    adaptive: bool = False,
    mask: Mask = None,
) -> Descent:
    r"""Descends on the mean of two perturbed losses, of which one is where ‖∇L‖ rose.

    .. math::
      w_2 = w + \rho \frac{g^a - g}{\|g^a - g\|}, \qquad
      w_3 = w_2 + \rho' \frac{g_2}{\|g_2\|}, \qquad
      d = h_+ - \gamma \, (h_- - \mathrm{proj}_{h_+} h_-)

    with gᵢ = ∇L(wᵢ), h₊ = α gᵃ + (1 − α) g₃ and h₋ = β g + (1 − β) g₂.

    Args:
      rho, inner_rho, alpha, beta, gamma, adaptive: those of the method `gam`, whose
        ascent makes ε with ‖ε‖ = ρ′. Default 0.2, 0.02, 0.6, 0.5, 0.03 and False.
      mask: the leaves that w₂ and w₃ move; that of the step. Default None: all.

    Returns:
      A descent for `sharpness_aware`. It takes two gradients more, at w₂ and w₃.

    Raises:
      ValueError: if an argument is out of its range; from `update`, if params or
        grad_fn is missing.
    """
    check_number("rho", rho, at_least=0)
    check_number("inner_rho", inner_rho, at_least=0)
    check_number("alpha", alpha)
    check_number("beta", beta, at_least=0, at_most=1)
    check_number("gamma", gamma, at_least=0)
    upward: Any = asam_ascent(1.0, 0.0) if adaptive else sam_ascent(1.0)
    if mask is not None:
        upward = restrict(upward, mask)

    def rise(direction, point):
        """The perturbation of radius one along a direction, at a point."""
        return upward.update(direction, upward.init(point), point)[0]

    def part(rho, inner_rho, alpha, beta, gamma):
        rho, inner_rho = nan_if_negative(rho), nan_if_negative(inner_rho)

        def update_fn(
            updates: optax.Updates,
            state: optax.OptState,
            params: optax.Params | None = None,
            *,
            ascent_gradient: Any = None,
            grad_fn: Any = None,
            perturb: Callable[..., optax.Params] = round_to_nearest,
            **extra_args: Any,
        ) -> tuple[optax.Updates, optax.OptState]:
            del extra_args
            require_params(params, "gam")
            require_grad_fn(grad_fn, "gam")
            g = ascent_gradient
            change = _tree.zero_if_rounding_of(g, _tree.subtract(updates, g))
            shift = _tree.scale(rho, rise(change, params))
            second = perturb(params, shift)
            g_2 = _tree.at_least_float32(grad_fn(second))
            shift = _tree.add_scaled(shift, inner_rho, rise(g_2, second))
            g_3 = _tree.at_least_float32(grad_fn(perturb(params, shift)))
            # In this form all are exactly g where the four gradients agree.
            above = _tree.add_scaled(g_3, alpha, _tree.subtract(updates, g_3))
            below = _tree.add_scaled(g_2, beta, _tree.subtract(g, g_2))
            residual = _tree.orthogonal_difference(below, above, above)
            return _tree.add_scaled(above, -gamma, residual), state

        return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)

    return Descent.of(
        scheduled(
            part, rho=rho, inner_rho=inner_rho, alpha=alpha, beta=beta, gamma=gamma
        ),
        compares=True,
    )


@record(
    title="Gradient-norm aware minimization",
    equation="d = h₊ − γ(h₋ − proj h₋ on h₊), from gradients at four points",
    radius="‖w₂ − w‖",
    source="Zhang 2023",
    url="https://arxiv.org/abs/2303.03108",
    gradients=4,
)
def gam(
    rho: ScalarOrSchedule = 0.2,
    inner_rho: ScalarOrSchedule = 0.02,
    alpha: ScalarOrSchedule = 0.6,
    beta: ScalarOrSchedule = 0.5,
    gamma: ScalarOrSchedule = 0.03,
    *,
    adaptive: bool = False,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient-norm Aware Minimization (GAM), in its accelerated form.

    .. math::
      w_1 = w + \rho' \frac{g}{\|g\|}, \quad
      w_2 = w + \rho \frac{g_1 - g}{\|g_1 - g\|}, \quad
      w_3 = w_2 + \rho' \frac{g_2}{\|g_2\|}, \quad
      d = h_+ - \gamma \, (h_- - \mathrm{proj}_{h_+} h_-)

    with gᵢ = ∇L(wᵢ), h₊ = α g₁ + (1 − α) g₃ and h₋ = β g + (1 − β) g₂.

    GAM looks for first-order flatness: that the largest norm of the gradient within ρ
    of the parameters is small. The difference g₁ − g points where the norm rises, so w₂
    is where it is about largest. There it rises along g₃ − g₂, so a step against this
    lowers it.

    Args:
      rho: the radius ρ = ‖w₂ − w‖ within which the norm is to be small; with
        adaptive=True, ‖(w₂ − w)/w‖. Default 0.2, which the authors' training script
        has for ResNets on CIFAR-100, as all defaults here.
      inner_rho: ρ′ = ‖ε‖, the length of the steps to w₁ and w₃, by which derivatives of
        the norm are taken as differences. Default 0.02.
      alpha: the weight α of g₁ in h₊. Default 0.6.
      beta: the weight β of g in h₋, in [0, 1]. Default 0.5 (see below).
      gamma: γ ≥ 0, the weight of the part of h₋ that is orthogonal to h₊. Default 0.03.
      adaptive: whether the steps are scaled by the weights, as those of `asam` with
        η = 0. Default False.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0, inner_rho < 0, beta is outside [0, 1] or gamma < 0.

    Examples:
      On f(w) = w² from w = 1, the four points are 1, 1.1, 1.5 and 1.6, so
      d = 0.6 · 2.2 + 0.4 · 3.2. In one dimension, nothing is orthogonal.

      >>> import jax, jax.numpy as jnp, sam_optax
      >>> sam, w = sam_optax.gam(rho=0.5, inner_rho=0.1), jnp.array(1.0)
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> d, _ = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
      >>> print(f"{d:.2f}")
      2.60

    References:
      Zhang et al., `Gradient Norm Aware Minimization Seeks First-Order Flatness and
      Improves Generalization <https://arxiv.org/abs/2303.03108>`_, CVPR 2023, Algorithm
      2. Its Algorithm 1, with products of the Hessian, is not offered.

    Differences from the authors' code:
      1. Their h₋ is g + (1 − β) g₂, without the β before g. To have it, pass
         1/(2 − β) as beta, and (2 − β) γ as gamma: for their β = 0.5 and γ = 0.03,
         these are 2/3 and 0.045. In general, with their weights β₁, β₂ and β₃, their d
         is β₁ + β₃ times the one here with α = β₁/(β₁+β₃), β = 1/(1+|β₂|) and
         γ (1+|β₂|)/(β₁+β₃). Their script has β₁ + β₃ = 1.
      2. No epsilon is added to the norms. Theirs is 1e-12.

    Cost: 4 gradients a step; no tree is carried.
    """
    descent = gam_descent(
        rho,
        inner_rho,
        alpha,
        beta,
        gamma,
        adaptive=adaptive,
        mask=options.get("mask"),
    )
    ascent = asam_ascent(inner_rho, 0.0) if adaptive else sam_ascent(inner_rho)
    return sharpness_aware(ascent, descent=descent, **options)
