"""Decoupled WSAM, which also acts after the base optimizer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax import _tree
from sam_optax._checks import check_number, check_transformation
from sam_optax._hyperparameters import ScalarOrSchedule, value_at
from sam_optax._masks import Mask
from sam_optax._random import Key
from sam_optax._step import sharpness_aware
from sam_optax.methods._record import record_further
from sam_optax.methods._sam import sam_ascent


class DecoupledState(NamedTuple):
    """State of decoupled WSAM's optimizer."""

    decoupled_step: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32
    sharpness_state: Any  # SharpnessAwareState, which holds gᵃ − g of the last step
    descent_optimizer_state: optax.OptState


def set_gap_aside() -> optax.GradientTransformationExtraArgs:
    """The descent d = g. Its state is gᵃ − g, for use after the base optimizer."""

    def update_fn(updates, state, params=None, *, ascent_gradient=None, **extra_args):
        del state, params, extra_args
        gap = _tree.subtract(updates, ascent_gradient)
        # Adding 0 · gap makes d NaN if the gap is not finite: the guard sees only d.
        return _tree.add_scaled(ascent_gradient, 0, gap), gap

    return optax.GradientTransformationExtraArgs(
        lambda params: _tree.zeros_like(params), update_fn
    )


@record_further(
    title="Weighted SAM, decoupled",
    equation="base step on g, then w − lr γ/(1−γ) (gᵃ − g)",
    use="`sam, tx = decoupled_wsam(base, learning_rate)`, in place of the chain",
    source="Yue 2023",
    url="https://arxiv.org/abs/2305.15817",
    cost="2",
)
def decoupled_wsam(
    base: optax.GradientTransformation,
    learning_rate: ScalarOrSchedule,
    rho: ScalarOrSchedule = 0.05,
    gamma: ScalarOrSchedule = 0.9,
    *,
    mask: Mask = None,
    guard: bool = True,
    stochastic_rounding: Key | None = None,
) -> tuple[
    optax.GradientTransformationExtraArgs, optax.GradientTransformationExtraArgs
]:
    r"""Weighted Sharpness-Aware Minimization, decoupled: the default of its paper.

    .. math::
      w_{t+1} = w_t + \mathrm{base}(g_t)
        - lr_t \frac{\gamma}{1-\gamma} (g^a_t - g_t), \qquad
      g^a = \nabla L\big(w + \rho \tfrac{g}{\|g\|}\big)

    The base optimizer sees the gradient g alone. The step along gᵃ − g, the gradient of
    the surrogate gap, is added to its update, without momentum or preconditioning.

    Args:
      base: the base optimizer, with its learning rate.
      learning_rate: lr_t, the number or schedule that base was given.
      rho: the radius ρ = ‖ε‖. Default 0.05, that of `wsam`.
      gamma: γ in [0, 1). Default 0.9, from the paper.
      mask, guard, stochastic_rounding: passed on to `sharpness_aware`.

    Returns:
      (sam, tx). `sam` is the SAM transformation; pass it to `sam_value_and_grad`, and
      nowhere else. `tx` is the whole optimizer; use it in place of a chain.

    Raises:
      ValueError: if learning_rate < 0, rho < 0 or gamma is outside [0, 1).
      TypeError: if base is not a transformation.

    Examples:
      On f(w) = w² from w = 1, g is 2 and gᵃ is 3. The step is that of SGD, −0.1 · 2,
      plus −0.1 · 9 · (3 − 2).

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> sam, tx = sam_optax.decoupled_wsam(optax.sgd(0.1), 0.1, rho=0.5)
      >>> loss_and_grads = sam_optax.sam_value_and_grad(lambda w: w**2, sam)
      >>> w = jnp.array(1.0)
      >>> opt_state = tx.init(w)
      >>> loss, grads = loss_and_grads(w, opt_state=opt_state)
      >>> updates, opt_state = tx.update(grads, opt_state, w)
      >>> print(f"{optax.apply_updates(w, updates):.2f}")
      -0.10

    References:
      Yue et al., `Sharpness-Aware Minimization Revisited: Weighted Sharpness as a
      Regularization Term <https://arxiv.org/abs/2305.15817>`_, KDD 2023.

    Differences from the authors' code: those of `wsam`. What they subtract is the
    difference of the two clipped gradients.

    Cost: 2 gradients a step; one tree is carried, in at least float32.
    """
    check_transformation("base", base)
    check_number("learning_rate", learning_rate, at_least=0)
    check_number("gamma", gamma, at_least=0, below=1)
    sam = sharpness_aware(
        sam_ascent(rho),
        descent=set_gap_aside(),
        mask=mask,
        guard=guard,
        stochastic_rounding=stochastic_rounding,
    )
    base = optax.with_extra_args_support(base)

    def init_fn(params):
        return DecoupledState(
            jnp.zeros((), jnp.int32), sam.init(params), base.init(params)
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, DecoupledState]:
        step, sam_state, base_state = state
        new_sam_state: Any
        g, new_sam_state = sam.update(updates, sam_state, params, **extra_args)
        gap = new_sam_state.descent_state
        if guard:  # after a bad step, the state still holds the gap of the step before
            finite = _tree.all_finite(g)
            gap = jax.tree.map(lambda x: jnp.where(finite, x, 0), gap)
        updates, base_state = base.update(g, base_state, params, **extra_args)
        share = value_at(gamma, step)
        weight = value_at(learning_rate, step) * share / (1 - share)
        shifted = _tree.add_scaled(_tree.at_least_float32(updates), -weight, gap)
        return _tree.cast_like(shifted, updates), DecoupledState(
            optax.safe_increment(step), new_sam_state, base_state
        )

    return sam, optax.GradientTransformationExtraArgs(init_fn, update_fn)
