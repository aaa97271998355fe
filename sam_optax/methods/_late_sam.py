"""SAM for the last part of a training only."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sam_optax._checks import is_integer
from sam_optax._step import Cadence


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

    def decide(g, state):
        del g
        step = state.cadence_step
        is_late = step >= jnp.asarray(start, jnp.int32)
        return is_late, AfterState(optax.safe_increment(step))

    return Cadence(
        init=lambda params: AfterState(jnp.zeros((), jnp.int32)), decide=decide
    )


def _check_start(start: int | jax.Array) -> None:
    if isinstance(start, (jax.Array, np.ndarray)) and jnp.ndim(start) == 0:
        return
    if not is_integer(start):
        raise TypeError(
            "start must be the number of a step: an integer >= 0, or a scalar array; "
            f"got {start!r}."
        )
    if start < 0:
        raise ValueError(f"start must be >= 0, got {start}.")
