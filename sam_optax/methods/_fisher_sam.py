"""Fisher SAM: the neighbourhood is an ellipsoid, shaped by the Fisher matrix."""

from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from sam_optax import _tree
from sam_optax._checks import check_number
from sam_optax._hyperparameters import ScalarOrSchedule, scheduled
from sam_optax._parts import Ascent, chain
from sam_optax._step import Options, sharpness_aware
from sam_optax.methods._record import record
from sam_optax.methods._sam import normalize_by_global_norm, scale_by_rho


def scale_by_inverse_root_fisher(
    eta: ScalarOrSchedule = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies by F^(−1/2), where F = 1 + η g² is the damped diagonal Fisher matrix.

    Args:
      eta: the weight η >= 0 of the squared gradient. Default 1, as for `fisher_sam`.

    Returns:
      A transformation. It takes g from the extra argument `ascent_gradient=`, which
      `sharpness_aware` passes, so it can stand anywhere in a chain.

    Raises:
      ValueError: if eta is negative, or, from `update`, if ascent_gradient is missing.
    """
    check_number("eta", eta, at_least=0)

    def part(eta):
        def divide(u, g):
            # hypot, because the square of g can leave the range of the dtype.
            weight = jnp.sqrt(jnp.asarray(eta, u.dtype))
            return u / jnp.hypot(jnp.ones_like(u), weight * g.astype(u.dtype))

        def update_fn(
            updates, state, params=None, *, ascent_gradient=None, **extra_args
        ):
            del params, extra_args
            if ascent_gradient is None:
                raise ValueError(
                    "scale_by_inverse_root_fisher needs ascent_gradient=, the gradient "
                    "at the parameters; sharpness_aware passes it."
                )
            updates = _tree.at_least_float32(updates)
            return jax.tree.map(divide, updates, ascent_gradient), state

        return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)

    return Ascent.of(
        scheduled(part, eta=eta), reads_gradient=True, shows_nonfinite=True
    )


def fisher_sam_ascent(
    rho: ScalarOrSchedule = 0.1, eta: ScalarOrSchedule = 1.0
) -> Ascent:
    """The ascent of `fisher_sam`, ε = ρ F⁻¹g/√(gᵀF⁻¹g); it takes the same arguments."""
    inverse_root = scale_by_inverse_root_fisher(eta)
    return chain(
        inverse_root, normalize_by_global_norm(), inverse_root, scale_by_rho(rho)
    )


@record(
    title="Fisher SAM",
    equation="ε = ρ F⁻¹g/√(gᵀF⁻¹g), F = 1 + η g²",
    radius="√(εᵀFε)",
    source="Kim 2022",
    url="https://arxiv.org/abs/2206.04920",
)
def fisher_sam(
    rho: ScalarOrSchedule = 0.1,
    eta: ScalarOrSchedule = 1.0,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Fisher Sharpness-Aware Minimization (Fisher SAM).

    .. math::
      \varepsilon = \rho \frac{F^{-1} g}{\sqrt{g^\top F^{-1} g}}, \qquad
      F = 1 + \eta g^2, \qquad d = \nabla L(w + \varepsilon)

    The squared gradient of the batch estimates the diagonal of the Fisher matrix.

    Args:
      rho: the radius ρ = √(εᵀ F ε). Default 0.1, the value that the paper of F-SAM
        recommends.
      eta: the weight η ≥ 0 of the squared gradient. With η = 0 the method is SAM.
        Default 1; we know of no published value.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0 or eta < 0.

    Examples:
      On f(w) = w² from w = 1, F is 5 and ε is 0.5/√5, so d = 2 · 1.2236.

      >>> import jax, jax.numpy as jnp, sam_optax
      >>> sam, w = sam_optax.fisher_sam(rho=0.5), jnp.array(1.0)
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> d, _ = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
      >>> print(f"{d:.3f}")
      2.447

    References:
      Kim et al., `Fisher SAM: Information Geometry and Sharpness Aware Minimisation
      <https://arxiv.org/abs/2206.04920>`_, ICML 2022.

    Differences from the authors' code: none is published.

    Cost: 2 gradients a step; no tree is carried.
    """
    return sharpness_aware(fisher_sam_ascent(rho, eta), **options)
