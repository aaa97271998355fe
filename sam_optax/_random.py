"""Random keys inside optimizer state, stored as plain uint32 key data.

`flax.serialization`, `np.asarray` and casts of a whole state fail on typed keys. So the
state holds only the data of a key, and the transformation remembers its implementation.
"""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Key = int | jax.Array


class KeyStream(NamedTuple):
    """A starting key, and how to draw keys from the key data that the state holds."""

    start: Callable[[], jax.Array]  # () -> key data, a new buffer each time
    next: Callable[..., tuple[jax.Array, jax.Array]]  # data, group -> (key, data)


def typed_key(key: Key) -> jax.Array:
    """A single typed key from an int, a typed key or a legacy uint32 key."""
    _check_type(key)
    if isinstance(key, int):
        return jax.random.key(key)
    typed = jnp.asarray(key)
    if jnp.issubdtype(typed.dtype, jnp.integer):
        typed = jax.random.wrap_key_data(typed) if typed.ndim else jax.random.key(typed)
    if typed.shape != ():
        raise ValueError(f"key must be a single key, got keys of shape {typed.shape}.")
    return typed


def _check_type(key: Key) -> None:
    if isinstance(key, bool) or not (isinstance(key, int) or hasattr(key, "dtype")):
        raise TypeError(f"key must be an int or a JAX random key, got {key!r}.")


def key_stream(key: Key, part: str) -> KeyStream:
    """A stream of keys for one part of a method.

    It starts at an int, a typed key or a legacy one. The name of the part is folded
    into every key. Otherwise two parts that are given the same key, as by default,
    would draw the same numbers.

    An int becomes a key only when a state is made. Building a method must not make a
    key: a key is an array, making an array starts the devices, and
    `jax.distributed.initialize` has to be called before that.
    """
    _check_type(key)
    implementation = (
        None if isinstance(key, int) else jax.random.key_impl(typed_key(key))
    )

    of_part = zlib.crc32(part.encode())

    def start():
        # A copy, so that donating one state does not delete the key of the next.
        return jnp.array(jax.random.key_data(typed_key(key)), copy=True)

    def next_key(data, group=None):
        now, later = jax.random.split(
            jax.random.wrap_key_data(data, impl=implementation)
        )
        now = jax.random.fold_in(now, of_part)
        if group is not None:
            now = jax.random.fold_in(now, group)
        return now, jax.random.key_data(later)

    return KeyStream(start=start, next=next_key)
