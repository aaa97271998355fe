"""VaSSO: the perturbation follows an average of the gradient."""

from typing import Unpack

import optax

from sam_optax import _tree
from sam_optax._checks import check_number
from sam_optax._hyperparameters import ScalarOrSchedule, scheduled
from sam_optax._parts import Ascent, chain
from sam_optax._step import Options, sharpness_aware
from sam_optax.methods._average import advance_ema, start_ema
from sam_optax.methods._record import record
from sam_optax.methods._sam import sam_ascent


def follow_ema(
    theta: ScalarOrSchedule = 0.9, *, as_released: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient by its exponential moving average, as VaSSO does.

    .. math::
      m_t = (1-\theta) m_{t-1} + \theta g_t, \quad m_{-1} = 0

    Args:
      theta, as_released: those of the method `vasso`. Default 0.9 and False.

    Returns:
      A transformation that carries m, in at least float32.

    Raises:
      ValueError: if theta is a Python number outside [0, 1].
    """
    check_number("theta", theta, at_least=0, at_most=1)

    def part(theta):
        def update_fn(updates, state, params=None):
            del params
            g = _tree.at_least_float32(updates)
            innovation = _tree.subtract(g, state.gradient_ema)
            state = advance_ema(state, innovation, theta, as_released)
            return state.gradient_ema, state

        return optax.GradientTransformation(start_ema, update_fn)

    return Ascent.of(scheduled(part, theta=theta), shows_nonfinite=True)


def vasso_ascent(
    rho: ScalarOrSchedule = 0.05,
    theta: ScalarOrSchedule = 0.9,
    *,
    as_released: bool = False,
) -> Ascent:
    """The ascent of the method `vasso`, ε = ρ m/‖m‖; it takes the same arguments."""
    return chain(follow_ema(theta, as_released=as_released), sam_ascent(rho))


@record(
    title="Variance-suppressed SAM",
    equation="ε = ρ m/‖m‖, m = EMA(g)",
    source="Li 2023",
    url="https://arxiv.org/abs/2309.15639",
)
def vasso(
    rho: ScalarOrSchedule = 0.05,
    theta: ScalarOrSchedule = 0.9,
    *,
    as_released: bool = False,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Variance-Suppressed Sharpness-Aware Optimization (VaSSO).

    .. math::
      m_t = (1-\theta) m_{t-1} + \theta g_t, \qquad
      \varepsilon_t = \rho \frac{m_t}{\|m_t\|}, \qquad
      d_t = \nabla L(w_t + \varepsilon_t)

    with m_{−1} = 0.

    Args:
      rho: the radius ρ = ‖ε‖. Default 0.05, from the paper's experiments.
      theta: the weight θ in [0, 1] of the new gradient; θ = 1 gives SAM. Default 0.9,
        which the parser, the README and the training script of the authors' code all
        have.
      as_released: whether m starts at the first gradient, as in the authors' code.
        Default False.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0 or theta is outside [0, 1].

    References:
      Li and Giannakis, `Enhancing Sharpness-Aware Optimization Through Variance
      Suppression <https://arxiv.org/abs/2309.15639>`_, NeurIPS 2023.

    Differences from the authors' code:
      1. Their m starts at the first gradient, as it does here with as_released=True.
      2. No epsilon is added to the norm. Theirs is 1e-7.

    Cost: 2 gradients a step; one tree is carried, in at least float32.
    """
    ascent = vasso_ascent(rho, theta, as_released=as_released)
    return sharpness_aware(ascent, **options)
