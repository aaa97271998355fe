"""SAM with Polyak's step size, which replaces the base optimizer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax import _tree
from sam_optax._checks import check_constant, is_infinity, require_params
from sam_optax._hyperparameters import ScalarOrSchedule
from sam_optax._masks import Mask
from sam_optax._parts import Descent
from sam_optax._random import Key
from sam_optax._step import sharpness_aware
from sam_optax.methods._record import record_further
from sam_optax.methods._unified_sam import unified_sam_ascent


class PolyakState(NamedTuple):
    """State of `measure_polyak_step`."""

    polyak_step: jax.Array  # shape=(), at least float32


class PolyakOptimizerState(NamedTuple):
    """State of the optimizer of `polyak_sam`.

    It is not that of the SAM transformation alone, so that `sam_value_and_grad` can
    tell the two apart, and refuse the optimizer.
    """

    sharpness_state: Any  # SharpnessAwareState, which holds the step size


def measure_polyak_step(lower_bound: Any, max_step: Any) -> Descent:
    """The descent d = gᵃ. Its state is Polyak's step size, for use as learning rate."""

    def init_fn(params: optax.Params) -> PolyakState:
        return PolyakState(_tree.norm(_tree.zeros_like(params)))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        perturbation: Any = None,
        perturbed_loss: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PolyakState]:
        del params, extra_args
        slope = _tree.norm(updates)
        loss = jnp.asarray(perturbed_loss, slope.dtype)
        excess = loss - lower_bound - _tree.dot(updates, perturbation)
        # One division after the other: the square of the norm can leave the range.
        safe = jnp.where(slope == 0, 1, slope)
        step = jnp.clip(excess / safe / safe, 0, max_step)
        # Where gᵃ = 0, γ only scales the weight decay, and must be finite.
        longest = jnp.where(jnp.isfinite(max_step) & (excess > 0), max_step, 0)
        step = jnp.where(slope == 0, longest, step)
        step = jnp.asarray(step, state.polyak_step.dtype)
        # A loss that is not finite gives no step, and shows in d.
        d = _tree.scale(jnp.where(jnp.isfinite(loss), 1, jnp.nan), updates)
        return d, PolyakState(step)

    descent = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return Descent.of(descent, uses_loss=True)


@record_further(
    title="SAM with Polyak's step",
    equation="w − γ gᵃ, γ = (L(w+ε) − ℓ − ⟨gᵃ, ε⟩)/‖gᵃ‖², from 0 to a maximum",
    use="`sam, tx = polyak_sam()`, in place of the chain",
    source="Oikonomou 2026",
    url="https://arxiv.org/abs/2606.01827",
    cost="2",
)
def polyak_sam(
    rho: ScalarOrSchedule = 0.1,
    lam: ScalarOrSchedule = 1.0,
    *,
    lower_bound: float = 0.0,
    max_step: float = 1.0,
    weight_decay: float = 0.0,
    mask: Mask = None,
    guard: bool = True,
    stochastic_rounding: Key | None = None,
) -> tuple[
    optax.GradientTransformationExtraArgs, optax.GradientTransformationExtraArgs
]:
    r"""SAM with a stochastic Polyak step size in the place of a learning rate.

    .. math::
      \varepsilon = \rho \Big(1 - \lambda + \frac{\lambda}{\|g\|}\Big) g, \qquad
      \gamma = \min\!\Big(
        \frac{[L(w + \varepsilon) - \ell - \langle g^a, \varepsilon \rangle]_+}
             {\|g^a\|^2},\, \gamma_b \Big), \qquad
      w \leftarrow w - \gamma g^a

    The numerator is the loss that the tangent at w + ε predicts at w, minus ℓ. So γ is
    the step at which that tangent reaches ℓ. There is no learning rate to tune. Where
    gᵃ = 0, γ is γ_b if the numerator is positive, and 0 if γ_b is infinite.

    Args:
      rho, lam: those of the method `unified_sam`. Default 0.1 and 1, which is SAM, from
        the authors' code.
      lower_bound: ℓ, a number below the loss of every batch. Default 0, from the
        authors' code, for losses that are not negative.
      max_step: the largest step γ_b > 0; infinity sets no limit. Default 1, from the
        authors' code.
      weight_decay: decay · w is added to gᵃ in the step, but not in γ. Default 0; the
        authors' code has 5e-4.
      mask, guard, stochastic_rounding: passed on to `sharpness_aware`.

    Returns:
      (sam, tx). `sam` is the SAM transformation; pass it to `sam_value_and_grad`, and
      nowhere else. `tx` is the whole optimizer, which has a step size of its own; use
      it in place of a chain. γ of the last step is
      `optax.tree.get(opt_state, "polyak_step")`.

    Raises:
      ValueError: if rho < 0, lam is outside [0, 1], lower_bound is not finite, max_step
        is not positive, or weight_decay < 0; from update, if the gradients come from a
        grad_fn that returns no losses.

    Examples:
      On f(w) = w² from w = 1 with ε = 0.5, the loss at w + ε is 2.25 and gᵃ is 3. So
      γ = (2.25 − 3 · 0.5)/9, and w becomes 1 − γ · 3.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> sam, tx = sam_optax.polyak_sam(rho=0.5)
      >>> loss_and_grads = sam_optax.sam_value_and_grad(lambda w: w**2, sam)
      >>> w = jnp.array(1.0)
      >>> opt_state = tx.init(w)
      >>> loss, grads = loss_and_grads(w, opt_state=opt_state)
      >>> updates, opt_state = tx.update(grads, opt_state, w)
      >>> print(f"{optax.apply_updates(w, updates):.2f}")
      0.75

    References:
      Oikonomou and Loizou, `Adaptive Sharpness-Aware Minimization with a Polyak-type
      Step size: A Theory-Grounded Scheduler <https://arxiv.org/abs/2606.01827>`_, 2026.
      Checked against the authors' code.

    Differences from the authors' code, the package sam-sps:
      1. It computes norms and the step size in float32, whatever the parameters are.
      2. No epsilon is added to the norms. Theirs are 1e-12.
      3. On a step with ascend=False, γ is Polyak's step at w. Theirs has no such steps.
      4. With m=, or one perturbation per device, γ is made of the mean loss and the
         mean gᵃ of the groups, and of the ε of the mean gradient.

    Cost: 2 gradients a step; a number is carried.
    """
    check_constant("lower_bound", lower_bound)
    check_constant("weight_decay", weight_decay, at_least=0)
    if not is_infinity(max_step):
        check_constant("max_step", max_step, above=0)
    sam = sharpness_aware(
        unified_sam_ascent(rho, lam),
        descent=measure_polyak_step(lower_bound, max_step),
        mask=mask,
        guard=guard,
        stochastic_rounding=stochastic_rounding,
    )

    def init_fn(params: optax.Params) -> PolyakOptimizerState:
        return PolyakOptimizerState(sam.init(params))

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, PolyakOptimizerState]:
        require_params(params, "polyak_sam")
        new: Any
        d, new = sam.update(updates, state.sharpness_state, params, **extra_args)
        decayed = _tree.at_least_float32(d)
        if weight_decay:
            decayed = _tree.add_scaled(decayed, weight_decay, params)
        step = new.descent_state.polyak_step
        update = _tree.cast_like(_tree.scale(-step, decayed), d)
        return update, PolyakOptimizerState(new)

    return sam, optax.GradientTransformationExtraArgs(init_fn, update_fn)
