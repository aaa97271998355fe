"""ESAM: a random mask on the perturbation, and a selection of the examples."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from sam_optax import _tree
from sam_optax._checks import check_number
from sam_optax._doors.batch import Batch, DataRule
from sam_optax._hyperparameters import ScalarOrSchedule, map_value, scheduled
from sam_optax._parts import Ascent, chain
from sam_optax._random import Key, key_stream
from sam_optax._step import Options, sharpness_aware
from sam_optax._step.inputs import Choice
from sam_optax.methods._noise import noisy
from sam_optax.methods._record import record, record_further
from sam_optax.methods._sam import sam_ascent, scale_by_rho
from sam_optax.methods._selection import (
    check_count,
    check_fraction,
    count_of,
    largest,
)


def mask_at_random(
    keep: ScalarOrSchedule = 0.6, *, key: Key = 0
) -> optax.GradientTransformationExtraArgs:
    """Keeps each entry with probability β and divides it by β, or sets it to zero.

    The expectation of the result is the input.

    Args:
      keep: β in (0, 1]. Default 0.6, that of the method `esam`.
      key: an int, a typed key or a legacy one. Default 0.

    Returns:
      A transformation that carries a key.

    Raises:
      ValueError: if keep is a Python number outside (0, 1].
    """
    _check_share("keep", keep)

    def part(keep):
        def mask(key, updates):
            drawn = _tree.uniform_like(key, updates)
            return jax.tree.map(
                # The zero is not finite where u is not.
                lambda u, x: jnp.where(x < keep, u / jnp.asarray(keep, u.dtype), 0 * u),
                updates,
                drawn,
            )

        return noisy(key, mask, name="mask_at_random")

    return Ascent.of(scheduled(part, keep=keep), shows_nonfinite=True)


class LeafMaskState(NamedTuple):
    """State of `mask_leaves_at_random`."""

    noise_key: jax.Array  # key data, dtype=jnp.uint32
    after_first_step: jax.Array  # shape=(), dtype=jnp.bool_


def mask_leaves_at_random(
    keep: ScalarOrSchedule = 0.6, *, key: Key = 0
) -> optax.GradientTransformationExtraArgs:
    """Keeps each leaf whole with probability β, or sets it to zero.

    This is the mask of ESAM's released code. The first step keeps all leaves. Unlike
    `mask_at_random`, it does not divide by β, because there a norm comes after it.

    Args:
      keep: β in (0, 1]. Default 0.6, that of the method `esam`.
      key: an int, a typed key or a legacy one. Default 0.

    Returns:
      A transformation that carries a key.

    Raises:
      ValueError: if keep is a Python number outside (0, 1].
    """
    _check_share("keep", keep)
    keys = key_stream(key, "mask_leaves_at_random")

    def init_fn(params):
        del params
        return LeafMaskState(keys.start(), jnp.zeros((), jnp.bool_))

    def part(keep):
        def update_fn(updates, state, params=None, *, group=None, **extra_args):
            del params, extra_args
            updates = _tree.at_least_float32(updates)
            now, later = keys.next(state.noise_key, group)
            drawn = _tree.uniform_like(
                now, jax.tree.map(lambda u: jnp.zeros((), u.dtype), updates)
            )

            def mask(u, x):
                is_kept = (x < keep) | ~state.after_first_step
                return jnp.where(is_kept, u, 0 * u)  # not finite where u is not

            masked = jax.tree.map(mask, updates, drawn)
            return masked, LeafMaskState(later, jnp.ones((), jnp.bool_))

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return Ascent.of(scheduled(part, keep=keep), shows_nonfinite=True)


def _check_share(name: str, share: ScalarOrSchedule) -> None:
    """With 0, nothing would be perturbed."""
    check_number(name, share, above=0, at_most=1)


@record_further(
    title="Efficient SAM, selection",
    equation="gᵃ on the γB examples whose loss rose most",
    use="`data=`",
    source="Du 2022",
    url="https://arxiv.org/abs/2110.03141",
    cost="1 + γ + a forward pass",
)
def largest_increase(gamma: float = 0.5, *, as_released: bool = False) -> DataRule:
    r"""Takes the descent gradient on the examples whose loss rises most.

    .. math::
      g^a = \nabla L_S(w + \varepsilon), \qquad
      S = \text{the } \gamma B \text{ examples of largest }
      \ell_i(w + \varepsilon) - \ell_i(w)

    This is the selection of ESAM. Together with the method `esam`, it is the whole of
    ESAM. It also works with other methods that descend on gᵃ alone, such as `sam`. One
    that compares gᵃ with g, such as `gsam`, is refused: g is the gradient of the whole
    batch. loss_fn must return one loss per example.

    Args:
      gamma: the share γ of the examples, in (0, 1]. Default 0.5, which all training
        scripts of the authors' code have; its parser has 1, which is no selection.
      as_released: whether to select as the authors' code does: one example fewer, and
        all of them if γ ≥ 0.99. Default False.

    Returns:
      A rule for the `data=` argument of `sam_value_and_grad`.

    Raises:
      ValueError: if gamma is outside (0, 1]; when traced, if no example would be
        selected, loss_fn does not return one loss per example, or the method compares
        gᵃ with g.

    Examples:
      Both examples pull w to the left, so ε moves it to the right, from 3 to 3.5. The
      loss of the first example rises more, and gᵃ is 2 · (3.5 − 0).

      >>> import jax.numpy as jnp, sam_optax
      >>> sam = sam_optax.sam(rho=0.5)
      >>> rule = sam_optax.data.largest_increase(0.5)
      >>> loss_and_grads = sam_optax.sam_value_and_grad(
      ...     lambda w, x: (w - x) ** 2, sam, data=rule)
      >>> w, x = jnp.array(3.0), jnp.array([0.0, 2.0])
      >>> loss, grads = loss_and_grads(w, x, opt_state=sam.init(w))
      >>> print(loss, grads.gradients)
      5.0 7.0

    References:
      Du et al., `Efficient Sharpness-aware Minimization for Improved Training of Neural
      Networks <https://arxiv.org/abs/2110.03141>`_, ICLR 2022.

    Cost: 1 + γ gradients and a forward pass.
    """
    check_fraction("gamma", gamma)

    def rule(batch: Batch, params: optax.Params) -> Choice:
        seen = batch.gradient(params)
        before = seen.losses
        count = count_of(gamma, batch.size)
        if as_released:
            count = batch.size if gamma >= 0.99 else count - 1
        check_count("gamma", count, batch.size)

        def descent(point):
            rise = batch.forward(point).losses - before
            return batch.take(largest(rise, count)).gradient(point)

        return Choice(seen, batch.gradient, descent, comparable=False)

    return rule


@record(
    title="Efficient SAM, random mask",
    equation="ε = ρ g/‖g‖ · b/β, b random in {0, 1} with mean β",
    radius="‖E ε‖",
    source="Du 2022",
    url="https://arxiv.org/abs/2110.03141",
)
def esam(
    rho: ScalarOrSchedule = 0.05,
    beta: ScalarOrSchedule = 0.6,
    *,
    key: Key = 0,
    as_released: bool = False,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Efficient Sharpness-Aware Minimization (ESAM), its random mask.

    .. math::
      \varepsilon = \rho \frac{g}{\|g\|} \cdot \frac{b}{\beta}, \quad
      b_i \sim \mathrm{Bernoulli}(\beta), \qquad d = \nabla L(w + \varepsilon)

    This is stochastic weight perturbation, the first of the paper's two ideas. The
    second is to descend on the examples whose loss rises most; the data rule
    `largest_increase` does that. To use both, call
    `sam_value_and_grad(loss_fn, esam, data=data.largest_increase())`.

    Args:
      rho: the radius ρ of the unmasked perturbation, so that ‖E ε‖ = ρ. Default 0.05,
        that of `sam`.
      beta: the share β in (0, 1] of the entries that are perturbed. Default 0.6, which
        the scripts of the authors' code have for ResNet-18. They have 0.5 for the
        larger networks, and the parser has 1, which is no mask.
      key: an int, a typed key or a legacy one. Default 0.
      as_released: whether to mask as the authors' code does. It keeps or leaves out
        whole tensors, and takes the norm of those that it keeps, so that
        ε = ρ/β · bg/‖bg‖ with one random b for each tensor. On the first step, b = 1.
        Default False.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0 or beta is outside (0, 1].

    References:
      Du et al., `Efficient Sharpness-aware Minimization for Improved Training of Neural
      Networks <https://arxiv.org/abs/2110.03141>`_, ICLR 2022.

    Differences from the authors' code:
      1. They mask whole tensors, and take the norm of the kept tensors only, as
         as_released=True does here.
      2. Theirs does not compute the gradient at w of a tensor that it leaves out. Here
         g is always whole.
      3. No epsilon is added to the norm. Theirs is 1e-7.

    Cost: 2 gradients a step; a key is carried.
    """
    _check_share("beta", beta)
    if as_released:
        ascent = chain(
            mask_leaves_at_random(beta, key=key),
            sam_ascent(rho),
            scale_by_rho(map_value(lambda beta: 1 / beta, beta)),
        )
    else:
        ascent = chain(sam_ascent(rho), mask_at_random(beta, key=key))
    return sharpness_aware(ascent, **options)
