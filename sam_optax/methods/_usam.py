"""Unnormalised SAM."""

from typing import Unpack

import optax

from sam_optax._hyperparameters import ScalarOrSchedule
from sam_optax._step import Options, sharpness_aware
from sam_optax.methods._record import record
from sam_optax.methods._sam import scale_by_rho


def usam_ascent(
    rho: ScalarOrSchedule = 0.05,
) -> optax.GradientTransformationExtraArgs:
    """The ascent of the method `usam`, ε = ρ g; it takes the same argument."""
    return scale_by_rho(rho)


@record(
    title="Unnormalised SAM",
    equation="ε = ρ g",
    radius="‖ε‖/‖g‖",
    source="Andriushchenko 2022",
    url="https://arxiv.org/abs/2206.06232",
)
def usam(
    rho: ScalarOrSchedule = 0.05, **options: Unpack[Options]
) -> optax.GradientTransformationExtraArgs:
    r"""Unnormalised Sharpness-Aware Minimization (USAM).

    .. math::
      \varepsilon = \rho g, \qquad d = \nabla L(w + \varepsilon)

    Args:
      rho: ρ = ‖ε‖/‖g‖, which is the step size of the ascent and not a radius. Default
        0.05, from the code of Tan et al.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0.

    Examples:
      On f(w) = w² from w = 1, ε is 0.5 · 2, so d = 2 · 2.

      >>> import jax, jax.numpy as jnp, sam_optax
      >>> sam, w = sam_optax.usam(rho=0.5), jnp.array(1.0)
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> d, _ = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
      >>> print(f"{d:.2f}")
      4.00

    References:
      Andriushchenko and Flammarion, `Towards Understanding Sharpness-Aware Minimization
      <https://arxiv.org/abs/2206.06232>`_, ICML 2022. It is also compared in the code
      of Tan et al., `Stabilizing Sharpness-aware Minimization Through A Simple
      Renormalization Strategy <https://arxiv.org/abs/2401.07250>`_, 2024.

    Differences from the code of Tan et al.: its adaptive form, ε = ρ w² g, is not
    offered.

    Cost: 2 gradients a step; no tree is carried.
    """
    return sharpness_aware(usam_ascent(rho), **options)
