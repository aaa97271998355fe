"""Data rules: which examples each of the two gradients of a step sees.

A rule is a function of the batch and the parameters that says how the step looks at
them; the methods know nothing of it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sam_optax import _layout as layout
from sam_optax._batch import Batch, Pass
from sam_optax._hyperparameters import check_positive_integer, check_static_number


class Choice(NamedTuple):
    """How a step sees its batch.

    Attributes:
      seen: the pass at the parameters whose loss and auxiliary output are returned.
      ascent: the batch that ε is made from, whose gradient is g.
      descent: the perturbed parameters -> the batch on which gᵃ is taken there.
      recompute: whether g is that of too few or of other examples, so that it is not
        what gᵃ is to be compared with, nor what a step without gᵃ is to descend on. The
        descent's batch then gives its own gradient to whoever needs it. Default False.
    """

    seen: Pass
    ascent: Batch
    descent: Callable[[Any], Batch]
    recompute: bool = False


DataRule = Callable[[Batch, Any], Choice]


def same_batch(batch: Batch, params: Any) -> Choice:
    """Both gradients on the whole batch: the rule of a step without any."""
    return Choice(batch.gradient(params), batch, lambda point: batch)


def another_batch(examples: Any) -> DataRule:
    """ε from the given examples, everything else from the batch."""

    def rule(batch, params):
        is_single = len(batch.examples) == 1
        others = [examples] if is_single else list(examples)
        _check_match(batch.examples, others)
        return Choice(
            batch.forward(params),
            batch.replace(others),
            lambda point: batch,
            recompute=True,
        )

    return rule


def sub_batch(fraction: float) -> DataRule:
    r"""ε from a part of the batch, the descent gradient from all of it.

    .. math::
      \varepsilon = \mathrm{ascent}(\nabla L_S(w)), \qquad S \subset B, \qquad
      g^a = \nabla L_B(w + \varepsilon)

    The part is evenly spread over the batch: for a quarter, every fourth example. The
    loss and auxiliary output of the step are those of the part, because only the part
    is seen at w.

    Args:
      fraction: the share of the examples, in (0, 1].

    Returns:
      A rule for the `data=` argument of `sam_value_and_grad`.

    Raises:
      ValueError: if fraction is outside (0, 1]; when traced, if the fraction of the
        batch is less than one example.

    Examples:
      ε follows the first of two examples, and both have their gradient at w + ε.

      >>> import jax.numpy as jnp, optax, sam_optax
      >>> sam = sam_optax.sam(rho=0.5)
      >>> loss_and_grads = sam_optax.sam_value_and_grad(
      ...     lambda w, x: (w - x) ** 2, sam, data=sam_optax.sub_batch(0.5))
      >>> w, x = jnp.array(1.0), jnp.array([0.0, 3.0])
      >>> loss, grads = loss_and_grads(w, x, opt_state=sam.init(w))
      >>> print(loss, grads.gradients)
      1.0 0.0

    Cost: 1 + fraction gradients on a step that ascends, if d = gᵃ. What compares gᵃ
      with the gradient at w (GSAM, StableSAM, WSAM, LookSAM) takes that of the whole
      batch besides, and so does a step that does not ascend.
    """
    _check_fraction(fraction)

    def rule(batch, params):
        size, count = batch.size, _count(fraction, batch.size)
        _check_count(count, size, "fraction")
        if size % count:
            part = batch.take(np.arange(count) * size // count)
        else:  # a slice stays on the devices that hold the examples
            part = batch.take(slice(None, None, size // count))
        return Choice(part.gradient(params), part, lambda point: batch, recompute=True)

    return rule


def largest_increase(gamma: float = 0.5, *, as_released: bool = False) -> DataRule:
    r"""The descent gradient on the examples whose loss rises most: ESAM's selection.

    .. math::
      g^a = \nabla L_S(w + \varepsilon), \qquad
      S = \text{the } \gamma B \text{ examples of largest }
      \ell_i(w + \varepsilon) - \ell_i(w)

    With the method `sam_optax.esam` it makes the whole of ESAM; any other method takes
    it as well. loss_fn must return one loss per example.

    Args:
      gamma: the share γ of the examples, in (0, 1]. Default 0.5, from the paper.
      as_released: select one example fewer, as the authors' code does, and all of them
        from γ = 0.99. Default False.

    Returns:
      A rule for the `data=` argument of `sam_value_and_grad`.

    Raises:
      ValueError: if gamma is outside (0, 1]; when traced, if no example would be
        selected, or loss_fn does not return one loss per example.

    Examples:
      Both examples pull w to the left, ε moves it to the right, and the loss of the
      first one rises more.

      >>> import jax.numpy as jnp, optax, sam_optax
      >>> sam = sam_optax.sam(rho=0.5)
      >>> loss_and_grads = sam_optax.sam_value_and_grad(
      ...     lambda w, x: (w - x) ** 2, sam, data=sam_optax.largest_increase(0.5))
      >>> w, x = jnp.array(3.0), jnp.array([0.0, 2.0])
      >>> loss, grads = loss_and_grads(w, x, opt_state=sam.init(w))
      >>> print(loss, grads.gradients)
      5.0 7.0

    References:
      Du et al., `Efficient Sharpness-aware Minimization for Improved Training of Neural
      Networks <https://arxiv.org/abs/2110.03141>`_, ICLR 2022.

    Cost: 1 + γ gradients and a forward pass.
    """
    _check_fraction(gamma, "gamma")

    def rule(batch, params):
        seen = batch.gradient(params)
        before = seen.losses
        count = _count(gamma, batch.size)
        if as_released:
            count = batch.size if gamma >= 0.99 else count - 1
        _check_count(count, batch.size, "gamma")

        def descent(point):
            rise = batch.forward(point).losses - before
            return batch.take(_largest(rise, count))

        return Choice(seen, batch, descent)

    return rule


def k_sam(k: int) -> DataRule:
    r"""Both gradients on the k examples of highest loss: K-SAM.

    .. math::
      \varepsilon = \mathrm{ascent}(\nabla L_S(w)), \qquad
      g^a = \nabla L_S(w + \varepsilon), \qquad
      S = \text{the } k \text{ examples of largest } \ell_i(w)

    loss_fn must return one loss per example. The loss and auxiliary output of the step
    are those of the whole batch.

    Args:
      k: the number of examples, a Python integer from 1 to the size of the batch. With
        groups of examples or several devices, of each of them.

    Returns:
      A rule for the `data=` argument of `sam_value_and_grad`.

    Raises:
      ValueError: if k < 1; when traced, if k is larger than the batch, or loss_fn does
        not return one loss per example.

    Examples:
      The second example has the higher loss, and both gradients are its.

      >>> import jax.numpy as jnp, optax, sam_optax
      >>> sam = sam_optax.sam(rho=0.5)
      >>> loss_and_grads = sam_optax.sam_value_and_grad(
      ...     lambda w, x: (w - x) ** 2, sam, data=sam_optax.k_sam(1))
      >>> w, x = jnp.array(1.0), jnp.array([0.0, 3.0])
      >>> loss, grads = loss_and_grads(w, x, opt_state=sam.init(w))
      >>> print(loss, grads.gradients)
      2.5 -5.0

    References:
      Ni et al., `K-SAM: Sharpness-Aware Minimization at the Speed of SGD
      <https://arxiv.org/abs/2210.12864>`_, 2022.

    Cost: 2k/B gradients and a forward pass.
    """
    check_positive_integer("k", k)

    def rule(batch, params):
        if k > batch.size:
            raise ValueError(
                f"k must be at most the size of the batch, {batch.size}, got {k}."
            )
        seen = batch.forward(params)
        chosen = batch.take(_largest(seen.losses, k))
        return Choice(seen, chosen, lambda point: chosen)

    return rule


def _largest(values: jax.Array, count: int) -> jax.Array:
    return jax.lax.top_k(layout.replicate(values), count)[1]


def _check_fraction(fraction: Any, name: str = "fraction") -> None:
    check_static_number(name, fraction, at_most=1)
    if not fraction > 0:
        raise ValueError(f"{name} must be > 0, got {fraction}.")


def _count(fraction: float, size: int) -> int:
    # A little more than the product, or 0.29 of 100 examples would be 28.
    return int(fraction * size * (1 + 1e-9))


def _check_count(count: int, size: int, name: str) -> None:
    if count < 1:
        raise ValueError(
            f"{name} is so small that it selects none of the {size} examples."
        )


def _check_match(examples: list[Any], other: Any) -> None:
    """The arguments of another batch, as many and of the same kinds."""
    wanted, given = jax.tree.structure(examples), jax.tree.structure(other)
    kinds = [
        [(x.shape[1:], jnp.result_type(x)) for x in jax.tree.leaves(tree)]
        for tree in (examples, other)
        if wanted == given
    ]
    if wanted != given or kinds[0] != kinds[1]:
        raise ValueError(
            "ascent_batch does not match the batch: it needs the same structure, and "
            "arrays of the same dtypes and shapes but for the first axis. The batch is "
            f"{jax.tree.map(jnp.shape, examples)}, the other "
            f"{jax.tree.map(jnp.shape, other)}."
        )
