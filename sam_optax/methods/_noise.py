"""Parts that draw random numbers: their state, and how to make one."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

from sam_optax import _tree
from sam_optax._random import Key, key_stream


class NoiseState(NamedTuple):
    """State of the parts that draw random numbers."""

    noise_key: jax.Array  # key data, dtype=jnp.uint32


def noisy(
    key: Key,
    function: Callable[[jax.Array, optax.Updates], optax.Updates],
    *,
    name: str,
) -> optax.GradientTransformationExtraArgs:
    """A part from a function (key, updates) -> updates, with a new key on every step.

    The name of the part and the index of the group are folded into the key, so that
    every part and every group of examples draws its own numbers.
    """
    keys = key_stream(key, name)

    def update_fn(updates, state, params=None, *, group=None, **extra_args):
        del params, extra_args
        now, later = keys.next(state.noise_key, group)
        return function(now, _tree.at_least_float32(updates)), NoiseState(later)

    return optax.GradientTransformationExtraArgs(
        lambda params: NoiseState(keys.start()), update_fn
    )
