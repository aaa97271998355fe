"""Cadences: on which steps the second gradient is taken, and what d is on the others.

A cadence is four small functions, which `Cadence` holds: they decide about a step,
remember something of a step with a second gradient, and substitute for d on a step
without one. They receive g and their own state, and `remember` also receives d. All of
them see the mean gradient over groups of examples and devices, so every device decides
alike.
"""

from sam_optax._step import Cadence, every_step
from sam_optax.methods._ae_sam import when_steep
from sam_optax.methods._look_sam import every_k, every_k_reusing
from sam_optax.methods._rst import at_random

__all__ = [
    "Cadence",
    "at_random",
    "every_k",
    "every_k_reusing",
    "every_step",
    "when_steep",
]
