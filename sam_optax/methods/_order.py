"""Which entries are large, by counting: nothing is sorted, and no entry moves."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sam_optax import _sharding as sharding


class Count(NamedTuple):
    """A number of entries, high · 2³² + low.

    A large model has more entries than fit in 32 bits, and JAX has no 64 by default.
    """

    high: jax.Array  # shape=(), dtype=jnp.uint32
    low: jax.Array  # shape=(), dtype=jnp.uint32

    @classmethod
    def of(cls, number: int | jax.Array) -> "Count":
        """The count of an int, of a uint32, or of a float that is a whole number."""
        if isinstance(number, int):
            high, low = divmod(number, 2**32)
            return cls(jnp.uint32(high), jnp.uint32(low))
        if jnp.issubdtype(number.dtype, jnp.floating):
            high = jnp.floor(number / 2.0**32)
            low = number - high * 2.0**32  # exact: the factor is a power of two
            return cls(high.astype(jnp.uint32), low.astype(jnp.uint32))
        return cls(jnp.zeros_like(number), number)

    def plus(self, other: "Count") -> "Count":
        low = self.low + other.low
        carry = (low < other.low).astype(jnp.uint32)
        return Count(self.high + other.high + carry, low)

    def minus(self, other: "Count") -> "Count":
        """The difference; `other` must not be larger."""
        borrow = (self.low < other.low).astype(jnp.uint32)
        return Count(self.high - other.high - borrow, self.low - other.low)

    def at_least(self, other: "Count") -> jax.Array:
        same_high = self.high == other.high
        return (self.high > other.high) | (same_high & (self.low >= other.low))

    def smaller(self, other: "Count") -> "Count":
        is_larger = self.at_least(other)
        pairs = zip(other, self, strict=True)
        return Count(*(jnp.where(is_larger, theirs, own) for theirs, own in pairs))


def count_true(conditions: Sequence[jax.Array]) -> Count:
    """How many entries of these arrays are True."""
    return functools.reduce(Count.plus, [Count.of(sum_true(c)) for c in conditions])


def sum_true(condition: jax.Array) -> jax.Array:
    return jnp.sum(condition, dtype=jnp.uint32)


def check_countable(leaf: jax.Array) -> None:
    if leaf.size > 2**32 - 1:
        raise ValueError(
            "A sparse perturbation counts the entries of an array with 32 bits, so it "
            "can choose among 4,294,967,295 of them, and there is an array of "
            f"{leaf.size:,}. Split it, or leave it out by mask=."
        )


def ranks_of(scores: jax.Array) -> jax.Array:
    """Unsigned integers >= 1 in the order of the scores, which must not be negative."""
    unsigned = jnp.dtype(f"uint{8 * scores.dtype.itemsize}")
    # Non-negative floats sort like their bit patterns.
    return jax.lax.bitcast_convert_type(scores, unsigned) + 1


def greatest(is_true: Callable[[jax.Array], jax.Array], zero: jax.Array) -> jax.Array:
    """The greatest unsigned integers up to which a monotone predicate holds.

    The predicate is called once per bit. `zero` says which integer type is meant and
    how many integers are found side by side, and must vary over the mesh axes over
    which the result does.
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
    check_countable(scores)
    ranks = ranks_of(scores)
    # As a float, because the size of a large leaf is no int32.
    below = jnp.floor(quantile * float(scores.size - 1)).astype(jnp.uint32)
    wanted = jnp.uint32(scores.size) - below

    def is_low_enough(threshold):
        return sum_true(ranks >= threshold) >= wanted

    zero = sharding.vary_like(jnp.zeros((), ranks.dtype), ranks)
    return ranks > greatest(is_low_enough, zero)
