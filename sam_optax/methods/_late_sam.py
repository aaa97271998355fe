"""SAM for the last part of a training only."""

import math
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sam_optax._checks import check_number, check_static_integer, is_integer
from sam_optax._hyperparameters import ScalarOrSchedule, nan_if_negative, value_at
from sam_optax._parts import Cadence
from sam_optax._step import Options, sharpness_aware
from sam_optax.methods._record import record
from sam_optax.methods._sam import sam_ascent


class AfterState(NamedTuple):
    """State of `after`."""

    cadence_step: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32


def after(start: int | jax.Array) -> Cadence:
    """Takes the second gradient from step `start` on; before that, d = g.

    Args:
      start: the first step that takes it, counted from 0: an integer >= 0, or a scalar
        array, which may be traced. With 0, every step takes it.

    Returns:
      A cadence that counts the steps in its state, so a training that is resumed from a
      checkpoint goes on where it was. The compiled program makes the decision, so the
      second gradient is inside a `lax.cond`. To compile one program for each part of
      the training instead, pass `ascend=step >= start` as a Python bool. The program of
      the first part is then that of the base optimizer.

    Raises:
      ValueError: if start is a negative Python number.
      TypeError: if start is neither an integer nor a scalar array.

    Examples:
      On f(w) = w² from w = 1, the first step is SGD's, 1 − 0.1 · 2, and the second one
      SAM's, 0.8 − 0.1 · 2 · (0.8 + 0.5).

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> from sam_optax import ascents, cadences
      >>> sam = sam_optax.sharpness_aware(
      ...     ascents.sam(rho=0.5), cadence=cadences.after(1))
      >>> tx = optax.chain(sam, optax.sgd(0.1))
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> w = jnp.array(1.0)
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
      ...     w = optax.apply_updates(w, updates)
      ...     print(f"{w:.2f}")
      0.80
      0.54
    """
    _check_start(start)
    start = _at_most_int32(start)

    def decide(g, state):
        del g
        step = state.cadence_step
        is_late = step >= jnp.asarray(start, jnp.int32)
        return is_late, AfterState(optax.safe_increment(step))

    return Cadence(
        init=lambda params: AfterState(jnp.zeros((), jnp.int32)), decide=decide
    )


def _at_most_int32(start: int | jax.Array) -> int | jax.Array:
    """The start, or a step that is never reached in place of one beyond int32."""
    last = np.iinfo(np.int32).max
    if isinstance(start, (int, np.integer, np.ndarray)):
        return min(int(start), last)
    if jnp.iinfo(start.dtype).max > last:
        start = jnp.minimum(start, last)
    return start.astype(jnp.int32)


def _check_start(start: int | jax.Array) -> None:
    is_scalar = isinstance(start, (jax.Array, np.ndarray)) and jnp.ndim(start) == 0
    if is_scalar and jnp.issubdtype(jnp.result_type(start), jnp.integer):
        return
    if not is_integer(start):
        raise TypeError(
            "start must be the number of a step: an integer >= 0, or a scalar array; "
            f"got {start!r}."
        )
    if start < 0:
        raise ValueError(f"start must be >= 0, got {start}.")


def ramped(
    rho: ScalarOrSchedule, start: int | jax.Array, ramp_steps: int
) -> ScalarOrSchedule:
    """ρ that rises in a line over the steps from `start` on; without steps, ρ itself.

    The first of these steps has ρ/ramp_steps, and the last one the whole ρ.
    """
    check_number("rho", rho, at_least=0)
    check_static_integer("ramp_steps", ramp_steps, at_least=0)
    if ramp_steps == 0:
        return rho
    first = _at_most_int32(start)

    def schedule(step):
        steps = jnp.asarray(step - first + 1, jnp.result_type(float))
        share = jnp.clip(steps / ramp_steps, 0, 1)
        return nan_if_negative(value_at(rho, step)) * share

    return schedule


@record(
    title="SAM late in training",
    equation="d = g before step `start`, then `sam`",
    source="Zhou 2025",
    url="https://arxiv.org/abs/2410.10373",
    gradients=lambda start: 2.0 if is_integer(start) and start == 0 else math.nan,
    cost="1 before `start`, then 2",
)
def late_sam(
    rho: ScalarOrSchedule = 0.05,
    start: int | jax.Array = 0,
    *,
    ramp_steps: int = 0,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""SAM for the last part of a training, and the base optimizer before.

    .. math::
      d_t = g_t \quad (t < t_0), \qquad
      d_t = \nabla L\Big(w_t + \rho_t \frac{g_t}{\|g_t\|}\Big) \quad (t \ge t_0)

    Args:
      rho: the radius ρ = ‖ε‖, as for `sam`. Default 0.05, that of `sam`. A schedule
        counts the steps from the start of the training.
      start: the first step t₀ that takes the second gradient, counted from 0: an
        integer >= 0, or a scalar array. Default 0: all steps take it. Zhou et al. find
        that the last few epochs are enough.
      ramp_steps: over how many steps ρ rises, ρₜ = ρ (t − t₀ + 1)/ramp_steps up to ρ.
        Default 0: none.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`. It
      counts the steps in its state, so the second gradient is inside a `lax.cond`. To
      compile a program for each part of the training instead, pass
      `ascend=step >= start` as a Python bool: before `start`, the program is that of
      the base optimizer.

    Raises:
      ValueError: if rho < 0, start < 0 or ramp_steps < 0.
      TypeError: if start is neither an integer nor a scalar array.

    Examples:
      On f(w) = w² from w = 1, the first step is SGD's, 1 − 0.1 · 2, and the second one
      SAM's, 0.8 − 0.1 · 2 · (0.8 + 0.5). Here each part has its own program.

      >>> import functools, jax, jax.numpy as jnp, optax, sam_optax
      >>> start = 1
      >>> sam = sam_optax.late_sam(rho=0.5, start=start)
      >>> tx = optax.chain(sam, optax.sgd(0.1))
      >>> loss_and_grads = sam_optax.sam_value_and_grad(lambda w: w**2, sam)
      >>> @functools.partial(jax.jit, static_argnames="ascend")
      ... def train_step(w, opt_state, ascend):
      ...     loss, grads = loss_and_grads(w, opt_state=opt_state, ascend=ascend)
      ...     updates, opt_state = tx.update(grads, opt_state, w)
      ...     return optax.apply_updates(w, updates), opt_state
      >>> w = jnp.array(1.0)
      >>> opt_state = tx.init(w)
      >>> for step in range(2):
      ...     w, opt_state = train_step(w, opt_state, ascend=step >= start)
      ...     print(f"{w:.2f}")
      0.80
      0.54

    References:
      Zhou et al., `Sharpness-Aware Minimization Efficiently Selects Flatter Minima Late
      in Training <https://arxiv.org/abs/2410.10373>`_, ICLR 2025. The ramp is that of
      the package temperon.

    Differences from the package temperon 0.1.1: it is given the share of the steps that
    take SAM, and their number, and rounds the first of them half to even. No epsilon is
    added to the norm. Its epsilon is 1e-12.

    Cost: 1 gradient a step before `start`, 2 from then on; no tree is carried.
    """
    ascent = sam_ascent(ramped(rho, start, ramp_steps))
    return sharpness_aware(ascent, cadence=after(start), **options)
