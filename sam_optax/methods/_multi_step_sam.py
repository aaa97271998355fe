"""SAM with several ascent steps."""

from collections.abc import Callable
from typing import Any, Unpack

import optax

from sam_optax import _tree
from sam_optax._checks import check_static_integer, require_grad_fn, require_params
from sam_optax._hyperparameters import ScalarOrSchedule
from sam_optax._parts import Ascent, as_ascent
from sam_optax._rounding import round_to_nearest
from sam_optax._step import Options, sharpness_aware
from sam_optax.methods._record import record
from sam_optax.methods._sam import sam_ascent


def ascend_repeatedly(
    ascent: optax.GradientTransformation, steps: int
) -> optax.GradientTransformationExtraArgs:
    r"""Divides an ascent into n steps, each of which starts where the last one ended.

    .. math::
      \varepsilon_{i+1} = \varepsilon_i
        + \tfrac1n \mathrm{ascent}(\nabla L(w + \varepsilon_i)), \quad \varepsilon_0 = 0

    Args:
      ascent: an ascent, such as `ascents.sam(rho)`. Only the first step, at w, changes
        its state.
      steps: the number n of steps, a Python integer >= 1. The loop is unrolled.

    Returns:
      A transformation. If n > 1, it needs `grad_fn=` and the parameters, and takes
      n − 1 gradients besides g, with a cadence too on every step.

    Raises:
      ValueError: if steps is not a positive integer, or the ascent uses no gradient;
        from `update`, if params or grad_fn is missing.
    """
    check_static_integer("steps", steps)
    if not as_ascent(ascent).uses_gradient:
        raise ValueError(
            "ascend_repeatedly takes a gradient at each of its points, and this ascent "
            "does not use them: all its steps would be the same."
        )
    single = as_ascent(ascent)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        grad_fn: Any = None,
        perturb: Callable[..., optax.Params] = round_to_nearest,
        **extra: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        extra_args = {**extra, "grad_fn": grad_fn, "perturb": perturb}
        step, new_state, _ = single.climb(updates, state, params, **extra_args)
        perturbation = _tree.scale(1 / steps, step)
        for _ in range(steps - 1):
            require_params(params, "ascend_repeatedly")
            require_grad_fn(grad_fn, "ascend_repeatedly")
            g = _tree.at_least_float32(grad_fn(perturb(params, perturbation)))
            extra_args["ascent_gradient"] = g
            step, _, _ = single.climb(g, state, params, **extra_args)
            perturbation = _tree.add_scaled(perturbation, 1 / steps, step)
        return perturbation, new_state

    repeated = optax.GradientTransformationExtraArgs(single.init, update_fn)
    return Ascent.of(
        repeated,
        follow=single.follow,
        reads_gradient=single.reads_gradient,
        may_descend=single.may_descend,
    )


@record(
    title="SAM with n ascent steps",
    equation="n steps of ρ/n",
    radius="none; ‖ε‖ ≤ ρ",
    source="Foret 2021",
    url="https://arxiv.org/abs/2010.01412",
    gradients=lambda steps: steps + 1,
    cost="n + 1",
)
def multi_step_sam(
    rho: ScalarOrSchedule = 0.05, steps: int = 2, **options: Unpack[Options]
) -> optax.GradientTransformationExtraArgs:
    r"""SAM with several ascent steps.

    .. math::
      \varepsilon_{i+1} = \varepsilon_i + \frac{\rho}{n}
        \frac{\nabla L(w + \varepsilon_i)}{\|\nabla L(w + \varepsilon_i)\|}, \quad
      \varepsilon_0 = 0, \qquad d = \nabla L(w + \varepsilon_n)

    Args:
      rho: the radius ρ ≥ ‖ε‖; each of the n steps has the length ρ/n. Default 0.05,
        that of `sam`.
      steps: the number n of ascent steps, a Python integer >= 1. Default 2.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0 or steps is not a positive integer.

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, ICLR 2021, appendix.

    Differences from the authors' code: none is published for this variant.

    Cost: n + 1 gradients a step; no tree is carried.
    """
    return sharpness_aware(ascend_repeatedly(sam_ascent(rho), steps), **options)
