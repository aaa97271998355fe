"""The methods that take the second gradient on some steps only.

One composition, one equation and one citation each; the parts hold the arithmetic.
"""

import optax

from sam_optax._ascent import (
    Mask,
    sam_ascent,
)
from sam_optax._cadence import at_random, every_k, every_k_reusing, when_steep
from sam_optax._core import sharpness_aware
from sam_optax._hyperparameters import ScalarOrSchedule
from sam_optax._random import Key


def look_sam(
    rho: ScalarOrSchedule = 0.05,
    k: int = 5,
    alpha: ScalarOrSchedule = 0.7,
    *,
    per_tensor: bool = False,
    mask: Mask = None,
    guard: bool = True,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LookSAM: SAM on every k-th step, its direction reused in between.

    .. math::
      v = g^a - \mathrm{proj}_g\, g^a \ \text{ every k-th step}, \qquad
      d = g + \alpha \frac{\|g\|}{\|v\|} v \ \text{ in between}


    Args:
      rho: radius ρ = ‖ε‖. Default 0.05, from the paper's experiments.
      k: period >= 1, a Python integer. Default 5, from the paper.
      alpha: weight α of the kept direction. Default 0.7, from the paper.
      per_tensor: project and measure norms tensor by tensor. Default False.
      mask: where False, ε = 0; see `sharpness_aware`. Default None: nowhere.
      guard: as for `sharpness_aware`. Default True.
      stochastic_rounding: random key for half-precision parameters; see
        `sharpness_aware`. Default None: round to nearest, and warn.

    Returns:
      A transformation that comes first in a chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0 or k is not a positive integer.

    Examples:
      The first step is SAM.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.look_sam(rho=0.5), optax.sgd(0.1))
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> w = jnp.array(1.0)
      >>> updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
      >>> print(f"{optax.apply_updates(w, updates):.2f}")
      0.70

    References:
      Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.02714>`_, CVPR 2022.
    Differences from third-party code: there norms are per tensor, which per_tensor=True
    follows, with an epsilon of 1e-8. A v that is only rounding counts as zero here.

    Cost: 1 + 1/k gradients a step; one tree is carried, in at least float32.
    """
    return sharpness_aware(
        sam_ascent(rho),
        cadence=every_k_reusing(k, alpha, per_tensor=per_tensor),
        mask=mask,
        guard=guard,
        stochastic_rounding=stochastic_rounding,
    )


def sam_every_k(
    rho: ScalarOrSchedule = 0.05,
    k: int = 5,
    *,
    mask: Mask = None,
    guard: bool = True,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SAM on every k-th step, the base optimizer in between.

    .. math::
      d = \nabla L(w + \rho g/\|g\|) \ \text{ every k-th step}, \qquad
      d = g \ \text{ in between}


    Args:
      rho: radius ρ = ‖ε‖. Default 0.05.
      k: period >= 1, a Python integer. Default 5, that of `look_sam`.
      mask: where False, ε = 0; see `sharpness_aware`. Default None: nowhere.
      guard: as for `sharpness_aware`. Default True.
      stochastic_rounding: random key for half-precision parameters; see
        `sharpness_aware`. Default None: round to nearest, and warn.

    Returns:
      A transformation that comes first in a chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0 or k is not a positive integer.

    Examples:
      The first step is SAM.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.sam_every_k(rho=0.5), optax.sgd(0.1))
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> w = jnp.array(1.0)
      >>> updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
      >>> print(f"{optax.apply_updates(w, updates):.2f}")
      0.70

    References:
      Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.02714>`_, CVPR 2022, where it is the comparison.
    Differences from the authors' code: none is published for it.

    Cost: 1 + 1/k gradients a step; no tree is carried.
    """
    return sharpness_aware(
        sam_ascent(rho),
        cadence=every_k(k),
        mask=mask,
        guard=guard,
        stochastic_rounding=stochastic_rounding,
    )


def rst(
    rho: ScalarOrSchedule = 0.05,
    probability: ScalarOrSchedule = 0.5,
    *,
    key: Key = 0,
    mask: Mask = None,
    guard: bool = True,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Randomized Sharpness-Aware Training (RST).

    .. math::
      d = \nabla L(w + \rho g/\|g\|) \ \text{ with probability } p_t, \qquad
      d = g \ \text{ otherwise}


    Args:
      rho: radius ρ = ‖ε‖. Default 0.05.
      probability: p_t, a number from 0 to 1 or a schedule of the step. Default 0.5, the
        paper's constant.
      key: an int, a typed key or a legacy one. Default 0.
      mask: where False, ε = 0; see `sharpness_aware`. Default None: nowhere.
      guard: as for `sharpness_aware`. Default True.
      stochastic_rounding: random key for half-precision parameters; see
        `sharpness_aware`. Default None: round to nearest, and warn.

    Returns:
      A transformation that comes first in a chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0 or probability is outside [0, 1].

    Examples:
      With probability 1 it is SAM.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.rst(rho=0.5, probability=1.0), optax.sgd(0.1))
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> w = jnp.array(1.0)
      >>> updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
      >>> print(f"{optax.apply_updates(w, updates):.2f}")
      0.70

    References:
      Zhao et al., `Randomized Sharpness-Aware Training for Boosting Computational
      Efficiency in Deep Learning <https://arxiv.org/abs/2203.09962>`_, 2022.
    Differences from the authors' code: none in the method.

    Cost: 1 + p gradients a step; no tree is carried.
    """
    return sharpness_aware(
        sam_ascent(rho),
        cadence=at_random(probability, key=key),
        mask=mask,
        guard=guard,
        stochastic_rounding=stochastic_rounding,
    )


def ae_sam(
    rho: ScalarOrSchedule = 0.05,
    threshold: ScalarOrSchedule = 0.0,
    decay: ScalarOrSchedule = 0.9,
    *,
    mask: Mask = None,
    guard: bool = True,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive policy to Employ Sharpness-Aware Minimization (AE-SAM).

    .. math::
      \mu_t = \delta \mu_{t-1} + (1-\delta) \|g_t\|^2, \quad
      \sigma_t^2 = \delta \sigma_{t-1}^2 + (1-\delta) (\|g_t\|^2 - \mu_t)^2, \quad
      \text{SAM where } \|g_t\|^2 \ge \mu_t + c_t \sigma_t

    and the base optimizer's step elsewhere.

    Args:
      rho: radius ρ = ‖ε‖. Default 0.05.
      threshold: c_t, a number or a schedule of the step. Default 0. The paper lets it
        run linearly from λ₂ = 1 to λ₁ = −1:
        `optax.linear_schedule(1.0, -1.0, total_steps)`.
      decay: δ in [0, 1). Default 0.9, from the paper.
      mask: where False, ε = 0; see `sharpness_aware`. Default None: nowhere.
      guard: as for `sharpness_aware`. Default True.
      stochastic_rounding: random key for half-precision parameters; see
        `sharpness_aware`. Default None: round to nearest, and warn.

    Returns:
      A transformation that comes first in a chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0 or decay is outside [0, 1).

    Examples:
      The first squared norm is above its average, so the first step is SAM.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.ae_sam(rho=0.5), optax.sgd(0.1))
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> w = jnp.array(1.0)
      >>> updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
      >>> print(f"{optax.apply_updates(w, updates):.2f}")
      0.70

    References:
      Jiang et al., `An Adaptive Policy to Employ Sharpness-Aware Minimization
      <https://arxiv.org/abs/2304.14647>`_, ICLR 2023.
    Differences from the authors' code: not checked against it.

    Cost: 1 to 2 gradients a step; no tree is carried.
    """
    return sharpness_aware(
        sam_ascent(rho),
        cadence=when_steep(threshold, decay=decay),
        mask=mask,
        guard=guard,
        stochastic_rounding=stochastic_rounding,
    )
