"""How data rules count and choose examples."""

import jax

from sam_optax import _sharding
from sam_optax._checks import check_static_number


def largest(values: jax.Array, count: int) -> jax.Array:
    """The indices of the largest values."""
    return jax.lax.top_k(_sharding.replicate(values), count)[1]


def check_fraction(name: str, fraction: float) -> None:
    check_static_number(name, fraction, above=0, at_most=1)


def count_of(fraction: float, size: int) -> int:
    # The product is rounded up a little first: 0.29 · 100 is 28.999... in floats.
    return int(fraction * size * (1 + 1e-9))


def check_count(name: str, count: int, size: int) -> None:
    if count < 1:
        raise ValueError(
            f"{name} is so small that it selects none of the {size} examples."
        )
