"""w + ε, in at least float32 until it is rounded to the dtype of w."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp

from sam_optax import _tree


def _sum(w: Any, e: Any) -> jax.Array:
    """w + ε in the wider dtype of the two, and at least in float32."""
    w, e = _tree.at_least_float32((w, e))
    dtype = _tree.widest(w.dtype, e.dtype)
    return w.astype(dtype) + e.astype(dtype)


def round_to_nearest(params: Any, perturbation: Any) -> Any:
    return jax.tree.map(
        lambda w, e: _sum(w, e).astype(jnp.result_type(w)), params, perturbation
    )


# Folded into the key, so that a part with the same key, as by default, draws others.
_OF_ROUNDING = 0x5A3


def round_stochastically(params: Any, perturbation: Any, key: jax.Array) -> Any:
    """w + ε, where half-precision leaves round up or down with unbiased chance."""
    key = jax.random.fold_in(key, _OF_ROUNDING)
    leaves, structure = jax.tree.flatten(params)
    shifts = structure.flatten_up_to(perturbation)
    rounded = [
        _stochastic(_sum(w, e), jnp.result_type(w), jax.random.fold_in(key, index))
        for index, (w, e) in enumerate(zip(leaves, shifts, strict=True))
    ]
    return structure.unflatten(rounded)


def _stochastic(x: jax.Array, dtype: Any, key: jax.Array) -> jax.Array:
    nearest = x.astype(dtype)
    if nearest.dtype == x.dtype:
        return nearest
    error = x - nearest.astype(x.dtype)
    towards = jnp.where(error < 0, -jnp.inf, jnp.inf).astype(dtype)
    neighbour = jnp.nextafter(nearest, towards)
    gap = neighbour.astype(x.dtype) - nearest.astype(x.dtype)
    # error / gap is the chance of the neighbour that makes the expectation x.
    to_neighbour = jax.random.uniform(key, x.shape, x.dtype) * jnp.abs(gap) < jnp.abs(
        error
    )
    return jnp.where(to_neighbour, neighbour, nearest)


def warn_of_lost_digits(params: Any, perturbed: Any) -> bool:
    """Warns, and says so, if a perturbed leaf is too coarse for a usual ε."""
    coarse = {
        jnp.result_type(w).name
        for w, is_perturbed in zip(
            jax.tree.leaves(params), jax.tree.leaves(perturbed), strict=True
        )
        if is_perturbed
        and _tree.is_inexact(w)
        and jnp.finfo(jnp.result_type(w)).nmant < jnp.finfo(jnp.float32).nmant
    }
    if coarse:
        warnings.warn(
            f"Some perturbed parameters are {' and '.join(sorted(coarse))}: rounding "
            "w + ε to them can swallow the whole perturbation, which silently turns "
            "SAM into its base optimizer. Keep the parameters in float32 and compute "
            "in half precision, or pass stochastic_rounding= (a random key).",
            stacklevel=3,
        )
    return bool(coarse)
