"""ImbSAM and Focal-SAM: only some classes, or some more than others, are perturbed."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sam_optax import _tree
from sam_optax._checks import check_constant
from sam_optax._doors.batch import Batch, DataRule
from sam_optax._step.inputs import Choice, Pass
from sam_optax.methods._record import record_further


@record_further(
    title="Imbalanced-SAM",
    equation="ε and gᵃ from the examples of rare classes, the others at w",
    use="`data=`",
    source="Zhou 2023",
    url="https://arxiv.org/abs/2308.07815",
    cost="3",
)
def imb_sam(is_tail: Callable[..., Any], *, as_released: bool = False) -> DataRule:
    r"""Perturbs the loss of rare classes alone: Imbalanced-SAM (ImbSAM).

    .. math::
      \varepsilon = \mathrm{ascent}(\nabla L_{tail}(w)), \qquad
      g^a = \nabla L_{head}(w) + \nabla L_{tail}(w + \varepsilon)

    L_tail is the sum of the losses of the tail examples, and L_head that of the others,
    both divided by the number of all examples. loss_fn must return one loss per
    example. The step returns the loss and auxiliary output of the whole batch.

    Args:
      is_tail: a function of the arguments of loss_fn that hold examples, in their
        order, which returns a bool for each example: whether it belongs to a rare
        class.
      as_released: whether the gradient of L_tail is doubled in gᵃ, as in the authors'
        code. Default False.

    Returns:
      A rule for the `data=` argument of `sam_value_and_grad`.

    Raises:
      TypeError: if is_tail is not a function; when traced, if it does not return bools.
      ValueError: when traced, if there is not one bool, or one loss, per example.

    Examples:
      Class 1 is rare. ε follows its only example, from w = 1 to 0.5. gᵃ is the mean of
      2 · (1 − 0), taken at w, and 2 · (0.5 − 3).

      >>> import jax.numpy as jnp, sam_optax
      >>> sam = sam_optax.sam(rho=0.5)
      >>> rule = sam_optax.data.imb_sam(lambda x, label: label == 1)
      >>> loss_and_grads = sam_optax.sam_value_and_grad(
      ...     lambda w, x, label: (w - x) ** 2, sam, data=rule, batch_argnums=(1, 2))
      >>> w, x, label = jnp.array(1.0), jnp.array([0.0, 3.0]), jnp.array([0, 1])
      >>> loss, grads = loss_and_grads(w, x, label, opt_state=sam.init(w))
      >>> print(loss, grads.gradients)
      2.5 -1.5

    References:
      Zhou et al., `ImbSAM: A Closer Look at Sharpness-Aware Minimization in
      Class-Imbalanced Recognition <https://arxiv.org/abs/2308.07815>`_, ICCV 2023.

    Differences from the authors' code:
      1. It doubles the loss of the tail, as as_released=True does here.
      2. The ascent is yours. Theirs is SAM's, with an epsilon of 1e-16 in the norm.

    Cost: 3 gradients a step: of both parts at w, which share a forward pass, and of the
    tail at w + ε.
    """
    if not callable(is_tail):
        raise TypeError(
            "is_tail must be a function of the examples that returns a bool for each, "
            f"got {is_tail!r}."
        )

    def weights(batch: Batch) -> tuple[jax.Array, jax.Array]:
        tail = jnp.asarray(is_tail(*batch.examples))
        if tail.dtype != jnp.bool_:
            raise TypeError(
                "is_tail must return a bool for each example, got an array of "
                f"{tail.dtype}."
            )
        tail = tail.astype(jnp.float32)
        return (2 if as_released else 1) * tail, 1 - tail

    return _perturb_in_part(weights)


@record_further(
    title="Focal-SAM",
    equation="ε and gᵃ from losses weighted by class, the rest of each at w",
    use="`data=`",
    source="Li 2025",
    url="https://arxiv.org/abs/2505.01660",
    cost="3",
)
def focal_sam(weights: Callable[..., Any]) -> DataRule:
    r"""Perturbs the loss of each example by a weight of its own: Focal-SAM.

    .. math::
      \varepsilon = \mathrm{ascent}(\nabla C(w)), \qquad
      g^a = \nabla (L - C)(w) + \nabla C(w + \varepsilon), \qquad
      C = \tfrac1B \sum_i c_i \ell_i

    So the sharpness of an example counts cᵢ times, and its loss once. loss_fn must
    return one loss per example. The step returns the loss and auxiliary output of the
    whole batch.

    Args:
      weights: a function of the arguments of loss_fn that hold examples, in their
        order, which returns the weight cᵢ of each example. `data.focal_weights` has
        those of the paper, for each class.

    Returns:
      A rule for the `data=` argument of `sam_value_and_grad`.

    Raises:
      TypeError: if weights is not a function.
      ValueError: when traced, if there is not one weight, or one loss, per example.

    Examples:
      The losses count half and whole. ε follows 0.5 · 2 · (1 − 0) + 1 · 2 · (1 − 3), so
      w + ε is 0.5, and gᵃ is the mean of 0.5 · 2 · 1 + 0.5 · 2 · 0.5 and 2 · (0.5 − 3).

      >>> import jax.numpy as jnp, sam_optax
      >>> sam, by_class = sam_optax.sam(rho=0.5), jnp.array([0.5, 1.0])
      >>> rule = sam_optax.data.focal_sam(lambda x, label: by_class[label])
      >>> loss_and_grads = sam_optax.sam_value_and_grad(
      ...     lambda w, x, label: (w - x) ** 2, sam, data=rule, batch_argnums=(1, 2))
      >>> w, x, label = jnp.array(1.0), jnp.array([0.0, 3.0]), jnp.array([0, 1])
      >>> loss, grads = loss_and_grads(w, x, label, opt_state=sam.init(w))
      >>> print(loss, grads.gradients)
      2.5 -1.75

    References:
      Li et al., `Focal-SAM: Focal Sharpness-Aware Minimization for Long-Tailed
      Classification <https://arxiv.org/abs/2505.01660>`_, ICML 2025.

    Differences from the authors' code:
      1. Its weights are float32; here they have the dtype of the losses.
      2. The ascent is yours. Theirs is SAM's with ρ = 0.2, or ASAM's with η = 0, and
         with an epsilon of 1e-12 in the norm.

    Cost: 3 gradients a step: of both parts at w, which share a forward pass, and of the
    weighted part at w + ε.
    """
    if not callable(weights):
        raise TypeError(
            "weights must be a function of the examples that returns one for each, got "
            f"{weights!r}. For an array of weights by class, pass "
            "lambda batch: by_class[batch['label']], or whatever holds the labels."
        )

    def parts(batch: Batch) -> tuple[jax.Array, jax.Array]:
        perturbed = jnp.asarray(weights(*batch.examples))
        return perturbed, 1 - perturbed

    return _perturb_in_part(parts)


def focal_weights(
    class_counts: Sequence[int], gamma: float = 1.0, sharpness: float = 0.5
) -> jax.Array:
    r"""The weight of each class in Focal-SAM, larger for rarer classes.

    .. math::
      c_k = \lambda \Big(1 - \frac{n_k}{\sum_j n_j}\Big)^\gamma

    Args:
      class_counts: the numbers n of training examples of each class.
      gamma: the exponent γ ≥ 0; with 0, all classes weigh the same. Default 1, from
        the authors' training script.
      sharpness: λ ≥ 0, the weight of the sharpness. Default 0.5, from the same script.

    Returns:
      An array of one weight per class, to be indexed by the labels; see `focal_sam`.

    Raises:
      ValueError: if a count is negative, all are zero, gamma < 0 or sharpness < 0.

    Examples:
      >>> import sam_optax
      >>> print(sam_optax.data.focal_weights([90, 10]))
      [0.05 0.45]
    """
    check_constant("gamma", gamma, at_least=0)
    check_constant("sharpness", sharpness, at_least=0)
    counts = np.asarray(class_counts, np.float64)
    if counts.ndim != 1 or not (counts >= 0).all() or not counts.sum() > 0:
        raise ValueError(
            "class_counts must be a list of the numbers of examples of each class, got "
            f"{class_counts!r}."
        )
    return jnp.asarray(sharpness * (1 - counts / counts.sum()) ** gamma)


def _perturb_in_part(
    weights: Callable[[Batch], tuple[jax.Array, jax.Array]],
) -> DataRule:
    """A rule from weights of the perturbed and of the unperturbed loss, by example."""

    def rule(batch: Batch, params: optax.Params) -> Choice:
        perturbed, unperturbed = weights(batch)
        moved, both = batch.weigh(perturbed), batch.weigh(perturbed + unperturbed)
        at_rest = batch.weigh(unperturbed).gradient(params)

        def descent(point):
            there = moved.gradient(point)
            gradient = _tree.add_scaled(
                _tree.at_least_float32(there.gradient), 1, at_rest.gradient
            )
            return Pass(there.loss + at_rest.loss, gradient, there.aux, both)

        return Choice(batch.forward(params), moved.gradient, descent, recompute=True)

    return rule
