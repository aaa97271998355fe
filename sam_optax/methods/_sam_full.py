"""SAM-full and SAM-noise: the parts of g along the full gradient and beside it."""

from collections.abc import Callable
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


def project_on_full_gradient(
    decay: ScalarOrSchedule = 0.9,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the projection of g on the full gradient, as SAM-full does.

    .. math::
      u = \mathrm{proj}_{\nabla L}\, g

    Args:
      decay: λ in [0, 1). A moving average of g with this λ takes the place of the full
        gradient, unless you pass the update the full gradient itself, as the extra
        argument `full_gradient=`. Default 0.9, that of `fsam`.

    Returns:
      A transformation that carries the average, in at least float32.

    Raises:
      ValueError: if decay is a Python number outside [0, 1).
    """
    return _part_of(_tree.projection, decay)


def subtract_projection_on_full_gradient(
    decay: ScalarOrSchedule = 0.9,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps g minus its projection on the full gradient, as SAM-noise does.

    .. math::
      u = g - \mathrm{proj}_{\nabla L}\, g

    It has the argument, result and errors of `project_on_full_gradient`.
    """
    return _part_of(_tree.orthogonal, decay)


def _part_of(
    component: Callable[[optax.Updates, optax.Updates], optax.Updates],
    decay: ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    check_number("decay", decay, at_least=0, below=1)

    def part(decay):
        def update_fn(updates, state, params=None, *, full_gradient=None, **extra_args):
            del params, extra_args
            g = _tree.at_least_float32(updates)
            innovation = _tree.subtract(g, state.gradient_ema)
            state = advance_ema(state, innovation, 1 - decay, starts_at_first=False)
            known = state.gradient_ema if full_gradient is None else full_gradient
            # If g lies along the full gradient, g minus its projection is only rounding
            # error, which the norm that follows would scale up to a direction.
            return _tree.zero_if_rounding_of(g, component(g, known)), state

        return optax.GradientTransformationExtraArgs(start_ema, update_fn)

    return Ascent.of(scheduled(part, decay=decay), shows_nonfinite=True)


def sam_full_ascent(
    rho: ScalarOrSchedule = 0.05, decay: ScalarOrSchedule = 0.9
) -> Ascent:
    """The ascent of the method `sam_full`; it takes the same arguments."""
    return chain(project_on_full_gradient(decay), sam_ascent(rho))


def sam_noise_ascent(
    rho: ScalarOrSchedule = 0.05, decay: ScalarOrSchedule = 0.9
) -> Ascent:
    """The ascent of the method `sam_noise`; it takes the same arguments."""
    return chain(subtract_projection_on_full_gradient(decay), sam_ascent(rho))


@record(
    title="SAM-full",
    equation="ε along the projection of g on the full gradient",
    source="Li 2024",
    url="https://arxiv.org/abs/2403.12350",
)
def sam_full(
    rho: ScalarOrSchedule = 0.05,
    decay: ScalarOrSchedule = 0.9,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""SAM along the full gradient only (SAM-full).

    .. math::
      \varepsilon = \rho \frac{u}{\|u\|}, \qquad
      u = \mathrm{proj}_{\nabla L}\, g, \qquad d = \nabla L_B(w + \varepsilon)

    where g is the gradient of the batch B, and ∇L that of all training data. The paper
    of F-SAM compares it with `sam_noise`, to show which part of g helps.

    Args:
      rho: the radius ρ = ‖ε‖. Default 0.05, that of `sam`.
      decay: λ of the moving average that takes the place of the full gradient. To use
        the full gradient itself, pass it to the update as `full_gradient=`; through
        `sam_value_and_grad`, as `extra_args={"full_gradient": ...}`. Default 0.9, that
        of `fsam`.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0 or decay is outside [0, 1).

    References:
      Li et al., `Friendly Sharpness-Aware Minimization
      <https://arxiv.org/abs/2403.12350>`_, CVPR 2024, section 4.

    Differences from the authors' code: none is published for this variant.

    Cost: 2 gradients a step; one tree is carried, in at least float32.
    """
    return sharpness_aware(sam_full_ascent(rho, decay), **options)


@record(
    title="SAM-noise",
    equation="ε along g minus that projection",
    source="Li 2024",
    url="https://arxiv.org/abs/2403.12350",
)
def sam_noise(
    rho: ScalarOrSchedule = 0.05,
    decay: ScalarOrSchedule = 0.9,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""SAM along the noise of the batch only (SAM-noise).

    .. math::
      \varepsilon = \rho \frac{u}{\|u\|}, \qquad
      u = g - \mathrm{proj}_{\nabla L}\, g, \qquad d = \nabla L_B(w + \varepsilon)

    where g is the gradient of the batch B, and ∇L that of all training data. It is the
    counterpart of `sam_full`.

    Args:
      rho: the radius ρ = ‖ε‖. Default 0.05, that of `sam`.
      decay: that of `sam_full`, whose docstring says how to pass the full gradient.
        Default 0.9. Without a full gradient, the average is a multiple of g on the
        first step, so that u = 0 and ε = 0 there.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0 or decay is outside [0, 1).

    References:
      Li et al., `Friendly Sharpness-Aware Minimization
      <https://arxiv.org/abs/2403.12350>`_, CVPR 2024, section 4.

    Differences from the authors' code: none is published for this variant.

    Cost: 2 gradients a step; one tree is carried, in at least float32.
    """
    return sharpness_aware(sam_noise_ascent(rho, decay), **options)
