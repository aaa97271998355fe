"""LE-SAM: the radius at which the loss rises by a given amount."""

from typing import Unpack

import jax.numpy as jnp
import optax

from sam_optax import _tree
from sam_optax._checks import check_number
from sam_optax._hyperparameters import ScalarOrSchedule, nan_if_negative, scheduled
from sam_optax._parts import Ascent, chain
from sam_optax._step import Options, sharpness_aware
from sam_optax.methods._record import record


def le_sam_ascent(rho: ScalarOrSchedule = 0.5, sigma: ScalarOrSchedule = 0.1) -> Ascent:
    """The ascent of the method `le_sam`; it takes the same arguments."""
    check_number("rho", rho, at_least=0)
    check_number("sigma", sigma, at_least=0)

    def part(rho, sigma):
        rho, sigma = nan_if_negative(rho), nan_if_negative(sigma)

        def climb(updates, state, params=None, **extra_args):
            del params, extra_args
            norm = _tree.scaled_norm(updates)
            slope = _tree.length(norm)
            radius = jnp.minimum(rho, sigma / jnp.where(slope == 0, 1, slope))
            perturbation = _tree.scale(radius, _tree.to_unit(updates, norm))
            return perturbation, state, norm.is_finite

        return Ascent.from_climb(optax.init_empty_state, climb)

    return chain(scheduled(part, rho=rho, sigma=sigma))


@record(
    title="Loss-equated SAM",
    equation="ε = min(σ/‖g‖, ρ) g/‖g‖",
    radius="the largest ‖ε‖",
    source="Wang 2026",
    url="https://arxiv.org/abs/2605.10183",
)
def le_sam(
    rho: ScalarOrSchedule = 0.5,
    sigma: ScalarOrSchedule = 0.1,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Loss-Equated Sharpness-Aware Minimization (LE-SAM).

    .. math::
      \varepsilon = \min\!\Big(\frac{\sigma}{\|g\|},\, \rho\Big) \frac{g}{\|g\|},
      \qquad d = \nabla L(w + \varepsilon)

    SAM's radius is fixed, so the loss rises more along ε where it is steeper. Here, the
    loss rises by σ to first order everywhere, and what is left to lower is the
    curvature.

    Args:
      rho: the largest radius, ρ ≥ ‖ε‖ (ρ_max in the paper). Default 0.5, chosen here:
        the source that we could read names no value.
      sigma: σ ≥ 0, by which the loss rises along ε, to first order. The paper lets it
        fall to zero over the last epochs, along a cosine; see the second example.
        Default 0.1, chosen here for the same reason.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0 or sigma < 0.

    Examples:
      On f(w) = w² from w = 1, the slope is 2. So ε = 0.4 / 2, and d = 2 · 1.2.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> sam, w = sam_optax.le_sam(rho=0.5, sigma=0.4), jnp.array(1.0)
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> d, _ = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
      >>> print(f"{d:.2f}")
      2.40

      σ constant for 900 steps, and falling to zero over the next 100:

      >>> sigma = optax.join_schedules(
      ...     [optax.constant_schedule(0.1), optax.cosine_decay_schedule(0.1, 100)],
      ...     boundaries=[900])
      >>> sam = sam_optax.le_sam(sigma=sigma)

    References:
      Wang et al., `Fix the Loss, Not the Radius: Rethinking the Adversarial
      Perturbation of Sharpness-Aware Minimization <https://arxiv.org/abs/2605.10183>`_,
      ICML 2026. The equation was checked against a rendering of the paper's algorithm;
      we have not read the paper's own text.

    Differences from the authors' code: we could not read it. The paper adds a small
    constant to the norm; here none is added.

    Cost: 2 gradients a step; no tree is carried.
    """
    return sharpness_aware(le_sam_ascent(rho, sigma), **options)
