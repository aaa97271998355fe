"""CR-SAM: a third gradient, on the other side of w, penalises the curvature."""

from collections.abc import Callable
from typing import Any, Unpack

import optax

from sam_optax import _tree
from sam_optax._checks import check_number, require_grad_fn, require_params
from sam_optax._hyperparameters import ScalarOrSchedule, scheduled
from sam_optax._parts import Descent
from sam_optax._rounding import round_to_nearest
from sam_optax._step import Options, sharpness_aware
from sam_optax.methods._record import record
from sam_optax.methods._sam import sam_ascent


def cr_sam_descent(
    gamma: ScalarOrSchedule = 0.1, beta: ScalarOrSchedule = 0.01
) -> Descent:
    r"""Descends on the perturbed loss, the curvature along ε and the slope along ε.

    .. math::
      d = g^a + \gamma \, (g^a + g^- - 2 g) + \beta \, (g^a - g^-), \qquad
      g^- = \nabla L(w - \varepsilon)

    The second term is the gradient of L(w + ε) + L(w − ε) − 2 L(w), the third that of
    L(w + ε) − L(w − ε), where ε is held constant.

    Args:
      gamma, beta: those of the method `cr_sam`. Default 0.1 and 0.01.

    Returns:
      A descent for `sharpness_aware`. It takes one gradient more, at w − ε.

    Raises:
      ValueError: if gamma or beta is negative; from `update`, if params or grad_fn is
        missing.
    """
    check_number("gamma", gamma, at_least=0)
    check_number("beta", beta, at_least=0)

    def part(gamma, beta):
        def update_fn(
            updates: optax.Updates,
            state: optax.OptState,
            params: optax.Params | None = None,
            *,
            ascent_gradient: Any = None,
            perturbation: Any = None,
            grad_fn: Any = None,
            perturb: Callable[..., optax.Params] = round_to_nearest,
            **extra_args: Any,
        ) -> tuple[optax.Updates, optax.OptState]:
            del extra_args
            require_params(params, "cr_sam")
            require_grad_fn(grad_fn, "cr_sam")
            behind = perturb(params, _tree.scale(-1, perturbation))
            backward = _tree.at_least_float32(grad_fn(behind))
            # Sums of differences, so that d is exactly g where all three agree.
            rise = _tree.subtract(updates, ascent_gradient)
            fall = _tree.subtract(backward, ascent_gradient)
            d = _tree.add_scaled(updates, gamma, _tree.add_scaled(rise, 1, fall))
            return _tree.add_scaled(d, beta, _tree.subtract(rise, fall)), state

        return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)

    return Descent.of(scheduled(part, gamma=gamma, beta=beta), compares=True)


@record(
    title="Curvature-regularised SAM",
    equation="d = gᵃ + γ(gᵃ + g⁻ − 2g) + β(gᵃ − g⁻), g⁻ at w − ε",
    source="Wu 2024",
    url="https://arxiv.org/abs/2312.13555",
    gradients=3,
)
def cr_sam(
    rho: ScalarOrSchedule = 0.1,
    gamma: ScalarOrSchedule = 0.1,
    beta: ScalarOrSchedule = 0.01,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Curvature-Regularised Sharpness-Aware Minimization (CR-SAM), as released.

    .. math::
      \varepsilon = \rho \frac{g}{\|g\|}, \qquad
      d = g^a + \gamma \, (g^a + g^- - 2 g) + \beta \, (g^a - g^-), \qquad
      g^- = \nabla L(w - \varepsilon)

    To SAM's loss L(w + ε) it adds γ times the curvature of the loss along ε, by finite
    differences, and β times the slope along ε.

    Args:
      rho: the radius ρ = ‖ε‖. Default 0.1, from the authors' training script.
      gamma: γ ≥ 0, the weight of the curvature. Default 0.1, from the same script.
      beta: β ≥ 0, the weight of the slope. Default 0.01, from the same script; their
        class has 0.1.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0, gamma < 0 or beta < 0.

    Examples:
      On f(w) = w³ from w = 1 with ε = 0.1, the gradients at 1, 1.1 and 0.9 are 3, 3.63
      and 2.43. So d = 3.63 + 1 · (3.63 + 2.43 − 6) + 0.1 · (3.63 − 2.43).

      >>> import jax, jax.numpy as jnp, sam_optax
      >>> sam, w = sam_optax.cr_sam(rho=0.1, gamma=1.0, beta=0.1), jnp.array(1.0)
      >>> grad_fn = jax.grad(lambda w: w**3)
      >>> d, _ = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
      >>> print(f"{d:.2f}")
      3.81

    References:
      Wu et al., `CR-SAM: Curvature Regularized Sharpness-Aware Minimization
      <https://arxiv.org/abs/2312.13555>`_, AAAI 2024. Checked against the authors'
      code.

    Differences from the paper: its regulariser contains logarithms of the Hessian's
    trace and of the gradient's norm. The authors' code has no logarithm, and this
    method follows the code. A logarithm of finite differences is not defined where the
    loss is not convex along ε.

    Differences from the authors' code: no epsilon is added to the norm. Theirs is
    1e-12.

    Cost: 3 gradients a step; no tree is carried.
    """
    return sharpness_aware(
        sam_ascent(rho), descent=cr_sam_descent(gamma, beta), **options
    )
