"""Means of random samples, with their standard errors."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sam_optax._checks import check_positive_integer
from sam_optax.sharpness._printing import describe


class Estimate(NamedTuple):
    """A mean of random samples.

    Attributes:
      mean: the mean of the samples.
      standard_error: the standard deviation of the samples, divided by the square root
        of their number. With many samples, the true mean is within two standard errors
        of this one with a probability of about 95 %.
    """

    mean: jax.Array  # shape=(), at least float32
    standard_error: jax.Array  # shape=(), at least float32

    def __repr__(self) -> str:
        return describe("Estimate", self._asdict())


def check_at_least_two(name: str, count: Any) -> None:
    check_positive_integer(name, count)
    if count < 2:
        raise ValueError(f"{name} must be at least 2, for a standard error; got 1.")


def estimate_over_keys(
    sample: Callable[[jax.Array], jax.Array], key: jax.Array, count: int
) -> Estimate:
    """The mean and standard error of sample(key) over `count` keys, one at a time."""
    values = jax.lax.map(sample, jax.random.split(key, count))
    # The squares of very large or small samples would overflow or underflow. A power of
    # two loses no digits.
    _, exponent = jnp.frexp(jnp.max(jnp.abs(values)))
    exponent = jnp.where(jnp.isfinite(values).all(), exponent, 0)
    scaled = jnp.ldexp(values, -exponent)
    error = scaled.std(ddof=1) / jnp.sqrt(count)
    return Estimate(jnp.ldexp(scaled.mean(), exponent), jnp.ldexp(error, exponent))
