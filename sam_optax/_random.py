"""Random keys inside optimizer state, stored as plain uint32 key data.

Typed keys break `flax.serialization`, `np.asarray` and casts of a whole state, so the
state holds the data and the implementation is kept beside it, statically.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Key = int | jax.Array


class KeyStream(NamedTuple):
    """A starting key, and how to use what is stored of it."""

    start: Callable[[], jax.Array]  # () -> key data, a new buffer each time
    next: Callable[..., tuple[jax.Array, jax.Array]]  # data, group -> (key, data)


def typed_key(key: Key) -> jax.Array:
    """A single typed key from an int, a typed key or a legacy uint32 key."""
    if isinstance(key, bool) or not (isinstance(key, int) or hasattr(key, "dtype")):
        raise TypeError(f"key must be an int or a JAX random key, got {key!r}.")
    typed = jnp.asarray(key)
    if jnp.issubdtype(typed.dtype, jnp.integer):
        typed = jax.random.wrap_key_data(typed) if typed.ndim else jax.random.key(typed)
    if typed.shape != ():
        raise ValueError(f"key must be a single key, got keys of shape {typed.shape}.")
    return typed


def key_stream(key: Key) -> KeyStream:
    """A stream of keys, from whatever names the first."""
    typed = typed_key(key)
    implementation = jax.random.key_impl(typed)
    data = jax.random.key_data(typed)

    def next_key(data, group=None):
        now, later = jax.random.split(
            jax.random.wrap_key_data(data, impl=implementation)
        )
        if group is not None:
            now = jax.random.fold_in(now, group)
        return now, jax.random.key_data(later)

    # A copy, so that a donated state never takes the key of the next one with it.
    return KeyStream(start=lambda: jnp.array(data, copy=True), next=next_key)
