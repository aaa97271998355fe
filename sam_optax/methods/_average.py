"""The moving average of the gradient that F-SAM, VaSSO and SAM-full carry."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax import _tree


class EmaState(NamedTuple):
    """State of the parts that average the gradient."""

    gradient_ema: optax.Updates  # like the parameters, at least float32
    ema_started: jax.Array  # shape=(), dtype=jnp.bool_


def start_ema(params: optax.Params) -> EmaState:
    return EmaState(_tree.zeros_like(params), jnp.zeros((), jnp.bool_))


def advance_ema(
    state: EmaState,
    innovation: optax.Updates,
    step: float | jax.Array,
    starts_at_first: bool,
) -> EmaState:
    """The next average, m + step · innovation, where the innovation is g − m.

    With `starts_at_first`, the first average is g itself.
    """
    if starts_at_first:
        step = jnp.where(state.ema_started, step, 1)
    m = _tree.add_scaled(state.gradient_ema, step, innovation)
    return EmaState(m, jnp.ones((), jnp.bool_))
