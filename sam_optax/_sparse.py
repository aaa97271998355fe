"""Parts of the ascent axis that perturb a carried fraction of the entries (SSAM)."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax import _tree
from sam_optax._hyperparameters import (
    ScalarOrSchedule,
    check_number,
    check_static_integer,
    check_static_number,
    value_at,
)
from sam_optax._random import Key, key_stream


class SparseState(NamedTuple):
    """State of the parts with a carried mask."""

    mask_step: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32
    mask_key: jax.Array  # key data, dtype=jnp.uint32
    perturbed: Any  # like the parameters, dtype=jnp.bool_


def _keep_largest(scores: Any, count: Any, among: Any = None) -> Any:
    """A mask that is True for exactly `count` entries, those of the largest scores.

    Of equal scores, the earlier ones are kept. No entry leaves its device and nothing
    is sorted: the threshold is found by counting, once per bit. Scores must not be
    negative; `among` is a mask of the entries to choose from.
    """
    leaves, structure = jax.tree.flatten(scores)
    if not leaves:  # also what optax.tree.map_params puts in place of the parameters
        return scores
    dtype = _tree.widest(*[x.dtype for x in leaves])
    unsigned = jnp.dtype(f"uint{8 * dtype.itemsize}")
    # The bits of non-negative floats are ordered as they are. 0 is who is not eligible.
    ranks = [
        jax.lax.bitcast_convert_type(x.astype(dtype), unsigned) + 1 for x in leaves
    ]
    if among is not None:
        eligible = jax.tree.leaves(among)
        ranks = [jnp.where(e, r, 0) for e, r in zip(eligible, ranks, strict=True)]

    def number(conditions):
        counts = [jnp.sum(c, dtype=jnp.uint32) for c in conditions]
        return functools.reduce(jnp.add, counts)

    def is_low_enough(threshold):
        return number([r >= threshold for r in ranks]) >= count

    zero = 0 * number([r > 0 for r in ranks])  # on the mesh axes that the scores are on
    threshold = _greatest(is_low_enough, zero.astype(unsigned))
    ties = [r == threshold for r in ranks]
    room = jnp.asarray(count, jnp.uint32) - number([r > threshold for r in ranks])
    positions, start = [], 0
    for leaf in leaves:
        own = jax.lax.iota(jnp.uint32, leaf.size).reshape(leaf.shape)
        positions.append(own + jnp.uint32(start))
        start += leaf.size

    def before(position):
        pairs = zip(ties, positions, strict=True)
        return [t & (p < position) for t, p in pairs]

    end = _greatest(lambda position: number(before(position)) <= room, zero)
    kept = [
        (r > threshold) | first for r, first in zip(ranks, before(end), strict=True)
    ]
    return jax.tree.unflatten(structure, kept)


def _greatest(is_true: Callable[[jax.Array], jax.Array], zero: jax.Array) -> jax.Array:
    """The greatest unsigned integer for which a predicate holds that holds up to it."""
    bits = 8 * zero.dtype.itemsize

    def set_bit(i, found):
        bit = jnp.ones((), zero.dtype) << (bits - 1 - i).astype(zero.dtype)
        candidate = found | bit
        return jnp.where(is_true(candidate), candidate, found)

    return jax.lax.fori_loop(0, bits, set_bit, zero)


def _masked_by(
    refresh: Callable[..., Any], sparsity: float, every: int, key: Key
) -> optax.GradientTransformationExtraArgs:
    """Masks the updates by a carried mask, which `refresh` renews now and then.

    refresh: (key, step, mask, |g|, number to keep) -> mask.
    """
    check_static_number("sparsity", sparsity, at_least=0, below=1)
    check_static_integer("refresh_every", every)
    keys = key_stream(key)

    def kept(size):
        return max(round((1 - sparsity) * size), 1)

    def init_fn(params):
        scores = _tree.uniform_like(keys.next(keys.start())[0], params)
        mask = _keep_largest(scores, kept(_tree.size(params)))
        # Laid out as the parameters are, also where that is part of an array's type.
        mask = jax.tree.map(lambda keep, w: keep & ~(abs(w) < 0), mask, params)
        return SparseState(jnp.zeros((), jnp.int32), keys.start(), mask)

    def update_fn(updates, state, params=None, *, ascent_gradient=None, **extra_args):
        del params, extra_args
        step, key_data, mask = state
        now, later = keys.next(key_data)
        g = updates if ascent_gradient is None else ascent_gradient

        def renewed():
            return refresh(now, step, mask, _tree.magnitude(g), kept(_tree.size(g)))

        def as_before():
            # Both branches must vary over the same mesh axes, those of g.
            never = _tree.squared_norm(g) < 0
            return jax.tree.map(lambda keep: keep | never, mask)

        mask = jax.lax.cond(step % every == 0, renewed, as_before)
        updates = jax.tree.map(
            lambda u, keep: jnp.where(keep, u, 0 * u),
            _tree.at_least_float32(updates),
            mask,
        )
        return updates, SparseState(optax.safe_increment(step), later, mask)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def keep_largest_fisher(
    sparsity: float = 0.5, *, refresh_every: int = 100
) -> optax.GradientTransformationExtraArgs:
    """Zeroes all but the entries with the largest squared gradient, as SSAM-F does.

    Args:
      sparsity: fraction s in [0, 1) of the entries that are zeroed. Default 0.5, from
        the paper.
      refresh_every: the mask is renewed from g² on steps 0, k, 2k, ... Default 100.

    Returns:
      A transformation that carries the mask. It takes g from the extra argument
      `ascent_gradient=`, or from its input without one.

    Raises:
      ValueError: if sparsity is outside [0, 1), or refresh_every no positive integer.
    """

    def refresh(key, step, mask, magnitudes, kept):
        del key, step, mask
        return _keep_largest(magnitudes, kept)

    return _masked_by(refresh, sparsity, refresh_every, key=0)


def drop_and_grow(
    sparsity: float = 0.5,
    drop: ScalarOrSchedule = 0.5,
    *,
    refresh_every: int = 100,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    """Zeroes all but a mask that changes by dynamic sparse training, as SSAM-D does.

    On a refresh, the share `drop` of the kept entries with the smallest gradient leaves
    the mask, and as many others, drawn at random, enter it. The first mask is random.

    Args:
      sparsity: fraction s in [0, 1) of the entries that are zeroed. Default 0.5, from
        the paper.
      drop: share of the kept entries that is exchanged, a number from 0 to 1 or a
        schedule of the step (the paper lets it decay along a cosine). Default 0.5.
      refresh_every: the mask changes on steps 0, k, 2k, ... Default 100.
      key: an int, a typed key or a legacy one. Default 0.

    Returns:
      A transformation that carries the mask and a key.

    Raises:
      ValueError: if sparsity is outside [0, 1), drop outside [0, 1], or refresh_every
        no positive integer.
    """
    check_number("drop", drop, at_least=0, at_most=1)

    def refresh(key, step, mask, magnitudes, kept):
        exchanged = jnp.round(jnp.asarray(value_at(drop, step)) * kept)
        exchanged = jnp.minimum(exchanged, _tree.size(mask) - kept).astype(jnp.int32)
        stays = _keep_largest(magnitudes, kept - exchanged, among=mask)
        outside = jax.tree.map(jnp.logical_not, mask)
        chance = _tree.uniform_like(key, magnitudes)
        enters = _keep_largest(chance, exchanged, among=outside)
        return jax.tree.map(jnp.logical_or, stays, enters)

    return _masked_by(refresh, sparsity, refresh_every, key)
