"""The carried state of an ascent in a narrower dtype, for large models."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax._checks import check_transformation, require_params
from sam_optax._parts import Ascent, as_ascent, follow
from sam_optax._random import Key, key_stream
from sam_optax._rounding import round_at_random


class NarrowState(NamedTuple):
    """State of `with_state_dtype`."""

    narrow_key: jax.Array  # key data, shape=(2,), dtype=jnp.uint32 for default keys
    narrow_state: optax.OptState  # that of the ascent, its arrays in the dtype


def with_state_dtype(
    ascent: optax.GradientTransformation, dtype: Any = jnp.bfloat16, *, key: Key = 0
) -> Ascent:
    """Keeps what an ascent carries in a narrower dtype, rounded without bias.

    An average of the gradient, as F-SAM and VaSSO carry it, is a copy of the
    parameters in float32. In bfloat16 it takes half of that. To the nearest bfloat16,
    an average with a decay near 1 would stand still, because each step changes it by
    less than the distance of two such numbers. So it is rounded up or down at random,
    with probabilities that keep its mean.

    Args:
      ascent: any ascent, or a part of one.
      dtype: a floating-point dtype. Default bfloat16, which has float32's range.
      key: a key for the rounding (int, typed or legacy). Default 0.

    Returns:
      An ascent that computes as before, in at least float32, and carries its
      floating-point arrays in the dtype. Numbers without a shape, integers, keys, and
      arrays that are no wider than the dtype stay as they are.

    Raises:
      TypeError: if the dtype is not a floating-point one, or the key is not a key.
      ValueError: from `update`, if params are missing.

    Examples:
      >>> import jax.numpy as jnp, sam_optax
      >>> from sam_optax import ascents
      >>> fsam = ascents.with_state_dtype(ascents.fsam(rho=0.05))
      >>> sam = sam_optax.sharpness_aware(fsam)
      >>> state = sam.init(jnp.ones(3))
      >>> print(state.ascent_state.narrow_state[0].gradient_ema)
      [0 0 0]
      >>> print(state.ascent_state.narrow_state[0].gradient_ema.dtype)
      bfloat16

    Cost: a random number for each number that is carried, and two with an ascent that
    follows d, such as `msam`.
    """
    check_transformation("ascent", ascent)
    inner = as_ascent(ascent)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype!r}.")
    narrow_dtype = jnp.dtype(dtype)
    keys = key_stream(key, "with_state_dtype")

    largest = jnp.finfo(narrow_dtype).max

    def is_narrowed(leaf: Any) -> bool:
        return (
            jnp.ndim(leaf) > 0
            and jnp.issubdtype(leaf.dtype, jnp.floating)
            and leaf.dtype.itemsize > narrow_dtype.itemsize
        )

    def widen(state: Any, params: Any) -> Any:
        own = jax.eval_shape(inner.init, params)
        return jax.tree.map(
            lambda x, like: x.astype(like.dtype) if is_narrowed(like) else x, state, own
        )

    def round_leaf(leaf: jax.Array, key: jax.Array) -> jax.Array:
        # A number beyond the narrow dtype must not become infinite: that would stay.
        bound = largest.astype(leaf.dtype)
        bounded = jnp.clip(leaf, -bound, bound)
        bounded = jnp.where(jnp.isfinite(leaf), bounded, leaf)
        return round_at_random(bounded, narrow_dtype, key)

    def narrow(state: Any, key: jax.Array) -> Any:
        leaves, structure = jax.tree.flatten(state)
        return structure.unflatten(
            round_leaf(leaf, jax.random.fold_in(key, index))
            if is_narrowed(leaf)
            else leaf
            for index, leaf in enumerate(leaves)
        )

    def init_fn(params):
        return NarrowState(
            keys.start(),
            jax.tree.map(
                lambda x: x.astype(narrow_dtype) if is_narrowed(x) else x,
                inner.init(params),
            ),
        )

    def climb_fn(updates, state, params=None, /, **extra_args):
        require_params(params, "with_state_dtype")
        key, key_data = keys.next(state.narrow_key)
        wide = widen(state.narrow_state, params)
        updates, wide, found = inner.climb(updates, wide, params, **extra_args)
        return updates, NarrowState(key_data, narrow(wide, key)), found

    def follow_fn(d, state, params):
        key, key_data = keys.next(state.narrow_key)
        wide = follow(inner, d, widen(state.narrow_state, params), params)
        return NarrowState(key_data, narrow(wide, key))

    return Ascent.from_climb(
        init_fn,
        climb_fn,
        follow=follow_fn if inner.follow else None,
        uses_gradient=inner.uses_gradient,
        reads_gradient=inner.reads_gradient,
        shows_nonfinite=inner.shows_nonfinite,
        may_descend=inner.may_descend,
    )
