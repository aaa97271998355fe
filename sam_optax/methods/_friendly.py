"""Friendly SAM: the perturbation leaves out the average gradient."""

from typing import Any, Unpack

import optax

from sam_optax import _tree
from sam_optax._checks import check_number
from sam_optax._hyperparameters import ScalarOrSchedule, scheduled
from sam_optax._masks import Mask
from sam_optax._parts import Ascent, chain
from sam_optax._step import Options, sharpness_aware
from sam_optax.methods._asam import asam_ascent
from sam_optax.methods._average import advance_ema, start_ema
from sam_optax.methods._record import record
from sam_optax.methods._sam import sam_ascent


def subtract_ema(
    sigma: ScalarOrSchedule | str = 1.0,
    decay: ScalarOrSchedule = 0.9,
    *,
    as_released: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Subtracts an exponential moving average of the gradient, as F-SAM does.

    .. math::
      m_t = \lambda m_{t-1} + (1-\lambda) g_t, \quad m_{-1} = 0, \qquad
      h_t = g_t - \sigma m_t

    The code computes the same h as (1−σ) g + σλ (g − m_{t−1}). In this form it is
    exactly zero when σ = 1 and the gradient equals its average.

    Args:
      sigma, decay, as_released: those of the method `fsam`. Default 1, 0.9 and False.

    Returns:
      A transformation that carries m, in at least float32.

    Raises:
      ValueError: if decay is outside [0, 1), or sigma is negative.
      TypeError: if sigma is neither a number nor `"cosine"`.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = subtract_ema(sigma=1.0, decay=0.5)
      >>> h, state = tx.update(jnp.array([4.0]), tx.init(jnp.array([0.0])))
      >>> h.tolist(), state.gradient_ema.tolist()
      ([2.0], [2.0])
    """
    check_number("decay", decay, at_least=0, below=1)
    hyperparameters: dict[str, Any] = {"decay": decay}
    if not isinstance(sigma, str):
        check_number("sigma", sigma, at_least=0)
        hyperparameters["sigma"] = sigma
    elif sigma != "cosine":
        raise TypeError(f"sigma must be a number or 'cosine', got {sigma!r}.")

    def part(decay, sigma=None):
        def update_fn(updates, state, params=None):
            del params
            g, m = _tree.at_least_float32(updates), state.gradient_ema
            innovation = _tree.subtract(g, m)
            new_state = advance_ema(state, innovation, 1 - decay, as_released)
            subtracted = m if as_released else new_state.gradient_ema
            weight = _tree.cosine(subtracted, g) if sigma is None else sigma
            share = weight if as_released else weight * decay
            h = _tree.add_scaled(_tree.scale(1 - weight, g), share, innovation)
            return h, new_state

        return optax.GradientTransformation(start_ema, update_fn)

    return Ascent.of(scheduled(part, **hyperparameters), shows_nonfinite=True)


def fsam_ascent(
    rho: ScalarOrSchedule = 0.05,
    sigma: ScalarOrSchedule | str = 1.0,
    decay: ScalarOrSchedule = 0.9,
    *,
    as_released: bool = False,
) -> Ascent:
    """The ascent of the method `fsam`, ε = ρ h/‖h‖ with h = g − σm; same arguments."""
    friendly = subtract_ema(sigma, decay, as_released=as_released)
    return chain(friendly, sam_ascent(rho))


def fasam_ascent(
    rho: ScalarOrSchedule = 0.5,
    eta: ScalarOrSchedule = 0.01,
    sigma: ScalarOrSchedule | str = 1.0,
    decay: ScalarOrSchedule = 0.9,
    *,
    adaptive_mask: Mask = None,
    as_released: bool = False,
) -> Ascent:
    """The ascent of `fasam`, ε = ρ T_w² h/‖T_w h‖ with h = g − σm; same arguments."""
    friendly = subtract_ema(sigma, decay, as_released=as_released)
    return chain(friendly, asam_ascent(rho, eta, adaptive_mask=adaptive_mask))


@record(
    title="Friendly SAM",
    equation="ε = ρ h/‖h‖, h = g − σ EMA(g)",
    source="Li 2024",
    url="https://arxiv.org/abs/2403.12350",
)
def fsam(
    rho: ScalarOrSchedule = 0.05,
    sigma: ScalarOrSchedule | str = 1.0,
    decay: ScalarOrSchedule = 0.9,
    *,
    as_released: bool = False,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Friendly Sharpness-Aware Minimization (F-SAM).

    .. math::
      m_t = \lambda m_{t-1} + (1-\lambda) g_t, \quad
      h_t = g_t - \sigma m_t, \quad
      \varepsilon_t = \rho \frac{h_t}{\|h_t\|}, \quad
      d_t = \nabla L(w_t + \varepsilon_t)

    with m_{−1} = 0. The average m is an estimate of the full gradient. With m
    subtracted, the perturbation follows only the noise of the batch.

    Args:
      rho: the radius ρ = ‖ε‖. Default 0.05, that of `sam`. (The paper takes 0.1 on
        CIFAR-10, 0.2 on CIFAR-100 and 0.075 on ImageNet.)
      sigma: the share σ of the average that is subtracted. Default 1, from the paper.
        `"cosine"` takes σ_t = cos(m_t, g_t), the paper's equation 11.
      decay: λ in [0, 1). Default 0.9; the paper tunes it among 0.6, 0.9 and 0.95. With
        λ = 0 and σ = 1, h and ε are zero.
      as_released: whether to follow the authors' code, where it differs from the
        paper's Algorithm 1 (see below). Default False.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0, sigma < 0, or decay is outside [0, 1).
      TypeError: if sigma is neither a number nor `"cosine"`.

    References:
      Li et al., `Friendly Sharpness-Aware Minimization
      <https://arxiv.org/abs/2403.12350>`_, CVPR 2024, Algorithm 1.

    Differences from the authors' code, which as_released=True follows:
      1. Their m starts at the first gradient, and they subtract nothing on that step.
      2. They subtract the average from before the step, h_t = g_t − σ m_{t−1}. Only for
         σ = 1, this h has the direction of the paper's h.

    Cost: 2 gradients a step; one tree is carried, in at least float32.
    """
    return sharpness_aware(
        fsam_ascent(rho, sigma, decay, as_released=as_released), **options
    )


@record(
    title="Friendly Adaptive SAM",
    equation="ε = ρ T² h/‖T h‖, h as for `fsam`",
    radius="‖T⁻¹ε‖",
    source="Li 2024",
    url="https://arxiv.org/abs/2403.12350",
)
def fasam(
    rho: ScalarOrSchedule = 0.5,
    eta: ScalarOrSchedule = 0.01,
    sigma: ScalarOrSchedule | str = 1.0,
    decay: ScalarOrSchedule = 0.9,
    *,
    adaptive_mask: Mask = None,
    as_released: bool = False,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Friendly Adaptive Sharpness-Aware Minimization (F-ASAM).

    .. math::
      m_t = \lambda m_{t-1} + (1-\lambda) g_t, \quad h_t = g_t - \sigma m_t, \quad
      \varepsilon_t = \rho \frac{T_w^2 h_t}{\|T_w h_t\|}, \quad T_w = |w| + \eta, \quad
      d_t = \nabla L(w_t + \varepsilon_t)

    Args:
      rho: the radius ρ = ‖T_w⁻¹ ε‖. Default 0.5, that of `asam`.
      eta, adaptive_mask: those of `asam`. Default 0.01 and None.
      sigma, decay, as_released: those of `fsam`. Default 1, 0.9 and False.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0, eta < 0, sigma < 0, or decay is outside [0, 1).
      TypeError: if sigma is neither a number nor `"cosine"`.

    References:
      Li et al., `Friendly Sharpness-Aware Minimization
      <https://arxiv.org/abs/2403.12350>`_, CVPR 2024, Table 3.

    Differences from the authors' code:
      1. The two of `fsam`, which as_released=True follows.
      2. Their η is 0. Their T_w applies to every leaf, as it does here by default.

    Cost: 2 gradients a step; one tree is carried, in at least float32.
    """
    ascent = fasam_ascent(
        rho, eta, sigma, decay, adaptive_mask=adaptive_mask, as_released=as_released
    )
    return sharpness_aware(ascent, **options)
