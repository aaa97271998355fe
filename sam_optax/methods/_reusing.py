"""LookSAM's reuse of a direction, between the steps of any cadence."""

from typing import Any, NamedTuple

import optax

from sam_optax._hyperparameters import ScalarOrSchedule
from sam_optax._parts import Cadence
from sam_optax.methods._look_sam import every_k_reusing


class ReusingState(NamedTuple):
    """State of `reusing`."""

    timing_state: Any  # that of the cadence which decides
    reuse_state: Any  # the direction that is kept, with a counter for its weight


def reusing(
    cadence: Cadence, alpha: ScalarOrSchedule = 0.7, *, per_tensor: bool = False
) -> Cadence:
    r"""Decides as another cadence does, and reuses the second gradient in between.

    A step that takes the second gradient keeps the part of d that is orthogonal to g,
    as LookSAM does, and the steps without one follow it:

    .. math::
      v = d - \mathrm{proj}_g\, d \ \text{ is kept}, \qquad
      d = g + \alpha \frac{\|g\|}{\|v\|} v \ \text{ in between}

    Before the first step that takes the second gradient, d = g.

    Args:
      cadence: decides which steps take the second gradient. What it would itself put in
        the place of d on the other steps is not used.
      alpha, per_tensor: those of the method `look_sam`. Default 0.7 and False.

    Returns:
      A cadence that carries v/‖v‖, in at least float32, and the state of the other one.

    Raises:
      ValueError: if alpha is not finite.
      TypeError: if cadence is not a `Cadence`.

    Examples:
      LookSAM with a random rhythm:

      >>> import sam_optax
      >>> from sam_optax import ascents, cadences
      >>> sam = sam_optax.sharpness_aware(
      ...     ascents.sam(rho=0.1), cadence=cadences.reusing(cadences.at_random(0.2)))
    """
    if not isinstance(cadence, Cadence):
        raise TypeError(
            "cadence must be a sam_optax.cadences.Cadence, such as "
            f"cadences.at_random(0.2), got {cadence!r}."
        )
    # With k = 1, the other cadence only counts the steps, for a schedule of alpha.
    reuse = every_k_reusing(1, alpha, per_tensor=per_tensor)

    def init(params: optax.Params) -> ReusingState:
        return ReusingState(cadence.init(params), reuse.init(params))

    def decide(g, state):
        decision, timing = cadence.decide(g, state.timing_state)
        _, kept = reuse.decide(g, state.reuse_state)
        return decision, ReusingState(timing, kept)

    def remember(d, g, state):
        return ReusingState(
            cadence.remember(d, g, state.timing_state),
            reuse.remember(d, g, state.reuse_state),
        )

    def substitute(g, state):
        return reuse.substitute(g, state.reuse_state)

    return Cadence(init, decide, remember, substitute)
