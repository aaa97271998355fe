"""Data rules: they choose the examples that each of the two gradients of a step sees.

A data rule is a function of the batch and the parameters. It returns a `Choice`. This
holds the pass at the parameters whose loss and auxiliary output the step returns, and
two functions from a point to a `Pass`: one for the examples that ε is made from, and
one for those that the step descends on. The methods know nothing of rules: you pass the
rule to `sam_value_and_grad` as `data=`, and it works with every method.

In a rule, `batch.gradient(point)` and `batch.forward(point)` evaluate the loss at a
point, with and without its gradient, `batch.take(indices)` selects examples, and
`batch.weigh(weights)` weighs their losses.
"""

from sam_optax._doors.batch import Batch, DataRule
from sam_optax._step.inputs import Choice, Pass
from sam_optax.methods._esam import largest_increase
from sam_optax.methods._functional_sam import functional
from sam_optax.methods._imbalanced import focal_sam, focal_weights, imb_sam
from sam_optax.methods._k_sam import k_sam
from sam_optax.methods._sub_batch import sub_batch

__all__ = [
    "Batch",
    "Choice",
    "DataRule",
    "Pass",
    "focal_sam",
    "focal_weights",
    "functional",
    "imb_sam",
    "k_sam",
    "largest_increase",
    "sub_batch",
]
