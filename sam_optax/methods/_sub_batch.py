"""Sub-batch ascent: the perturbation comes from a part of the batch."""

import numpy as np
import optax

from sam_optax._doors.batch import Batch, DataRule
from sam_optax._step.inputs import Choice
from sam_optax.methods._record import record_further
from sam_optax.methods._selection import check_count, check_fraction, count_of


@record_further(
    title="Sub-batch ascent",
    equation="ε from a fraction of the batch",
    use="`data=`",
    cost="1 + fraction",
)
def sub_batch(fraction: float) -> DataRule:
    r"""Makes ε from a part of the batch, and descends on the whole batch.

    .. math::
      \varepsilon = \mathrm{ascent}(\nabla L_S(w)), \qquad S \subset B, \qquad
      g^a = \nabla L_B(w + \varepsilon)

    The examples of S are spread evenly over the batch: a quarter is every fourth one.
    The step returns the loss and auxiliary output of S, because it does not evaluate
    the other examples at w.

    Args:
      fraction: the share of the examples, in (0, 1].

    Returns:
      A rule for the `data=` argument of `sam_value_and_grad`.

    Raises:
      ValueError: if fraction is outside (0, 1]; when traced, if the fraction of the
        batch is less than one example.

    Examples:
      ε follows the first of two examples, from w = 1 to 1.5. There the gradients of the
      two are 3 and −3.

      >>> import jax.numpy as jnp, sam_optax
      >>> sam = sam_optax.sam(rho=0.5)
      >>> loss_and_grads = sam_optax.sam_value_and_grad(
      ...     lambda w, x: (w - x) ** 2, sam, data=sam_optax.data.sub_batch(0.5))
      >>> w, x = jnp.array(1.0), jnp.array([0.0, 3.0])
      >>> loss, grads = loss_and_grads(w, x, opt_state=sam.init(w))
      >>> print(loss, grads.gradients)
      1.0 0.0

    Cost: 1 + fraction gradients on a step that ascends, if d = gᵃ. A method that
    compares gᵃ with the gradient at w (GSAM, StableSAM, WSAM, LookSAM) also takes the
    gradient of the whole batch at w, and so does a step that does not ascend.
    """
    check_fraction("fraction", fraction)

    def rule(batch: Batch, params: optax.Params) -> Choice:
        size, count = batch.size, count_of(fraction, batch.size)
        check_count("fraction", count, size)
        if size % count:
            part = batch.take(np.arange(count) * size // count)
        else:  # a slice stays on the devices that hold the examples
            part = batch.take(slice(None, None, size // count))
        return Choice(
            part.gradient(params),
            part.gradient,
            batch.gradient,
            recompute=True,
            only_ascent=True,
        )

    return rule
