"""K-SAM: both gradients on the examples of highest loss."""

import optax

from sam_optax._checks import check_positive_integer
from sam_optax._doors.batch import Batch, DataRule
from sam_optax._step.inputs import Choice
from sam_optax.methods._record import record_further
from sam_optax.methods._selection import largest


@record_further(
    title="K-SAM",
    equation="both gradients on the k examples of highest loss",
    use="`data=`",
    source="Ni 2022",
    url="https://arxiv.org/abs/2210.12864",
    cost="2k/B + a forward pass",
)
def k_sam(k: int) -> DataRule:
    r"""Takes both gradients on the k examples of highest loss.

    .. math::
      \varepsilon = \mathrm{ascent}(\nabla L_S(w)), \qquad
      g^a = \nabla L_S(w + \varepsilon), \qquad
      S = \text{the } k \text{ examples of largest } \ell_i(w)

    loss_fn must return one loss per example. The step returns the loss and auxiliary
    output of the whole batch.

    Args:
      k: the number of examples, a Python integer from 1 to the size of the batch. With
        groups of examples or several devices, k is the number in each group, or on each
        device.

    Returns:
      A rule for the `data=` argument of `sam_value_and_grad`.

    Raises:
      ValueError: if k < 1; when traced, if k is larger than the batch, or loss_fn does
        not return one loss per example.

    Examples:
      The second example has the higher loss. ε moves w away from it, from 1 to 0.5,
      where its gradient is 2 · (0.5 − 3).

      >>> import jax.numpy as jnp, sam_optax
      >>> sam = sam_optax.sam(rho=0.5)
      >>> loss_and_grads = sam_optax.sam_value_and_grad(
      ...     lambda w, x: (w - x) ** 2, sam, data=sam_optax.data.k_sam(1))
      >>> w, x = jnp.array(1.0), jnp.array([0.0, 3.0])
      >>> loss, grads = loss_and_grads(w, x, opt_state=sam.init(w))
      >>> print(loss, grads.gradients)
      2.5 -5.0

    References:
      Ni et al., `K-SAM: Sharpness-Aware Minimization at the Speed of SGD
      <https://arxiv.org/abs/2210.12864>`_, 2022.

    Cost: 2k/B gradients and a forward pass, for a batch of B examples.
    """
    check_positive_integer("k", k)

    def rule(batch: Batch, params: optax.Params) -> Choice:
        if k > batch.size:
            raise ValueError(
                f"k must be at most the size of the batch, {batch.size}, got {k}."
            )
        seen = batch.forward(params)
        chosen = batch.take(largest(seen.losses, k))
        return Choice(seen, chosen.gradient, chosen.gradient)

    return rule
