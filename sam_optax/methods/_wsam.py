"""WSAM and the gradient-norm penalty: a weighted sum of the two gradients."""

from typing import Unpack

import optax

from sam_optax._checks import check_number
from sam_optax._hyperparameters import ScalarOrSchedule, map_value
from sam_optax._step import Options, sharpness_aware
from sam_optax.methods._descent import blend
from sam_optax.methods._record import record
from sam_optax.methods._sam import sam_ascent


@record(
    title="Weighted SAM",
    equation="d = g + γ/(1−γ) (gᵃ − g)",
    source="Yue 2023",
    url="https://arxiv.org/abs/2305.15817",
)
def wsam(
    rho: ScalarOrSchedule = 0.05,
    gamma: ScalarOrSchedule = 0.9,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Weighted Sharpness-Aware Minimization (WSAM), in its coupled form.

    .. math::
      \varepsilon = \rho \frac{g}{\|g\|}, \qquad
      d = g + \frac{\gamma}{1 - \gamma} (g^a - g)

    The base optimizer sees both terms of d. In the decoupled form, `decoupled_wsam`, it
    sees g alone.

    Args:
      rho: the radius ρ = ‖ε‖. Default 0.05, from the paper's experiments.
      gamma: γ in [0, 1). γ = ½ gives SAM, γ = 0 the base optimizer. Default 0.9, from
        the paper.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0 or gamma is outside [0, 1).

    Examples:
      On f(w) = w² from w = 1, g is 2 and gᵃ is 3, so d = 2 + 9 · (3 − 2).

      >>> import jax, jax.numpy as jnp, sam_optax
      >>> sam, w = sam_optax.wsam(rho=0.5), jnp.array(1.0)
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> d, _ = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
      >>> print(f"{d:.2f}")
      11.00

    References:
      Yue et al., `Sharpness-Aware Minimization Revisited: Weighted Sharpness as a
      Regularization Term <https://arxiv.org/abs/2305.15817>`_, KDD 2023.

    Differences from the authors' code, which is part of ATorch:
      1. No epsilon is added to the norm.
      2. They clip each of the two gradients, by default to norm 1, before they mix
         them. Here nothing is clipped; `optax.clip_by_global_norm` after this method
         clips d.
      3. Their γ is 0.88 by default.

    Cost: 2 gradients a step; no tree is carried.
    """
    check_number("gamma", gamma, at_least=0, below=1)
    descent = blend(map_value(lambda gamma: gamma / (1 - gamma), gamma))
    return sharpness_aware(sam_ascent(rho), descent=descent, **options)


@record(
    title="Gradient-norm penalty",
    equation="d = g + α(gᵃ − g)",
    source="Zhao 2022",
    url="https://arxiv.org/abs/2202.03599",
)
def gradient_norm_penalty(
    rho: ScalarOrSchedule = 0.05,
    alpha: ScalarOrSchedule = 0.8,
    *,
    as_released: bool = False,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient-norm penalty, in its one-step form.

    .. math::
      \varepsilon = \rho \frac{g}{\|g\|}, \qquad
      d = (1 - \alpha) g + \alpha g^a

    To first order, d is the gradient of L + αρ‖∇L‖.

    Args:
      rho: the radius ρ = ‖ε‖ (r in the paper). Default 0.05, from the authors' scripts
        for ImageNet. Their scripts for CIFAR take 0.1.
      alpha: the weight α of gᵃ; α = 1 gives SAM. Default 0.8, from the same scripts.
      as_released: whether to follow the authors' code, where it differs from the
        paper's equation (see below). Default False.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0.

    Examples:
      On f(w) = w² from w = 1, g is 2 and gᵃ is 3, so d = 0.2 · 2 + 0.8 · 3.

      >>> import jax, jax.numpy as jnp, sam_optax
      >>> sam, w = sam_optax.gradient_norm_penalty(rho=0.5), jnp.array(1.0)
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> d, _ = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
      >>> print(f"{d:.2f}")
      2.80

    References:
      Zhao et al., `Penalizing Gradient Norm for Efficiently Improving Generalization in
      Deep Learning <https://arxiv.org/abs/2202.03599>`_, ICML 2022.

    Differences from the authors' code:
      1. By default, it mixes gᵃ with the normalised gradient:
         d = (1 − α) g/‖g‖ + α gᵃ. as_released=True does the same. Its flag
         norm_perturbations=False mixes gᵃ with g, as here.
      2. If g is zero, so is the perturbation. Theirs divides by zero, and gets NaN.
      3. Here one perturbation is made from the whole gradient that is given. Theirs has
         one per device, unless its flag sync_perturbations is set.
      4. Their loss includes an L2 penalty on the parameters, so both gradients do. Here
         the loss is yours.

    Cost: 2 gradients a step; no tree is carried.
    """
    check_number("alpha", alpha)
    descent = blend(alpha, normalized=as_released)
    return sharpness_aware(sam_ascent(rho), descent=descent, **options)
