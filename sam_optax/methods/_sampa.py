"""SAMPa: two gradients that do not wait for each other."""

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from sam_optax import _tree
from sam_optax._checks import (
    check_number,
    check_static_number,
    require_grad_fn,
    require_params,
)
from sam_optax._hyperparameters import ScalarOrSchedule, scheduled, unscheduled
from sam_optax._parts import Descent, chain
from sam_optax._rounding import round_to_nearest
from sam_optax._step import Options, sharpness_aware
from sam_optax.methods._msam import given_direction
from sam_optax.methods._record import record
from sam_optax.methods._sam import sam_ascent

GradFn = Callable[[Any], optax.Updates]


class LookaheadState(NamedTuple):
    """State of `mix_with_lookahead`."""

    lookahead_gradient: optax.Updates  # like the parameters, at least float32
    base_momentum: optax.Updates  # the same; empty without momentum
    has_looked_ahead: jax.Array  # shape=(), dtype=jnp.bool_


def mix_with_lookahead(
    learning_rate: ScalarOrSchedule = 0.1,
    lam: ScalarOrSchedule = 0.2,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    halves: str | None = None,
) -> Descent:
    r"""Mixes gᵃ with the gradient y at the point where the next step would end.

    .. math::
      y_t = \nabla L\big(w_t - \eta (y_{t-1} + \mu m_t + \lambda_w w_t)\big), \qquad
      d_t = (1 - \lambda) g^a_t + \lambda y_t, \qquad
      m_{t+1} = \mu m_t + d_t + \lambda_w w_t

    with y₋₁ = m₀ = 0. On the first step y is taken at w.

    Args:
      learning_rate, lam, momentum, weight_decay, halves: those of the method `sampa`.
        Default 0.1, 0.2, 0, 0 and None.

    Returns:
      A descent for `sharpness_aware`. It carries y, and m if there is a momentum, in at
      least float32, and hands y to the ascent as the extra argument
      `lookahead_gradient`. `optax.chain` around it would drop what it hands on: pass it
      as descent= itself.

    Raises:
      ValueError: if an argument is out of its range.
    """
    check_number("learning_rate", learning_rate, at_least=0)
    check_number("lam", lam, at_least=0, at_most=1)
    check_static_number("momentum", momentum, at_least=0, below=1)
    check_static_number("weight_decay", weight_decay, at_least=0)

    def init_fn(params: optax.Params) -> LookaheadState:
        base_momentum = _tree.zeros_like(params) if momentum else ()
        return LookaheadState(
            _tree.zeros_like(params), base_momentum, jnp.asarray(False)
        )

    def part(learning_rate, lam):
        def update_fn(
            updates: optax.Updates,
            state: Any,
            params: optax.Params | None = None,
            *,
            perturbation: Any = None,
            grad_fn: Any = None,
            ascent_grad_fn: Any = None,
            perturb: Callable[..., optax.Params] = round_to_nearest,
            **extra_args: Any,
        ) -> tuple[optax.Updates, LookaheadState]:
            del extra_args
            require_params(params, "mix_with_lookahead")
            require_grad_fn(ascent_grad_fn, "mix_with_lookahead")
            base = _base_gradient(state, params, momentum, weight_decay)
            step = jnp.where(state.has_looked_ahead, -learning_rate, 0)
            ahead = _tree.scale(step, base)
            if halves is None:
                y = _tree.at_least_float32(ascent_grad_fn(perturb(params, ahead)))
                # In this form d is exactly y where gᵃ = y.
                d = _tree.add_scaled(updates, lam, _tree.subtract(y, updates))
            else:
                _check_halves(halves, grad_fn, ascent_grad_fn)
                d, y = _side_by_side(
                    halves,
                    lam,
                    lambda displacement: grad_fn(perturb(params, displacement)),
                    perturbation,
                    ahead,
                )
            m = state.base_momentum
            if momentum:
                m = _tree.add_scaled(_tree.scale(momentum, m), 1, d)
                m = _tree.add_scaled(m, weight_decay, params)
            return d, LookaheadState(y, m, jnp.asarray(True))

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return Descent.of(
        scheduled(part, learning_rate=learning_rate, lam=lam),
        for_ascent=lambda state: {
            "lookahead_gradient": unscheduled(state).lookahead_gradient
        },
        # So that under groups y is not taken once more, on all examples.
        averages_state=True,
    )


def _base_gradient(
    state: LookaheadState, params: Any, momentum: float, weight_decay: float
) -> optax.Updates:
    """What SGD would follow if the next gradient were the last y."""
    base = state.lookahead_gradient
    if momentum:
        base = _tree.add_scaled(base, momentum, state.base_momentum)
    return _tree.add_scaled(base, weight_decay, params) if weight_decay else base


def _check_halves(halves: str, grad_fn: GradFn, ascent_grad_fn: GradFn) -> None:
    try:
        size = jax.lax.axis_size(halves)
    except NameError as error:
        raise ValueError(
            f"halves={halves!r} is not an axis of the pmap or shard_map that this runs "
            "in. Name the axis of length 2 that divides the devices, or leave halves= "
            "out to take one gradient after the other."
        ) from error
    if halves in getattr(grad_fn, "averaged_over", ()):
        raise ValueError(
            f"axis_name= averages the gradients over {halves!r}, the axis of halves=, "
            "along which they are to differ. Name the other axes alone, over which the "
            "batch is divided."
        )
    if size != 2:
        raise ValueError(
            f"halves= takes one gradient on each half of the devices, so the axis "
            f"{halves!r} must have the length 2; it has {size}."
        )
    if ascent_grad_fn is not grad_fn:
        raise ValueError(
            "halves= takes both gradients on the same examples and of the same loss: "
            "leave out ascent_batch=, ascent_loss_fn= and data=."
        )


def _side_by_side(
    axis: str,
    lam: Any,
    gradient_after: Callable[[optax.Updates], optax.Updates],
    perturbation: optax.Updates,
    ahead: optax.Updates,
) -> tuple[optax.Updates, optax.Updates]:
    """(d, y), where each half of the devices takes one of the two gradients."""
    is_second = jax.lax.axis_index(axis) == 1
    displacement = jax.tree.map(
        lambda e, a: jnp.where(is_second, a, e), perturbation, ahead
    )
    own = _tree.at_least_float32(gradient_after(displacement))
    d = _tree.scale(jnp.where(is_second, lam, 1 - lam), own)
    y = jax.tree.map(lambda x: jnp.where(is_second, x, 0), own)
    return jax.lax.psum((d, y), axis)


@record(
    title="SAMPa",
    equation="ε = ρ y/‖y‖, d = (1−λ) gᵃ + λ y⁺, y⁺ = ∇L(w − η y)",
    source="Xie 2024",
    url="https://arxiv.org/abs/2410.10683",
    cost="2, side by side, + a forward pass",
    gradients=2,
)
def sampa(
    rho: ScalarOrSchedule = 0.1,
    learning_rate: ScalarOrSchedule = 0.1,
    lam: ScalarOrSchedule = 0.2,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    halves: str | None = None,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Parallelised Sharpness-Aware Minimization (SAMPa).

    .. math::
      \varepsilon_t = \rho \frac{y_{t-1}}{\|y_{t-1}\|}, \qquad
      y_t = \nabla L(w_t - \eta\, y_{t-1}), \qquad
      d_t = (1 - \lambda) \nabla L(w_t + \varepsilon_t) + \lambda y_t

    with y₋₁ = 0. ε is made of the gradient that the last step took ahead of the
    parameters. So the two gradients of a step do not wait for each other, and two
    halves of the devices can take them at the same time.

    Args:
      rho: the radius ρ = ‖ε‖. Default 0.1, from the authors' code.
      learning_rate: η, the learning rate of the base optimizer: a number or the same
        schedule. It must be that of your optimizer, because y is to be the gradient
        where the next step ends. Default 0.1, from the authors' code.
      lam: λ in [0, 1], the share of y in d. Default 0.2, from the paper's experiments.
      momentum, weight_decay: those of an SGD as base optimizer, whose step the point
        ahead then follows: w − η (y + μ m + λ_w w). A momentum is carried once more
        here. Default 0, as in the paper's algorithm.
      halves: the name of an axis of length 2 of a `shard_map` or `pmap`. Devices at its
        index 0 take the gradient at w + ε, and those at index 1 the one ahead. The
        batch must be the same along it, and axis_name= must not name it. Default None:
        each device takes both, one after the other.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if a number is out of its range; from update, if halves is not an axis
        of length 2, or the two gradients have different examples.

    Examples:
      On f(w) = w² from w = 1, the first step is SGD's. At the second, y = 2, so
      w + ε = 0.8 + 0.5, and the point ahead is 0.8 − 0.1 · 2.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> sam = sam_optax.sampa(rho=0.5, learning_rate=0.1, lam=0.2)
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> w = jnp.array(1.0)
      >>> d, state = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
      >>> w = w - 0.1 * d
      >>> d, state = sam.update(grad_fn(w), state, w, grad_fn=grad_fn)
      >>> print(f"{d:.2f}")
      2.32

    References:
      Xie et al., `SAMPa: Sharpness-aware Minimization Parallelized
      <https://arxiv.org/abs/2410.10683>`_, NeurIPS 2024, Algorithm 1.

    Differences from the authors' code:
      1. There, the gradient at w + ε is that of the last batch, and y that of the
         current one. To do the same, without halves=, pass the last batch as the batch
         and the current one as ascent_batch=.
      2. Their point ahead contains momentum and decay, as here if you pass them. On the
         first step, and without momentum, theirs leaves out the decay. Here it is left
         out on the first step only.
      3. They recover y from d, and divide by λ. So λ = 0 is SGD there; here it is not.
      4. No epsilon is added to the norm. Theirs is 1e-12.

    Cost: 2 gradients a step, side by side with halves=, where a sum over the two halves
    exchanges two trees; a forward pass more if the loss or the auxiliary output at w is
    used. A step that does not ascend takes y all the same; its d is the plain gradient,
    and m is advanced with (1 − λ) g + λ y. With ascent_loss_fn=, y is the gradient of
    that loss, and so is a share λ of d. One tree is carried, and another with momentum,
    in at least float32.
    """
    descent = mix_with_lookahead(
        learning_rate,
        lam,
        momentum=momentum,
        weight_decay=weight_decay,
        halves=halves,
    )
    ascent = chain(given_direction("lookahead_gradient"), sam_ascent(rho))
    return sharpness_aware(ascent, descent=descent, **options)
