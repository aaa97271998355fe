"""A descent made from a function, and the descent `blend` that methods share."""

from collections.abc import Callable
from typing import Any

import optax

from sam_optax import _tree
from sam_optax._checks import check_number
from sam_optax._hyperparameters import ScalarOrSchedule, scheduled
from sam_optax._parts import Ascent, Descent


def stateless_descent(
    function: Callable[..., optax.Updates],
) -> optax.GradientTransformationExtraArgs:
    """A descent without state, from a function (gᵃ, g, ε, w) -> d."""

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        ascent_gradient: optax.Updates | None = None,
        perturbation: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        return function(updates, ascent_gradient, perturbation, params), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


def blend(
    weight: ScalarOrSchedule, *, normalized: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Descends on the loss plus a times the surrogate gap.

    .. math::
      d = g + a \, (g^a - g)

    The surrogate gap is L(w + ε) − L(w).

    Args:
      weight: the weight a of the gap. a = 1 gives SAM, a = 0 the base optimizer,
        a = γ/(1−γ) WSAM, and a = 1 + λ the perturbed loss plus λ times the gap.
      normalized: whether g/‖g‖ takes the place of g, as in the released code of the
        gradient-norm penalty. Then d differs from g even if gᵃ = g. Default False.

    Returns:
      A descent for `sharpness_aware`.

    Raises:
      ValueError: if weight is not finite.

    Examples:
      F-SAM, halfway between SAM and the base optimizer:

      >>> import sam_optax
      >>> sam = sam_optax.sharpness_aware(
      ...     sam_optax.ascents.fsam(rho=0.1), descent=sam_optax.descents.blend(0.5))
    """
    check_number("weight", weight)

    def part(weight):
        def descend(ga, g, perturbation, params):
            del perturbation, params
            kept = _tree.unit(g) if normalized else g
            return _tree.add_scaled(kept, weight, _tree.subtract(ga, kept))

        return stateless_descent(descend)

    return Descent.of(scheduled(part, weight=weight), compares=True)


def stay() -> optax.GradientTransformationExtraArgs:
    """The ascent ε = 0, for descents that choose all their points themselves.

    gᵃ is then the gradient at the parameters, and the only one that the step takes.
    """
    nothing = optax.stateless(lambda updates, params: _tree.zeros_like(updates))
    return Ascent.of(nothing, uses_gradient=False)
