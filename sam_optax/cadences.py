"""Cadences: which steps take the second gradient, and what d is on the other steps.

A cadence is four small functions, which `Cadence` holds. `init` makes the state.
`decide` says whether a step takes the second gradient, `remember` keeps something of a
step that took it, and `substitute` computes d on a step that did not. The last three
receive g and the state, and `remember` also receives d. They see the mean of the
gradient over groups of examples and devices, so every device decides alike.
"""

from sam_optax._parts import Cadence, every_step
from sam_optax.methods._ae_sam import when_steep
from sam_optax.methods._late_sam import after
from sam_optax.methods._look_sam import every_k, every_k_reusing, reusing
from sam_optax.methods._rst import at_random

__all__ = [
    "Cadence",
    "after",
    "at_random",
    "every_k",
    "every_k_reusing",
    "every_step",
    "reusing",
    "when_steep",
]
