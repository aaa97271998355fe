"""SAGM: sharpness-aware gradient matching."""

from typing import Unpack

import optax

from sam_optax import _tree
from sam_optax._checks import check_number
from sam_optax._hyperparameters import ScalarOrSchedule, nan_if_negative, scheduled
from sam_optax._parts import Ascent, Descent, chain
from sam_optax._step import Options, sharpness_aware
from sam_optax.methods._descent import blend
from sam_optax.methods._record import record


def sagm_ascent(
    rho: ScalarOrSchedule = 0.05, alpha: ScalarOrSchedule = 0.001
) -> Ascent:
    """The ascent of the method `sagm`, ε = ρ g/‖g‖ − α g; it takes the same arguments.

    Raises:
      ValueError: if rho is negative.
    """
    check_number("rho", rho, at_least=0)
    check_number("alpha", alpha)

    def part(rho, alpha):
        check_number("rho", rho, at_least=0)  # also what a schedule returns
        rho = nan_if_negative(rho)

        def climb(updates, state, params=None, **extra_args):
            del params, extra_args
            norm = _tree.scaled_norm(updates)
            raised = _tree.scale(rho, _tree.to_unit(updates, norm))
            perturbation = _tree.add_scaled(raised, -alpha, updates)
            return perturbation, state, norm.is_finite

        return Ascent.from_climb(optax.init_empty_state, climb)

    return chain(scheduled(part, rho=rho, alpha=alpha))


def sagm_descent(*, as_released: bool = False) -> Descent:
    r"""Descends on the loss and on the perturbed loss.

    .. math::
      d = g + g^a \qquad\text{or, as released,}\qquad d = \tfrac12 (g + g^a)

    Args:
      as_released: that of the method `sagm`. Default False.

    Returns:
      A descent for `sharpness_aware`. Without as_released=True, d is about twice as
      long as g, which a step that does not ascend passes on. So use as_released=True
      with a cadence.
    """
    mean = blend(0.5)
    if as_released:
        return Descent.of(mean, compares=True)
    return Descent.of(optax.chain(mean, optax.scale(2.0)), compares=True)


@record(
    title="Sharpness-aware gradient matching",
    equation="ε = ρ g/‖g‖ − α g, d = g + gᵃ",
    radius="‖ε + α g‖",
    source="Wang 2023",
    url="https://arxiv.org/abs/2303.10353",
)
def sagm(
    rho: ScalarOrSchedule = 0.05,
    alpha: ScalarOrSchedule = 0.001,
    *,
    as_released: bool = False,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Sharpness-Aware Gradient Matching (SAGM).

    .. math::
      \varepsilon = \rho \frac{g}{\|g\|} - \alpha g, \qquad
      d = g + \nabla L(w + \varepsilon)

    The step lowers L(w) + L(w + ε). The part −α g of ε makes it turn the gradients of
    the loss and of the perturbed loss toward each other. d is about twice as long as
    SAM's: halve the learning rate, or pass as_released=True.

    Args:
      rho: the radius ρ = ‖ε + α g‖. Default 0.05, from the authors' code.
      alpha: α, the size of the step back, −α g. Default 0.001, from the authors' code.
      as_released: whether d is the mean of the two gradients, as in the authors' code,
        in the place of their sum. Default False.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0.

    Examples:
      On f(w) = w² from w = 1, g is 2, so ε = 0.5 − 0.1 · 2 and d = 2 + 2 · 1.3.

      >>> import jax, jax.numpy as jnp, sam_optax
      >>> sam, w = sam_optax.sagm(rho=0.5, alpha=0.1), jnp.array(1.0)
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> d, _ = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
      >>> print(f"{d:.2f}")
      4.60

    References:
      Wang et al., `Sharpness-Aware Gradient Matching for Domain Generalization
      <https://arxiv.org/abs/2303.10353>`_, CVPR 2023.

    Differences from the authors' code:
      1. They take the mean of the two gradients, as as_released=True does here.
      2. No epsilon is added to the norm. Theirs is 1e-12.
      3. Their adaptive form, which weighs g by |w|, is not offered.

    A step with ascend=False passes g on, which is half as long as d without
    as_released=True.

    Cost: 2 gradients a step; no tree is carried.
    """
    descent = sagm_descent(as_released=as_released)
    return sharpness_aware(sagm_ascent(rho, alpha), descent=descent, **options)
