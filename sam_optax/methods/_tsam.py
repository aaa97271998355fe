"""Tilted SAM: several random points, weighted by how high the loss is there."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sam_optax import _tree
from sam_optax._checks import (
    check_number,
    check_static_integer,
    require_losses,
    require_params,
)
from sam_optax._hyperparameters import ScalarOrSchedule, scheduled
from sam_optax._masks import Mask, restrict
from sam_optax._parts import Descent, as_ascent
from sam_optax._random import Key
from sam_optax._rounding import round_to_nearest
from sam_optax._step import sharpness_aware
from sam_optax.methods._random_sam import ascend_from_noise
from sam_optax.methods._record import record
from sam_optax.methods._sam import sam_ascent


def tilt(
    others: Sequence[optax.GradientTransformation], tilt: ScalarOrSchedule = 20.0
) -> Descent:
    r"""Averages gᵃ with the gradients at the points of other ascents.

    .. math::
      d = \sum_i a_i \nabla L(w + \varepsilon_i), \qquad
      a = \mathrm{softmax}_i\big(t\, L(w + \varepsilon_i)\big)

    ε₁ is the perturbation of the step, and every other ε_i comes from one of the other
    ascents. With t = 0 this is the mean; as t grows, only the point with the highest
    loss counts.

    Args:
      others: ascents, which receive what the ascent of the step receives. To draw other
        numbers than it, they need other keys or names.
      tilt: the tilt t. Default 20, that of the method `tsam`.

    Returns:
      A descent for `sharpness_aware`. It needs the loss beside each gradient, as
      `sam_value_and_grad` and `value_and_ascent_grad` provide it.

    Raises:
      ValueError: if an ascent follows d; from `update`, if params or the losses are
        missing.
    """
    check_number("tilt", tilt)
    ascents = [as_ascent(ascent) for ascent in others]
    if any(ascent.follow for ascent in ascents):
        raise ValueError(
            "tilt= takes the gradients at the points of other ascents within a step, "
            "and one of them learns from d, which is known only after it."
        )

    def init_fn(params: optax.Params) -> tuple[Any, ...]:
        return tuple(ascent.init(params) for ascent in ascents)

    def part(tilt):
        def update_fn(
            updates: optax.Updates,
            state: Any,
            params: optax.Params | None = None,
            *,
            perturbed_loss: Any = None,
            ascent_gradient: Any = None,
            grad_fn: Any = None,
            ascent_grad_fn: Any = None,
            value_and_grad_fn: Any = None,
            perturb: Callable[..., optax.Params] = round_to_nearest,
            **extra_args: Any,
        ) -> tuple[optax.Updates, tuple[Any, ...]]:
            require_params(params, "tilt")
            require_losses(perturbed_loss, value_and_grad_fn, "tilt")
            extra_args |= {"perturb": perturb, "value_and_grad_fn": value_and_grad_fn}
            extra_args["grad_fn"] = (
                grad_fn if ascent_grad_fn is None else ascent_grad_fn
            )
            extra_args["ascent_gradient"] = ascent_gradient
            losses, gradients, states = [perturbed_loss], [], []
            for ascent, own in zip(ascents, state, strict=True):
                perturbation, own, _ = ascent.climb(
                    ascent_gradient, own, params, **extra_args
                )
                loss, gradient = value_and_grad_fn(perturb(params, perturbation))
                losses.append(_tree.at_least_float32(jnp.asarray(loss)))
                gradients.append(_tree.at_least_float32(gradient))
                states.append(own)
            weights = jax.nn.softmax(tilt * jnp.stack(losses))
            d = updates
            for weight, gradient in zip(weights[1:], gradients, strict=True):
                # In this form d is exactly gᵃ where all gradients are equal.
                d = _tree.add_scaled(d, weight, _tree.subtract(gradient, updates))
            return d, tuple(states)

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return Descent.of(scheduled(part, tilt=tilt), uses_loss=True)


@record(
    title="Tilted SAM",
    equation="d = Σ aᵢ ∇L(w+εᵢ), a = softmax(t L(w+εᵢ)), εᵢ as in R-SAM",
    radius="‖εᵢ − δᵢ‖",
    source="Li 2025",
    url="https://arxiv.org/abs/2410.22656",
    gradients=lambda samples: 2 * samples,
    cost="2n + a forward pass",
)
def tsam(
    rho: ScalarOrSchedule = 0.05,
    sigma: ScalarOrSchedule = 0.05,
    tilt: ScalarOrSchedule = 20.0,
    *,
    samples: int = 3,
    radius: float | None = None,
    key: Key = 0,
    mask: Mask = None,
    guard: bool = False,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Tilted Sharpness-Aware Minimization (TSAM).

    .. math::
      \delta_i \sim N(0, \tfrac{\sigma^2}{p} I), \qquad
      \varepsilon_i = \delta_i + \rho
        \frac{\nabla L(w + \delta_i)}{\|\nabla L(w + \delta_i)\|}, \qquad
      d = \sum_{i=1}^n a_i \nabla L(w + \varepsilon_i), \qquad
      a = \mathrm{softmax}_i\big(t\, L(w + \varepsilon_i)\big)

    for p parameters. It smooths SAM: where SAM descends on the one point that it found,
    TSAM descends on several, and most on those where the loss is high.

    Args:
      rho: the radius ρ = ‖ε_i − δ_i‖. Default 0.05, that of `sam`.
      sigma: σ, the root of the expected squared norm of the noise. Default 0.05, chosen
        here to be that of rho.
      tilt: the tilt t: 0 weighs all points alike. Default 20, one of the six values
        that the authors' scripts search (0 to 400).
      samples: the number n of points, a Python integer >= 1. Default 3, one of the two
        values that the authors' scripts list.
      radius: the largest ‖δ_i‖, to which longer noise is cut. Default None: there is
        none.
      key: an int, a typed key or a legacy one. Default 0.
      guard: passed on to `sharpness_aware`. Default False, as for `random_sam`.
      mask, stochastic_rounding: passed on to `sharpness_aware`. Default None.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`. It
      needs losses beside gradients: take them with `sam_value_and_grad` or
      `value_and_ascent_grad`, not with a grad_fn of your own.

    Raises:
      ValueError: if rho, sigma or radius is negative, or samples is not a positive
        integer; from update, if grad_fn returns no loss.

    References:
      Li, Zhou and Bilmes, `Tilted Sharpness-Aware Minimization
      <https://arxiv.org/abs/2410.22656>`_, ICML 2025.

    Differences from the authors' code, with whose trajectories this was compared:
      1. Their noise has a standard deviation for each entry. Here that is σ/√p.
      2. Their weights are rounded to float32. Here they have the precision of the loss.
      3. No epsilon is added to the norm. Theirs is 1e-12.
      4. The paper's second algorithm, which follows Hamiltonian dynamics to draw the
         points, is not here; nor is it the default of their scripts.

    Cost: 2n gradients a step, and a forward pass for the loss; n keys are carried.
    """
    check_static_integer("samples", samples)

    def ascent(name: str) -> optax.GradientTransformationExtraArgs:
        own = sam_ascent(rho)
        return ascend_from_noise(own, sigma, radius=radius, key=key, name=name)

    others = [ascent(f"tsam {i}") for i in range(1, samples)]
    if mask is not None:
        others = [restrict(other, mask) for other in others]
    return sharpness_aware(
        ascent("tsam 0"),
        descent=_tilt(others, tilt),
        mask=mask,
        guard=guard,
        stochastic_rounding=stochastic_rounding,
    )


_tilt = tilt  # the method has an argument of this name
