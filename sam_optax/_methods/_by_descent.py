"""The methods that differ from SAM in what descends.

One composition, one equation and one citation each; the parts hold the arithmetic.
"""

import math

import optax

from sam_optax._ascent import (
    Mask,
    asam_ascent,
    sam_ascent,
    usam_ascent,
)
from sam_optax._core import sharpness_aware
from sam_optax._descent import (
    blend,
    penalize_gap,
    renormalize,
    surrogate_gap,
    weigh_gap,
)
from sam_optax._hyperparameters import ScalarOrSchedule
from sam_optax._random import Key


def gsam(
    rho: ScalarOrSchedule = 0.05,
    alpha: ScalarOrSchedule = 0.4,
    *,
    minimize: str = "perturbed_loss",
    mask: Mask = None,
    guard: bool = True,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Surrogate Gap Guided Sharpness-Aware Minimization (GSAM).

    .. math::
      \varepsilon = \rho \frac{g}{\|g\|}, \qquad g^a = \nabla L(w + \varepsilon), \qquad
      d = g^a - \alpha \, (g - \mathrm{proj}_{g^a}\, g)

    The step lowers the perturbed loss as SAM's does, and beside it the surrogate gap
    h = L(w + ε) − L(w), along the part of g that leaves the perturbed loss alone.

    Args:
      rho: radius ρ = ‖ε‖. Default 0.05. The paper ties it to the learning rate; see
        `rho_from_learning_rate`.
      alpha: weight α of the gap. Default 0.4, the paper's for two of four ViTs (Table
        4); its ResNets take 0.005 to 0.01, its Mixers 0.01 to 0.6.
      minimize: `"perturbed_loss"` (default), as above, or `"loss"`, where
        d = g + α (gᵃ − proj_g gᵃ).
      mask: where False, ε = 0; see `sharpness_aware`. Default None: nowhere.
      guard: as for `sharpness_aware`. Default True.
      stochastic_rounding: random key for half-precision parameters; see
        `sharpness_aware`. Default None: round to nearest, and warn.

    Returns:
      A transformation that comes first in a chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0, or minimize is neither of the two.

    Examples:
      In one dimension nothing is orthogonal to gᵃ, and GSAM is SAM.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.gsam(rho=0.5), optax.sgd(0.1))
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> w = jnp.array(1.0)
      >>> updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
      >>> print(f"{optax.apply_updates(w, updates):.2f}")
      0.70

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, ICLR 2022, Algorithm 1.
    Differences from the authors' code:
      1. No epsilon is added to the norms.
      2. Their JAX code's adaptive perturbation, ρ |w| g/‖g‖, is not offered here;
         ASAM's is, as `sharpness_aware(asam_ascent(), descent=surrogate_gap())`.

    Cost: 2 gradients a step; no tree is carried.
    """
    return sharpness_aware(
        sam_ascent(rho),
        descent=surrogate_gap(alpha, minimize=minimize),
        mask=mask,
        guard=guard,
        stochastic_rounding=stochastic_rounding,
    )


def sam_plus_gap(
    rho: ScalarOrSchedule = 0.05,
    lam: ScalarOrSchedule = 1.0,
    *,
    mask: Mask = None,
    guard: bool = True,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SAM with the surrogate gap as a penalty, min(f_p + λh).

    .. math::
      \varepsilon = \rho \frac{g}{\|g\|}, \qquad
      d = g^a + \lambda \, (g^a - g)

    The comparison of the GSAM paper's section 4.1, where the two terms of the objective
    conflict.

    Args:
      rho: radius ρ = ‖ε‖. Default 0.05.
      lam: weight λ of the gap. Default 1; the paper varies it.
      mask: where False, ε = 0; see `sharpness_aware`. Default None: nowhere.
      guard: as for `sharpness_aware`. Default True.
      stochastic_rounding: random key for half-precision parameters; see
        `sharpness_aware`. Default None: round to nearest, and warn.

    Returns:
      A transformation that comes first in a chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0.

    Examples:
      On f(w) = w² from w = 1: g = 2, gᵃ = 3, so d = 3 + 1 · (3 − 2).

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.sam_plus_gap(rho=0.5), optax.sgd(0.1))
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> w = jnp.array(1.0)
      >>> updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
      >>> print(f"{optax.apply_updates(w, updates):.2f}")
      0.60

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, ICLR 2022,
      section 4.1 and Table 2.
    Differences from the authors' code: none is published.

    Cost: 2 gradients a step; no tree is carried.
    """
    return sharpness_aware(
        sam_ascent(rho),
        descent=penalize_gap(lam),
        mask=mask,
        guard=guard,
        stochastic_rounding=stochastic_rounding,
    )


def stable_sam(
    rho: ScalarOrSchedule = 0.05,
    *,
    minimum: ScalarOrSchedule = 0.0,
    maximum: ScalarOrSchedule = math.inf,
    mask: Mask = None,
    guard: bool = True,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Stable Sharpness-Aware Minimization (StableSAM).

    .. math::
      \varepsilon = \rho \frac{g}{\|g\|}, \qquad
      d = \frac{\|g\|}{\|g^a\|} g^a


    Args:
      rho: radius ρ = ‖ε‖. Default 0.05, from the paper's experiments.
      minimum: lower bound of the factor. Default 0: none.
      maximum: upper bound of the factor. Default infinity: none. See `renormalize`.
      mask: where False, ε = 0; see `sharpness_aware`. Default None: nowhere.
      guard: as for `sharpness_aware`. Default True.
      stochastic_rounding: random key for half-precision parameters; see
        `sharpness_aware`. Default None: round to nearest, and warn.

    Returns:
      A transformation that comes first in a chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0, or the bounds are impossible.

    Examples:
      In one dimension d has the size of g and the sign of gᵃ: the step of SGD.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.stable_sam(rho=0.5), optax.sgd(0.1))
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> w = jnp.array(1.0)
      >>> updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
      >>> print(f"{optax.apply_updates(w, updates):.2f}")
      0.80

    References:
      Tan et al., `Stabilizing Sharpness-aware Minimization Through A Simple
      Renormalization Strategy <https://arxiv.org/abs/2401.07250>`_, 2024, Algorithm 1.
    Differences from the authors' code: no epsilon is added to the norms.

    Cost: 2 gradients a step; no tree is carried.
    """
    return sharpness_aware(
        sam_ascent(rho),
        descent=renormalize(minimum, maximum),
        mask=mask,
        guard=guard,
        stochastic_rounding=stochastic_rounding,
    )


def stable_asam(
    rho: ScalarOrSchedule = 0.5,
    eta: ScalarOrSchedule = 0.01,
    *,
    minimum: ScalarOrSchedule = 0.0,
    maximum: ScalarOrSchedule = math.inf,
    adaptive_mask: Mask = None,
    as_released: bool = False,
    mask: Mask = None,
    guard: bool = True,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Stable Adaptive Sharpness-Aware Minimization (StableASAM).

    .. math::
      \varepsilon = \rho \frac{T_w^2 g}{\|T_w g\|}, \qquad
      d = \frac{\|g\|}{\|g^a\|} g^a


    Args:
      rho: radius ρ = ‖T_w⁻¹ ε‖. Default 0.5, that of `asam`.
      eta: offset η ≥ 0, as for `asam`. Default 0.01.
      minimum: lower bound of the factor. Default 0: none.
      maximum: upper bound of the factor. Default infinity: none. See `renormalize`.
      adaptive_mask: where False, T_w = 1, as for `asam`. Default None: nowhere.
      as_released: follow the authors' code; see Differences. Default False.
      mask: where False, ε = 0; see `sharpness_aware`. Default None: nowhere.
      guard: as for `sharpness_aware`. Default True.
      stochastic_rounding: random key for half-precision parameters; see
        `sharpness_aware`. Default None: round to nearest, and warn.

    Returns:
      A transformation that comes first in a chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0, eta < 0, or the bounds are impossible.

    Examples:
      In one dimension d has the size of g and the sign of gᵃ: the step of SGD.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.stable_asam(rho=0.5), optax.sgd(0.1))
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> w = jnp.array(1.0)
      >>> updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
      >>> print(f"{optax.apply_updates(w, updates):.2f}")
      0.80

    References:
      Tan et al., `Stabilizing Sharpness-aware Minimization Through A Simple
      Renormalization Strategy <https://arxiv.org/abs/2401.07250>`_, 2024, section 5.3.
    Differences from the authors' code, which as_released=True follows but for η, zero
    there: its factor weighs the norms, ‖|w| g‖ / ‖|w + ε| gᵃ‖, so that d is not g where
    the two gradients agree.

    Cost: 2 gradients a step; no tree is carried.
    """
    return sharpness_aware(
        asam_ascent(rho, eta, adaptive_mask=adaptive_mask),
        descent=renormalize(minimum, maximum, weighted=as_released),
        mask=mask,
        guard=guard,
        stochastic_rounding=stochastic_rounding,
    )


def stable_usam(
    rho: ScalarOrSchedule = 0.05,
    *,
    minimum: ScalarOrSchedule = 0.0,
    maximum: ScalarOrSchedule = math.inf,
    mask: Mask = None,
    guard: bool = True,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Stable Unnormalised Sharpness-Aware Minimization.

    .. math::
      \varepsilon = \rho g, \qquad d = \frac{\|g\|}{\|g^a\|} g^a


    Args:
      rho: ρ = ‖ε‖/‖g‖, an ascent step size. Default 0.05, that of `usam`.
      minimum: lower bound of the factor. Default 0: none.
      maximum: upper bound of the factor. Default infinity: none. See `renormalize`.
      mask: where False, ε = 0; see `sharpness_aware`. Default None: nowhere.
      guard: as for `sharpness_aware`. Default True.
      stochastic_rounding: random key for half-precision parameters; see
        `sharpness_aware`. Default None: round to nearest, and warn.

    Returns:
      A transformation that comes first in a chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0, or the bounds are impossible.

    Examples:
      In one dimension d has the size of g and the sign of gᵃ: the step of SGD.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.stable_usam(rho=0.5), optax.sgd(0.1))
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> w = jnp.array(1.0)
      >>> updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
      >>> print(f"{optax.apply_updates(w, updates):.2f}")
      0.80

    References:
      Tan et al., `Stabilizing Sharpness-aware Minimization Through A Simple
      Renormalization Strategy <https://arxiv.org/abs/2401.07250>`_, 2024;
      the method is in the code.
    Differences from the authors' code: no epsilon is added to the norm.

    Cost: 2 gradients a step; no tree is carried.
    """
    return sharpness_aware(
        usam_ascent(rho),
        descent=renormalize(minimum, maximum),
        mask=mask,
        guard=guard,
        stochastic_rounding=stochastic_rounding,
    )


def wsam(
    rho: ScalarOrSchedule = 0.05,
    gamma: ScalarOrSchedule = 0.9,
    *,
    mask: Mask = None,
    guard: bool = True,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Weighted Sharpness-Aware Minimization (WSAM), coupled.

    .. math::
      \varepsilon = \rho \frac{g}{\|g\|}, \qquad
      d = g + \frac{\gamma}{1 - \gamma} (g^a - g)

    The coupled form; `decoupled_wsam` keeps the second term out of the base optimizer.

    Args:
      rho: radius ρ = ‖ε‖. Default 0.05, from the paper's experiments.
      gamma: γ in [0, 1). ½ is SAM, 0 the base optimizer. Default
        0.9, from the paper.
      mask: where False, ε = 0; see `sharpness_aware`. Default None: nowhere.
      guard: as for `sharpness_aware`. Default True.
      stochastic_rounding: random key for half-precision parameters; see
        `sharpness_aware`. Default None: round to nearest, and warn.

    Returns:
      A transformation that comes first in a chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0 or gamma is outside [0, 1).

    Examples:
      On f(w) = w² from w = 1: g = 2, gᵃ = 3, so d = 2 + 9 · (3 − 2).

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.wsam(rho=0.5), optax.sgd(0.1))
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> w = jnp.array(1.0)
      >>> updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
      >>> print(f"{optax.apply_updates(w, updates):.2f}")
      -0.10

    References:
      Yue et al., `Sharpness-Aware Minimization Revisited: Weighted Sharpness as a
      Regularization Term <https://arxiv.org/abs/2305.15817>`_, KDD 2023.
    Differences from the authors' code: no epsilon is added to the norm.

    Cost: 2 gradients a step; no tree is carried.
    """
    return sharpness_aware(
        sam_ascent(rho),
        descent=weigh_gap(gamma),
        mask=mask,
        guard=guard,
        stochastic_rounding=stochastic_rounding,
    )


def gradient_norm_penalty(
    rho: ScalarOrSchedule = 0.05,
    alpha: ScalarOrSchedule = 0.8,
    *,
    mask: Mask = None,
    guard: bool = True,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient-norm penalty, in its one-step form.

    .. math::
      \varepsilon = \rho \frac{g}{\|g\|}, \qquad
      d = (1 - \alpha) g + \alpha g^a

    which is, to first order, the gradient of L + αρ‖∇L‖.

    Args:
      rho: radius ρ = ‖ε‖ (r in the paper). Default 0.05, from the paper.
      alpha: weight α of gᵃ; 1 is SAM. Default 0.8, from the paper.
      mask: where False, ε = 0; see `sharpness_aware`. Default None: nowhere.
      guard: as for `sharpness_aware`. Default True.
      stochastic_rounding: random key for half-precision parameters; see
        `sharpness_aware`. Default None: round to nearest, and warn.

    Returns:
      A transformation that comes first in a chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0.

    Examples:
      On f(w) = w² from w = 1: g = 2, gᵃ = 3, so d = 0.2 · 2 + 0.8 · 3.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.gradient_norm_penalty(rho=0.5), optax.sgd(0.1))
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> w = jnp.array(1.0)
      >>> updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
      >>> print(f"{optax.apply_updates(w, updates):.2f}")
      0.72

    References:
      Zhao et al., `Penalizing Gradient Norm for Efficiently Improving Generalization in
      Deep Learning <https://arxiv.org/abs/2202.03599>`_, ICML 2022.
    Differences from the authors' code: no epsilon is added to the norm.

    Cost: 2 gradients a step; no tree is carried.
    """
    return sharpness_aware(
        sam_ascent(rho),
        descent=blend(alpha),
        mask=mask,
        guard=guard,
        stochastic_rounding=stochastic_rounding,
    )
