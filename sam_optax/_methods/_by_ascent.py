"""The methods that differ from SAM in how ε is made; d = gᵃ.

One composition, one equation and one citation each; the parts hold the arithmetic.
"""

from fractions import Fraction
from typing import Any

import optax

from sam_optax._ascent import (
    Mask,
    asam_ascent,
    fasam_ascent,
    fisher_sam_ascent,
    fsam_ascent,
    normalize_by_global_norm,
    sam_ascent,
    sam_full_ascent,
    sam_noise_ascent,
    scale_by_rho,
    usam_ascent,
    vasso_ascent,
)
from sam_optax._core import sharpness_aware
from sam_optax._hyperparameters import ScalarOrSchedule
from sam_optax._noise import (
    ascend_from_noise,
    ascend_repeatedly,
    mask_at_random,
    replace_by_noise,
)
from sam_optax._random import Key
from sam_optax._sparse import drop_and_grow, keep_largest_fisher

# Equal to 2, but not of a type that optax.inject_hyperparams turns into an array:
# the order of the norm chooses code.
_TWO = Fraction(2)


def sam(
    rho: ScalarOrSchedule = 0.05,
    *,
    p: Any = _TWO,
    mask: Mask = None,
    guard: bool = True,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Sharpness-Aware Minimization (SAM).

    .. math::
      \varepsilon = \rho \frac{g}{\|g\|}, \qquad d = \nabla L(w + \varepsilon)

    and for a norm of order p ≠ 2, with 1/p + 1/q = 1,

    .. math::
      \varepsilon = \rho \, \operatorname{sign}(g) |g|^{q-1} / (\|g\|_q^q)^{1/p}

    Args:
      rho: radius ρ = ‖ε‖_p. A number, a schedule of the step or a traced scalar.
        Default 0.05, from the paper's experiments.
      p: order of the norm, a Python number from 1 to infinity. Default 2. Static: pass
        `static_args=("p",)` to `optax.inject_hyperparams` along with it.
      mask: where False, ε = 0; see `sharpness_aware`. Default None: nowhere.
      guard: keep what is not finite visible in d and out of carried state; see
        `sharpness_aware`. Default True.
      stochastic_rounding: random key for half-precision parameters; see
        `sharpness_aware`. Default None: round to nearest, and warn.

    Returns:
      A transformation that comes first in a chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0 or p < 1.

    Examples:
      On f(w) = w² from w = 1: ε = 0.5, so d = 2 · 1.5.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.sam(rho=0.5), optax.sgd(0.1))
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> w = jnp.array(1.0)
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
      ...     w = optax.apply_updates(w, updates)
      ...     print(f"{w:.2f}")
      0.70
      0.46

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, ICLR 2021.

    Differences from the authors' code:
      1. No epsilon is added to ‖g‖; a zero gradient gives a zero perturbation.
      2. One perturbation for the whole gradient given; theirs is one per device.

    Cost: 2 gradients a step; no tree is carried.
    """
    return sharpness_aware(
        sam_ascent(rho, p=p),
        mask=mask,
        guard=guard,
        stochastic_rounding=stochastic_rounding,
    )


def asam(
    rho: ScalarOrSchedule = 0.5,
    eta: ScalarOrSchedule = 0.01,
    *,
    adaptive_mask: Mask = None,
    mask: Mask = None,
    guard: bool = True,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive Sharpness-Aware Minimization (ASAM).

    .. math::
      \varepsilon = \rho \frac{T_w^2 g}{\|T_w g\|}, \qquad T_w = |w| + \eta,
      \qquad d = \nabla L(w + \varepsilon)

    so that the neighbourhood scales with the weights: for η = 0, ε is equivariant under
    rescalings of the weights that leave the loss as it is.

    Args:
      rho: radius ρ = ‖T_w⁻¹ ε‖. Default 0.5, from the paper (CIFAR-10).
      eta: offset η ≥ 0. Default 0.01, from the paper.
      adaptive_mask: where False, T_w = 1. A tree of bools (or a prefix of one), or a
        function of the parameters that returns one. The authors' code excludes biases:
        `lambda params: jax.tree.map(lambda w: w.ndim > 1, params)`. Default None: T_w
        applies to every leaf, as in the paper's equation.
      mask: where False, ε = 0; see `sharpness_aware`. Default None: nowhere.
      guard: as for `sam`. Default True.
      stochastic_rounding: as for `sam`. Default None.

    Returns:
      A transformation that comes first in a chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0 or eta < 0.

    Examples:
      On f(w) = w² from w = 2, with η = 0: ε = ρ |w| = 1, so d = 2 · 3.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.asam(rho=0.5, eta=0.0), optax.sgd(0.1))
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> w = jnp.array(2.0)
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
      ...     w = optax.apply_updates(w, updates)
      ...     print(f"{w:.2f}")
      1.40
      0.98

    References:
      Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
      Learning of Deep Neural Networks <https://arxiv.org/abs/2102.11600>`_, ICML 2021.

    Differences from the authors' code:
      1. No epsilon is added to the norm.
      2. T_w applies to biases too, unless adaptive_mask says otherwise.

    Cost: 2 gradients a step; no tree is carried.
    """
    return sharpness_aware(
        asam_ascent(rho, eta, adaptive_mask=adaptive_mask),
        mask=mask,
        guard=guard,
        stochastic_rounding=stochastic_rounding,
    )


def fsam(
    rho: ScalarOrSchedule = 0.05,
    sigma: ScalarOrSchedule | str = 1.0,
    decay: ScalarOrSchedule = 0.9,
    *,
    as_released: bool = False,
    mask: Mask = None,
    guard: bool = True,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Friendly Sharpness-Aware Minimization (F-SAM).

    .. math::
      m_t = \lambda m_{t-1} + (1-\lambda) g_t, \quad
      h_t = g_t - \sigma m_t, \quad
      \varepsilon_t = \rho \frac{h_t}{\|h_t\|}, \quad
      d_t = \nabla L(w_t + \varepsilon_t)

    with m_{−1} = 0: the perturbation follows the noise of the batch, not the full
    gradient, which the average m stands for.

    Args:
      rho: radius ρ = ‖ε‖. Default 0.05. (The paper uses that of SAM: 0.1 on CIFAR-10,
        0.2 on CIFAR-100, 0.075 on ImageNet.)
      sigma: share σ of the average that is subtracted. Default 1, from the paper.
        `"cosine"` is σ_t = cos(m_t, g_t), the paper's equation 11.
      decay: λ in [0, 1). Default 0.9; the paper tunes it among 0.6, 0.9 and 0.95. With
        λ = 0 and σ = 1 nothing is left of h, and ε is zero.
      as_released: follow the authors' code in place of Algorithm 1; see Differences.
        Default False.
      mask: where False, ε = 0; see `sharpness_aware`. Default None: nowhere.
      guard: as for `sharpness_aware`. Default True.
      stochastic_rounding: as for `sam`. Default None.

    Returns:
      A transformation that comes first in a chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0, sigma < 0, or decay is outside [0, 1).

    Examples:
      On f(w) = w² from w = 1: the first m is 0.1 g, so h and ε point along g.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.fsam(rho=0.5), optax.sgd(0.1))
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> w = jnp.array(1.0)
      >>> state = tx.init(w)
      >>> updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
      >>> print(f"{optax.apply_updates(w, updates):.2f}")
      0.70
      >>> print(f"{state[0].ascent_state[0].gradient_ema:.2f}")
      0.20

    References:
      Li et al., `Friendly Sharpness-Aware Minimization
      <https://arxiv.org/abs/2403.12350>`_, CVPR 2024, Algorithm 1.

    Differences from the authors' code, which as_released=True follows:
      1. There m starts at the first gradient, and nothing is subtracted then.
      2. There h_t = g_t − σ m_{t−1}, with the average from before the step. For σ = 1
         that is the direction of the paper's h, otherwise it is another.

    Cost: 2 gradients a step; one tree is carried, in at least float32.
    """
    return sharpness_aware(
        fsam_ascent(rho, sigma, decay, as_released=as_released),
        mask=mask,
        guard=guard,
        stochastic_rounding=stochastic_rounding,
    )


def fasam(
    rho: ScalarOrSchedule = 0.5,
    eta: ScalarOrSchedule = 0.01,
    sigma: ScalarOrSchedule | str = 1.0,
    decay: ScalarOrSchedule = 0.9,
    *,
    adaptive_mask: Mask = None,
    as_released: bool = False,
    mask: Mask = None,
    guard: bool = True,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Friendly Adaptive Sharpness-Aware Minimization (F-ASAM).

    .. math::
      m_t = \lambda m_{t-1} + (1-\lambda) g_t, \quad h_t = g_t - \sigma m_t, \quad
      \varepsilon_t = \rho \frac{T_w^2 h_t}{\|T_w h_t\|}, \quad T_w = |w| + \eta, \quad
      d_t = \nabla L(w_t + \varepsilon_t)

    Args:
      rho: radius ρ = ‖T_w⁻¹ ε‖. Default 0.5, that of `asam`.
      eta: offset η ≥ 0, as for `asam`. Default 0.01.
      sigma: share σ of the average that is subtracted, as for `fsam`. Default 1.
      decay: λ in [0, 1), as for `fsam`. Default 0.9.
      adaptive_mask: where False, T_w = 1, as for `asam`. Default None: nowhere.
      as_released: follow the authors' code, as for `fsam`. Default False.
      mask: where False, ε = 0; see `sharpness_aware`. Default None: nowhere.
      guard: as for `sharpness_aware`. Default True.
      stochastic_rounding: as for `sam`. Default None.

    Returns:
      A transformation that comes first in a chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0, eta < 0, sigma < 0, or decay is outside [0, 1).

    Examples:
      On f(w) = w² from w = 2, with η = 0: ε = ρ |w| = 1, so d = 2 · 3.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.fasam(rho=0.5, eta=0.0), optax.sgd(0.1))
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> w = jnp.array(2.0)
      >>> updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
      >>> print(f"{optax.apply_updates(w, updates):.2f}")
      1.40

    References:
      Li et al., `Friendly Sharpness-Aware Minimization
      <https://arxiv.org/abs/2403.12350>`_, CVPR 2024, Table 3.

    Differences from the authors' code:
      1. The two of `fsam`, which as_released=True follows.
      2. There η = 0 and no leaf is excluded from T_w.

    Cost: 2 gradients a step; one tree is carried, in at least float32.
    """
    return sharpness_aware(
        fasam_ascent(
            rho,
            eta,
            sigma,
            decay,
            adaptive_mask=adaptive_mask,
            as_released=as_released,
        ),
        mask=mask,
        guard=guard,
        stochastic_rounding=stochastic_rounding,
    )


def usam(
    rho: ScalarOrSchedule = 0.05,
    *,
    mask: Mask = None,
    guard: bool = True,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Unnormalised Sharpness-Aware Minimization (USAM).

    .. math::
      \varepsilon = \rho g, \qquad d = \nabla L(w + \varepsilon)

    Args:
      rho: ρ = ‖ε‖/‖g‖, an ascent step size and not a radius. Default 0.05, by analogy
        with `sam`; the source gives none.
      mask: where False, ε = 0; see `sharpness_aware`. Default None: nowhere.
      guard: as for `sam`. Default True.
      stochastic_rounding: as for `sam`. Default None.

    Returns:
      A transformation that comes first in a chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0.

    Examples:
      On f(w) = w² from w = 1: ε = 0.5 · 2, so d = 2 · 2.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.usam(rho=0.5), optax.sgd(0.1))
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> w = jnp.array(1.0)
      >>> updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
      >>> print(f"{optax.apply_updates(w, updates):.2f}")
      0.60

    References:
      Andriushchenko and Flammarion, `Towards Understanding Sharpness-Aware
      Minimization <https://arxiv.org/abs/2206.06232>`_, ICML 2022; the comparison in
      the code of Tan et al., `Stabilizing Sharpness-aware Minimization Through A Simple
      Renormalization Strategy <https://arxiv.org/abs/2401.07250>`_, 2024.

    Differences from that code: none.

    Cost: 2 gradients a step; no tree is carried.
    """
    return sharpness_aware(
        usam_ascent(rho),
        mask=mask,
        guard=guard,
        stochastic_rounding=stochastic_rounding,
    )


def vasso(
    rho: ScalarOrSchedule = 0.05,
    theta: ScalarOrSchedule = 0.2,
    *,
    as_released: bool = False,
    mask: Mask = None,
    guard: bool = True,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Variance-Suppressed Sharpness-Aware Optimization (VaSSO).

    .. math::
      m_t = (1-\theta) m_{t-1} + \theta g_t, \qquad
      \varepsilon_t = \rho \frac{m_t}{\|m_t\|}, \qquad
      d_t = \nabla L(w_t + \varepsilon_t)

    with m_{−1} = 0.

    Args:
      rho: radius ρ = ‖ε‖. Default 0.05, from the paper's experiments.
      theta: weight θ of the new gradient; 1 is SAM. Default 0.2, from the paper.
      as_released: start m at the first gradient, as the authors' code does. Default
        False.
      mask: where False, ε = 0; see `sharpness_aware`. Default None: nowhere.
      guard: as for `sharpness_aware`. Default True.
      stochastic_rounding: random key for half-precision parameters; see
        `sharpness_aware`. Default None: round to nearest, and warn.

    Returns:
      A transformation that comes first in a chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0 or theta is outside [0, 1].

    Examples:
      On the first step m points along g: SAM.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.vasso(rho=0.5), optax.sgd(0.1))
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> w = jnp.array(1.0)
      >>> updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
      >>> print(f"{optax.apply_updates(w, updates):.2f}")
      0.70

    References:
      Li and Giannakis, `Enhancing Sharpness-Aware Optimization Through Variance
      Suppression <https://arxiv.org/abs/2309.15639>`_, NeurIPS 2023.
    Differences from the authors' code:
      1. There m starts at the first gradient, which as_released=True follows.
      2. No epsilon (there 1e-7) is added to the norm.

    Cost: 2 gradients a step; one tree is carried, in at least float32.
    """
    return sharpness_aware(
        vasso_ascent(rho, theta, as_released=as_released),
        mask=mask,
        guard=guard,
        stochastic_rounding=stochastic_rounding,
    )


def fisher_sam(
    rho: ScalarOrSchedule = 0.1,
    eta: ScalarOrSchedule = 1.0,
    *,
    mask: Mask = None,
    guard: bool = True,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Fisher Sharpness-Aware Minimization (Fisher SAM).

    .. math::
      \varepsilon = \rho \frac{F^{-1} g}{\sqrt{g^\top F^{-1} g}}, \qquad
      F = 1 + \eta g^2, \qquad d = \nabla L(w + \varepsilon)

    with the diagonal of the Fisher matrix estimated by the batch's squared gradient.

    Args:
      rho: radius ρ = √(εᵀ F ε). Default 0.1, as friendly_sam recommends it.
      eta: weight η ≥ 0 of the squared gradient; at 0 the method is SAM. Default 1, for
        want of one in our sources.
      mask: where False, ε = 0; see `sharpness_aware`. Default None: nowhere.
      guard: as for `sharpness_aware`. Default True.
      stochastic_rounding: random key for half-precision parameters; see
        `sharpness_aware`. Default None: round to nearest, and warn.

    Returns:
      A transformation that comes first in a chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0 or eta < 0.

    Examples:
      On f(w) = w² from w = 1: F = 5, ε = 0.5/√5, so d = 2 · 1.224.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.fisher_sam(rho=0.5), optax.sgd(0.1))
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> w = jnp.array(1.0)
      >>> updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
      >>> print(f"{optax.apply_updates(w, updates):.2f}")
      0.76

    References:
      Kim et al., `Fisher SAM: Information Geometry and Sharpness Aware Minimisation
      <https://arxiv.org/abs/2206.04920>`_, ICML 2022.
    Differences from the authors' code: none is published.

    Cost: 2 gradients a step; no tree is carried.
    """
    return sharpness_aware(
        fisher_sam_ascent(rho, eta),
        mask=mask,
        guard=guard,
        stochastic_rounding=stochastic_rounding,
    )


def sam_full(
    rho: ScalarOrSchedule = 0.05,
    decay: ScalarOrSchedule = 0.9,
    *,
    mask: Mask = None,
    guard: bool = True,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SAM along the full gradient only (SAM-full).

    .. math::
      \varepsilon = \rho \frac{u}{\|u\|}, \qquad
      u = \mathrm{proj}_{\nabla L}\, g, \qquad d = \nabla L_B(w + \varepsilon)

    An ablation of the friendly_sam paper, with g the gradient of the batch B.

    Args:
      rho: radius ρ = ‖ε‖. Default 0.05.
      decay: λ of the average that stands in for the full gradient, unless that is
        passed to the update as `full_gradient=`, through `sam_value_and_grad` in
        `extra_args={"full_gradient": ...}`. Default 0.9.
      mask: where False, ε = 0; see `sharpness_aware`. Default None: nowhere.
      guard: as for `sharpness_aware`. Default True.
      stochastic_rounding: random key for half-precision parameters; see
        `sharpness_aware`. Default None: round to nearest, and warn.

    Returns:
      A transformation that comes first in a chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0 or decay is outside [0, 1).

    Examples:
      In one dimension g is its own projection: SAM.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.sam_full(rho=0.5), optax.sgd(0.1))
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> w = jnp.array(1.0)
      >>> updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
      >>> print(f"{optax.apply_updates(w, updates):.2f}")
      0.70

    References:
      Li et al., `Friendly Sharpness-Aware Minimization
      <https://arxiv.org/abs/2403.12350>`_, CVPR 2024, section 4.
    Differences from the authors' code: none is published for it.

    Cost: 2 gradients a step; one tree is carried, in at least float32.
    """
    return sharpness_aware(
        sam_full_ascent(rho, decay),
        mask=mask,
        guard=guard,
        stochastic_rounding=stochastic_rounding,
    )


def sam_noise(
    rho: ScalarOrSchedule = 0.05,
    decay: ScalarOrSchedule = 0.9,
    *,
    mask: Mask = None,
    guard: bool = True,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SAM along the noise of the batch only (SAM-noise).

    .. math::
      \varepsilon = \rho \frac{u}{\|u\|}, \qquad
      u = g - \mathrm{proj}_{\nabla L}\, g, \qquad d = \nabla L_B(w + \varepsilon)

    An ablation of the friendly_sam paper, with g the gradient of the batch B.

    Args:
      rho: radius ρ = ‖ε‖. Default 0.05.
      decay: λ of the average that stands in for the full gradient, unless that is
        passed to the update as `full_gradient=`, through `sam_value_and_grad` in
        `extra_args={"full_gradient": ...}`. Default 0.9.
      mask: where False, ε = 0; see `sharpness_aware`. Default None: nowhere.
      guard: as for `sharpness_aware`. Default True.
      stochastic_rounding: random key for half-precision parameters; see
        `sharpness_aware`. Default None: round to nearest, and warn.

    Returns:
      A transformation that comes first in a chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0 or decay is outside [0, 1).

    Examples:
      In one dimension nothing of g is left: the step of SGD.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.sam_noise(rho=0.5), optax.sgd(0.1))
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> w = jnp.array(1.0)
      >>> updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
      >>> print(f"{optax.apply_updates(w, updates):.2f}")
      0.80

    References:
      Li et al., `Friendly Sharpness-Aware Minimization
      <https://arxiv.org/abs/2403.12350>`_, CVPR 2024, section 4.
    Differences from the authors' code: none is published for it.

    Cost: 2 gradients a step; one tree is carried, in at least float32.
    """
    return sharpness_aware(
        sam_noise_ascent(rho, decay),
        mask=mask,
        guard=guard,
        stochastic_rounding=stochastic_rounding,
    )


def esam(
    rho: ScalarOrSchedule = 0.05,
    beta: ScalarOrSchedule = 0.6,
    *,
    key: Key = 0,
    mask: Mask = None,
    guard: bool = True,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Efficient Sharpness-Aware Minimization (ESAM), its random mask.

    .. math::
      \varepsilon = \rho \frac{g}{\|g\|} \cdot \frac{b}{\beta}, \quad
      b_i \sim \mathrm{Bernoulli}(\beta), \qquad d = \nabla L(w + \varepsilon)

    Stochastic weight perturbation, the first of the paper's two ideas. The second, to
    descend on the examples whose loss rises most, is a data rule, and makes it whole:
    `sam_value_and_grad(loss_fn, esam, data=sam_optax.largest_increase())`.

    Args:
      rho: radius ρ of the unmasked perturbation, ‖E ε‖ = ρ. Default 0.05.
      beta: share β in (0, 1] of the entries that are perturbed. Default 0.6, from the
        authors' code.
      key: an int, a typed key or a legacy one. Default 0.
      mask: where False, ε = 0; see `sharpness_aware`. Default None: nowhere.
      guard: as for `sharpness_aware`. Default True.
      stochastic_rounding: random key for half-precision parameters; see
        `sharpness_aware`. Default None: round to nearest, and warn.

    Returns:
      A transformation that comes first in a chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0 or beta is outside (0, 1].

    Examples:
      With β = 1 nothing is masked: SAM.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.esam(rho=0.5, beta=1.0), optax.sgd(0.1))
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> w = jnp.array(1.0)
      >>> updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
      >>> print(f"{optax.apply_updates(w, updates):.2f}")
      0.70

    References:
      Du et al., `Efficient Sharpness-aware Minimization for Improved Training of Neural
      Networks <https://arxiv.org/abs/2110.03141>`_, ICLR 2022.
    Differences from the authors' code: there whole tensors are masked, and the norm is
    that of the kept tensors.

    Cost: 2 gradients a step; a key is carried.
    """
    return sharpness_aware(
        optax.chain(sam_ascent(rho), mask_at_random(beta, key=key)),
        mask=mask,
        guard=guard,
        stochastic_rounding=stochastic_rounding,
    )


def ssam(
    rho: ScalarOrSchedule = 0.05,
    sparsity: float = 0.5,
    *,
    dynamic: bool = False,
    drop: ScalarOrSchedule = 0.5,
    refresh_every: int = 100,
    key: Key = 0,
    mask: Mask = None,
    guard: bool = True,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Sparse Sharpness-Aware Minimization (SSAM-F and SSAM-D).

    .. math::
      \varepsilon = b \cdot \rho \frac{g}{\|g\|}, \qquad
      b \in \{0, 1\}^p, \quad \textstyle\sum b = (1 - s) p, \qquad
      d = \nabla L(w + \varepsilon)

    with a mask b that is carried and renewed now and then.

    Args:
      rho: radius ρ of the unmasked perturbation. Default 0.05.
      sparsity: fraction s in [0, 1) that is not perturbed. Default 0.5, from the paper.
      dynamic: False (default) is SSAM-F, which keeps the largest squared gradients;
        True is SSAM-D, which exchanges entries with small gradients for random ones.
      drop: share of the mask that SSAM-D exchanges on a refresh, a number from 0 to 1
        or a schedule of the step. Default 0.5.
      refresh_every: steps between refreshes. Default 100.
      key: an int, a typed key or a legacy one. Default 0.
      mask: where False, ε = 0; see `sharpness_aware`. Default None: nowhere.
      guard: as for `sharpness_aware`. Default True.
      stochastic_rounding: random key for half-precision parameters; see
        `sharpness_aware`. Default None: round to nearest, and warn.

    Returns:
      A transformation that comes first in a chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0, sparsity is outside [0, 1), drop outside [0, 1], or
        refresh_every no positive integer.

    Examples:
      With no sparsity it is SAM.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.ssam(rho=0.5, sparsity=0.0), optax.sgd(0.1))
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> w = jnp.array(1.0)
      >>> updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
      >>> print(f"{optax.apply_updates(w, updates):.2f}")
      0.70

    References:
      Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation
      Approach <https://arxiv.org/abs/2210.05177>`_, NeurIPS 2022.
    Differences from the authors' code:
      1. The Fisher matrix is the squared gradient of the batch of the refresh, not an
         average over single examples.
      2. The mask is in use from the first step on; theirs perturbs nothing before its
         first refresh.

    Cost: 2 gradients a step; a tree of bools is carried. A refresh takes two passes
      over the gradient for each bit of an entry. On a step whose gradient is not finite
      it is lost, and the mask stays until the next.
    """
    return sharpness_aware(
        optax.chain(
            normalize_by_global_norm(),
            drop_and_grow(sparsity, drop, refresh_every=refresh_every, key=key)
            if dynamic
            else keep_largest_fisher(sparsity, refresh_every=refresh_every),
            scale_by_rho(rho),
        ),
        mask=mask,
        guard=guard,
        stochastic_rounding=stochastic_rounding,
    )


def random_sam(
    rho: ScalarOrSchedule = 0.05,
    *,
    normalized: bool = False,
    key: Key = 0,
    mask: Mask = None,
    guard: bool = False,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Descent at a random point of the neighbourhood.

    .. math::
      \varepsilon \sim N(0, \tfrac{\rho^2}{p} I), \qquad
      d = \nabla L(w + \varepsilon)

    for p parameters: the average-case counterpart of SAM.

    Args:
      rho: root of the expected squared norm, E‖ε‖² = ρ². Default 0.05. A random
        direction is hardly steep: for as much effect as SAM's, ρ grows with √p.
      normalized: put ε on the sphere, ‖ε‖ = ρ. Default False.
      key: an int, a typed key or a legacy one. Default 0.
      mask: where False, ε = 0; see `sharpness_aware`. Default None: nowhere.
      guard: as for `sharpness_aware`. Default False: no floats are carried, and a check
        of the gradient at w would need it.
      stochastic_rounding: random key for half-precision parameters; see
        `sharpness_aware`. Default None: round to nearest, and warn.

    Returns:
      A transformation that comes first in a chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0.

    Examples:
      At rho 0 it is the base optimizer.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.random_sam(rho=0.0), optax.sgd(0.1))
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> w = jnp.array(1.0)
      >>> updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
      >>> print(f"{optax.apply_updates(w, updates):.2f}")
      0.80

    References:
      Ujváry et al., `Rethinking Sharpness-Aware Minimization as Variational Inference
      <https://arxiv.org/abs/2210.10452>`_, 2022, which calls it Random SAM.

    Differences from the authors' code: there is none.

    Cost: 1 gradient a step, and a forward pass for the loss; a key is carried. XLA
    drops the backward pass at w, but not under a traced cadence, inside
    `apply_if_finite`, or with a report.
    """
    return sharpness_aware(
        optax.chain(
            replace_by_noise(key),
            normalize_by_global_norm() if normalized else optax.identity(),
            scale_by_rho(rho),
        ),
        mask=mask,
        guard=guard,
        stochastic_rounding=stochastic_rounding,
    )


def rsam(
    rho: ScalarOrSchedule = 0.05,
    sigma: ScalarOrSchedule = 0.05,
    *,
    key: Key = 0,
    mask: Mask = None,
    guard: bool = False,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Random Sharpness-Aware Minimization (R-SAM).

    .. math::
      \delta \sim N(0, \tfrac{\sigma^2}{p} I), \qquad
      \varepsilon = \delta
        + \rho \frac{\nabla L(w + \delta)}{\|\nabla L(w + \delta)\|}, \qquad
      d = \nabla L(w + \varepsilon)


    Args:
      rho: radius ρ = ‖ε − δ‖. Default 0.05.
      sigma: root of the expected squared norm of δ. Default 0.05.
      key: an int, a typed key or a legacy one. Default 0.
      mask: where False, ε = 0; see `sharpness_aware`. Default None: nowhere.
      guard: as for `sharpness_aware`. Default False: no floats are carried, and a check
        of the gradient at w would need it.
      stochastic_rounding: random key for half-precision parameters; see
        `sharpness_aware`. Default None: round to nearest, and warn.

    Returns:
      A transformation that comes first in a chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0 or sigma < 0.

    Examples:
      Without noise it is SAM.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.rsam(rho=0.5, sigma=0.0), optax.sgd(0.1))
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> w = jnp.array(1.0)
      >>> updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
      >>> print(f"{optax.apply_updates(w, updates):.2f}")
      0.70

    References:
      Liu et al., `Random Sharpness-Aware Minimization
      <https://openreview.net/forum?id=htUvh7xPoa>`_, NeurIPS 2022.
    Differences from the paper: its noise is scaled filter by filter with the weights;
    here all entries have one variance.

    Cost: 2 gradients a step, and a forward pass for the loss; a key is carried.
    """
    return sharpness_aware(
        ascend_from_noise(sam_ascent(rho), sigma, key=key),
        mask=mask,
        guard=guard,
        stochastic_rounding=stochastic_rounding,
    )


def multi_step_sam(
    rho: ScalarOrSchedule = 0.05,
    steps: int = 2,
    *,
    mask: Mask = None,
    guard: bool = True,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SAM with several ascent steps.

    .. math::
      \varepsilon_{i+1} = \varepsilon_i + \frac{\rho}{n}
        \frac{\nabla L(w + \varepsilon_i)}{\|\nabla L(w + \varepsilon_i)\|}, \quad
      \varepsilon_0 = 0, \qquad d = \nabla L(w + \varepsilon_n)


    Args:
      rho: radius ρ ≥ ‖ε‖, shared by the n steps. Default 0.05.
      steps: number n of ascent steps >= 1, a Python integer. Default 2.
      mask: where False, ε = 0; see `sharpness_aware`. Default None: nowhere.
      guard: as for `sharpness_aware`. Default True.
      stochastic_rounding: random key for half-precision parameters; see
        `sharpness_aware`. Default None: round to nearest, and warn.

    Returns:
      A transformation that comes first in a chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0 or steps is not a positive integer.

    Examples:
      In one dimension the steps add up: SAM.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.multi_step_sam(rho=0.5), optax.sgd(0.1))
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> w = jnp.array(1.0)
      >>> updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
      >>> print(f"{optax.apply_updates(w, updates):.2f}")
      0.70

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, ICLR 2021, appendix.
    Differences from the authors' code: none is published for it.

    Cost: n + 1 gradients a step; no tree is carried.
    """
    return sharpness_aware(
        ascend_repeatedly(sam_ascent(rho), steps),
        mask=mask,
        guard=guard,
        stochastic_rounding=stochastic_rounding,
    )
