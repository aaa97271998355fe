"""Which entries are large, by counting: nothing is sorted, and no entry moves."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def ranks_of(scores: jax.Array) -> jax.Array:
    """Unsigned integers >= 1 in the order of the scores, which must not be negative."""
    unsigned = jnp.dtype(f"uint{8 * scores.dtype.itemsize}")
    # Non-negative floats sort like their bit patterns.
    return jax.lax.bitcast_convert_type(scores, unsigned) + 1


def greatest(is_true: Callable[[jax.Array], jax.Array], zero: jax.Array) -> jax.Array:
    """The greatest unsigned integer up to which a monotone predicate holds.

    The predicate is called once per bit. `zero` says which integer type is meant, and
    must vary over the mesh axes over which the result does.
    """
    bits = 8 * zero.dtype.itemsize

    def set_bit(i, found):
        bit = jnp.ones((), zero.dtype) << (bits - 1 - i).astype(zero.dtype)
        candidate = found | bit
        return jnp.where(is_true(candidate), candidate, found)

    return jax.lax.fori_loop(0, bits, set_bit, zero)


def above_quantile(scores: jax.Array, quantile: jax.Array) -> jax.Array:
    """Where the scores, which must not be negative, are above a quantile of them.

    The quantile lies between two scores that follow each other in their order, or is
    the lower one, so the scores above it are those above the lower one.
    """
    ranks = ranks_of(scores)
    # As a float, because the size of a large leaf is no int32.
    below = jnp.floor(quantile * float(scores.size - 1)).astype(jnp.uint32)
    wanted = jnp.uint32(scores.size) - below

    def is_low_enough(threshold):
        return jnp.sum(ranks >= threshold, dtype=jnp.uint32) >= wanted

    zero = (0 * jnp.sum(ranks > 0, dtype=jnp.uint32)).astype(ranks.dtype)
    return ranks > greatest(is_low_enough, zero)
