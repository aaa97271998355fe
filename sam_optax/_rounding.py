"""w + ε, in at least float32 until it is rounded to the dtype of w."""

from typing import Any

import jax
import jax.numpy as jnp

from sam_optax import _tree
from sam_optax._checks import warn
from sam_optax._masks import Mask, resolve_mask
from sam_optax._random import Key, key_stream
from sam_optax._sharding import layout_for_new


class Rounding:
    """How w + ε is rounded: to nearest, or stochastically with a key in the state."""

    def __init__(self, key: Key | None):
        self._keys = None if key is None else key_stream(key, "stochastic rounding")
        self._has_warned = False

    def init(self) -> Any:
        """The key data that the state carries; empty if there is no key."""
        return () if self._keys is None else self._keys.start()

    def advance(self, key_data: Any) -> Any:
        """The key data of the next step."""
        return () if self._keys is None else self._keys.next(key_data)[1]

    def perturb(
        self, params: Any, perturbation: Any, key_data: Any, group: Any = None
    ) -> Any:
        """w + ε in the dtype of w."""
        if self._keys is None:
            return round_to_nearest(params, perturbation)
        key, _ = self._keys.next(key_data, group)
        return round_stochastically(params, perturbation, key)

    def warn_of_lost_digits(self, params: Any, mask: Mask) -> None:
        """Warns, once, if a perturbed leaf has so coarse a dtype that ε can be lost."""
        if self._keys is not None or self._has_warned:
            return
        perturbed = jax.tree.map(lambda _: True, params)
        if mask is not None:
            perturbed = resolve_mask(mask, params)
        coarse = {
            jnp.result_type(w).name
            for w, is_perturbed in zip(
                jax.tree.leaves(params), jax.tree.leaves(perturbed), strict=True
            )
            if is_perturbed
            and _tree.is_inexact(w)
            and jnp.finfo(jnp.result_type(w)).nmant < jnp.finfo(jnp.float32).nmant
        }
        if not coarse:
            return
        self._has_warned = True
        warn(
            f"Some perturbed parameters are {' and '.join(sorted(coarse))}: rounding "
            "w + ε to them can swallow the whole perturbation, which silently turns "
            "SAM into its base optimizer. Keep the parameters in float32 and compute "
            "in half precision, or pass stochastic_rounding= (a random key)."
        )


def _sum(w: Any, e: Any) -> jax.Array:
    """w + ε in the wider dtype of the two, and at least in float32."""
    w, e = _tree.at_least_float32((w, e))
    dtype = _tree.widest(w.dtype, e.dtype)
    return w.astype(dtype) + e.astype(dtype)


def round_to_nearest(params: Any, perturbation: Any) -> Any:
    return jax.tree.map(
        lambda w, e: _sum(w, e).astype(jnp.result_type(w)), params, perturbation
    )


def round_stochastically(params: Any, perturbation: Any, key: jax.Array) -> Any:
    """w + ε, with half-precision leaves rounded up or down at random, unbiased."""
    leaves, structure = jax.tree.flatten(params)
    shifts = structure.flatten_up_to(perturbation)
    rounded = [
        round_at_random(_sum(w, e), jnp.result_type(w), jax.random.fold_in(key, index))
        for index, (w, e) in enumerate(zip(leaves, shifts, strict=True))
    ]
    return structure.unflatten(rounded)


def round_at_random(x: jax.Array, dtype: Any, key: jax.Array) -> jax.Array:
    """x, up or down to a neighbour in the dtype, so that x is the expectation."""
    nearest = x.astype(dtype)
    if nearest.dtype == x.dtype:
        return nearest
    error = x - nearest.astype(x.dtype)
    towards = jnp.where(error < 0, -jnp.inf, jnp.inf).astype(dtype)
    neighbour = jnp.nextafter(nearest, towards)
    gap = neighbour.astype(x.dtype) - nearest.astype(x.dtype)
    # The neighbour is taken with probability error / gap.
    drawn = jax.random.uniform(key, x.shape, x.dtype, out_sharding=layout_for_new(x))
    to_neighbour = drawn * jnp.abs(gap) < jnp.abs(error)
    return jnp.where(to_neighbour, neighbour, nearest)
