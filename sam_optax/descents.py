"""Descents: what turns the gradient gᵃ at w + ε into d, which the base optimizer gets.

A descent is an ordinary Optax transformation whose updates go in as gᵃ, in at least
float32, and come out as d. Besides gᵃ and the parameters, its update receives these
extra arguments:

- ascent_gradient: g, the gradient at the parameters.
- perturbation: ε.
- grad_fn: parameters -> the gradient of the loss there, on the examples of gᵃ, for
  descents that take further gradients.
- perturb: (params, ε) -> w + ε, rounded as the step rounds it.
- group: the index of the group of examples, or None.
- the extra arguments of the step.

The descents of this module compute g or gᵃ plus something built on gᵃ − g. This is the
mathematics of the papers. In this form d is exactly g where the two gradients are
equal, and loses no digits where they are almost equal.
"""

from sam_optax.methods._descent import blend
from sam_optax.methods._gsam import gsam_descent as gsam
from sam_optax.methods._stable_sam import renormalize

__all__ = ["blend", "gsam", "renormalize"]
