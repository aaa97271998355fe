"""BiSAM: an ascent loss that bounds the misclassification rate from below."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from sam_optax import _tree
from sam_optax._checks import check_constant
from sam_optax.methods._record import record_further


@record_further(
    title="BiSAM's ascent loss",
    equation="ε from a lower bound of the 0-1 loss",
    use="`ascent_loss_fn=`",
    source="Xie 2024",
    url="https://arxiv.org/abs/2407.12993",
    cost="2",
)
def bisam_loss(
    logits: Any,
    labels: Any,
    *,
    bound: str = "log",
    mu: float | None = None,
    alpha: float = 0.1,
) -> jax.Array:
    r"""The loss from which Bilevel SAM (BiSAM) makes ε, one for each example.

    .. math::
      \ell = \frac1\mu \log \sum_k e^{\mu \phi(z_k - z_y)}, \qquad
      \phi(x) = 1 - \log(1 + (e - 1) e^{-x}) \quad\text{or}\quad \tanh(\alpha x)

    z are the logits and y is the label. SAM's ε makes the cross-entropy as large as
    possible, which is an upper bound of the share of misclassified examples. This ε
    makes a lower bound of that share as large as possible, so that it is large for
    certain: the bound is ℓ − (log K)/μ with K classes, and the constant changes no ε.

    Args:
      logits: an array whose last axis are the classes.
      labels: integers, an array without that axis.
      bound: φ, the lower bound of the step function: `"log"` (default), the first of
        the two above, or `"tanh"`, the second. The authors' code has both, and the
        example in its README takes the first.
      mu: the sharpness μ > 0 of the maximum over classes. Default None: 1 with "log"
        and 10 with "tanh", from the authors' code.
      alpha: α > 0, the slope of "tanh". Default 0.1, from the authors' code.

    Returns:
      The losses, at least in float32, of the shape of the labels. To use them, write a
      loss of the arguments of your own, and pass it as `ascent_loss_fn=`.

    Raises:
      ValueError: if bound is neither of the two, a number is not positive, or the
        shapes of logits and labels do not match.
      TypeError: if labels are not integers.

    Examples:
      The cross-entropy of the second example would be 100.

      >>> import jax.numpy as jnp, sam_optax
      >>> logits, labels = jnp.array([[0.0, 0.0], [0.0, 100.0]]), jnp.array([0, 0])
      >>> [round(float(x), 3) for x in sam_optax.bisam_loss(logits, labels)]
      [0.693, 1.313]

      As the ascent loss of a linear model:

      >>> import optax
      >>> def loss_fn(w, x, labels):
      ...     return optax.softmax_cross_entropy_with_integer_labels(x @ w, labels)
      >>> def ascent_loss_fn(w, x, labels):
      ...     return sam_optax.bisam_loss(x @ w, labels)
      >>> loss_and_grads = sam_optax.sam_value_and_grad(
      ...     loss_fn, sam_optax.sam(rho=0.05), ascent_loss_fn=ascent_loss_fn)

    References:
      Xie et al., `Improving SAM Requires Rethinking its Optimization Formulation
      <https://arxiv.org/abs/2407.12993>`_, ICML 2024. Checked against the authors' code
      and the equations of its README.

    Differences from the authors' code: it leaves out the factor 1/μ, which makes no
    difference to a normalised ε. Here the loss has it, as in the paper.

    Cost: 2 gradients a step, and a forward pass of the loss at w if it is used.
    """
    if bound not in ("log", "tanh"):
        raise ValueError(f"bound must be 'log' or 'tanh', got {bound!r}.")
    mu = {"log": 1.0, "tanh": 10.0}[bound] if mu is None else mu
    check_constant("mu", mu, above=0)
    check_constant("alpha", alpha, above=0)
    logits, labels = _tree.at_least_float32(jnp.asarray(logits)), jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"labels must be integers, the index of each class, got {labels.dtype}."
        )
    if logits.ndim == 0 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            "logits must have the shape of labels and one axis more, of the classes, "
            f"got {logits.shape} and {labels.shape}."
        )
    of_label = jnp.take_along_axis(logits, labels[..., None], axis=-1)
    bounded = _step_bound(logits - of_label, bound, alpha)
    return jax.nn.logsumexp(mu * bounded, axis=-1) / mu


def _step_bound(margin: jax.Array, bound: str, alpha: float) -> jax.Array:
    """A lower bound of the function that is 0 below a margin of 0, and 1 above."""
    if bound == "tanh":
        return jnp.tanh(alpha * margin)
    return 1 - jax.nn.softplus(math.log(math.e - 1) - margin)
