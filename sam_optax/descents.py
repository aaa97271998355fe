"""Descents: they turn the gradient gᵃ at w + ε into d, for the base optimizer.

A descent is an ordinary Optax transformation: its update receives gᵃ, in at least
float32, and returns d. Besides gᵃ and the parameters, it receives these extra
arguments:

- ascent_gradient: g, the gradient at the parameters.
- perturbation: ε.
- grad_fn: parameters -> the gradient of the loss there, on the examples of gᵃ, for
  descents that take further gradients.
- value_and_grad_fn: parameters -> (loss, gradient) there, for those that need losses.
- ascent_grad_fn: like grad_fn, on the examples that ε is made from.
- perturbed_loss: L(w + ε); None where the step took gradients alone, because its caller
  passed grad_fn= to the update.
- perturb: (params, ε) -> w + ε, rounded as the step rounds it.
- group: the index of the group of examples, or None.
- the extra arguments of the step.

`blend` and `gsam` compute g or gᵃ plus something built on gᵃ − g. This is equal to the
formulas of the papers. But in this form d is exactly g if the two gradients are equal,
and loses no digits if they are almost equal.

A descent of your own may compare gᵃ with g, for all that the step knows.
`ignoring_gradient` says that it does not.
"""

from sam_optax._parts import ignoring_gradient
from sam_optax.methods._cr_sam import cr_sam_descent as cr_sam
from sam_optax.methods._descent import blend
from sam_optax.methods._gam import gam_descent as gam
from sam_optax.methods._gsam import gsam_descent as gsam
from sam_optax.methods._sagm import sagm_descent as sagm
from sam_optax.methods._sampa import mix_with_lookahead
from sam_optax.methods._stable_sam import renormalize
from sam_optax.methods._tsam import tilt
from sam_optax.methods._universal_sam import add_sharpness

__all__ = [
    "add_sharpness",
    "blend",
    "cr_sam",
    "gam",
    "gsam",
    "ignoring_gradient",
    "mix_with_lookahead",
    "renormalize",
    "sagm",
    "tilt",
]
