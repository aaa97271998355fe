"""Operations that keep arrays spread over the devices of a mesh.

Under a mesh with explicit axes (what `jax.make_mesh` makes), the sharding of an array
is part of its type, and JAX refuses to guess the sharding of a result where it is not
clear. With automatic axes, the type does not name a sharding, and the functions here do
the plain operations.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec


def varying_axes(x: Any) -> frozenset[str]:
    """The axes of a `shard_map` along which a value can differ, as far as types say."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)
    # Versions of JAX keep this in one of two attributes.
    return getattr(kind, "vma", frozenset()) if manual is None else manual.varying


def vary(tree: Any, axes: Iterable[str]) -> Any:
    """The same values, marked as if they could differ along axes of a `shard_map`."""
    axes = frozenset(axes)

    def mark(x):
        new = tuple(sorted(axes - varying_axes(x)))
        return jax.lax.pcast(x, new, to="varying") if new else x

    return jax.tree.map(mark, tree)


def vary_like(tree: Any, other: Any) -> Any:
    """The same values, marked as if they could differ where those of another tree can.

    The branches of a `lax.cond`, and the start and the end of a loop, must be marked
    alike.
    """
    return vary(tree, set().union(*map(varying_axes, jax.tree.leaves(other))))


def first_axes(x: Any) -> Any:
    """The mesh axes that the first axis of an array is spread over, or None."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    return sharding.spec[0] if sharding is not None and len(sharding.spec) else None


def is_spread(tree: Any) -> bool:
    """Whether an array of a tree is spread over explicit axes of a mesh."""
    return any(layout_of(leaf) is not None for leaf in jax.tree.leaves(tree))


def layout_of(x: Any) -> NamedSharding | None:
    """How an array is spread over explicit axes of a mesh; None if it is not."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    if sharding is None or not any(sharding.spec):
        return None
    return NamedSharding(sharding.mesh, sharding.spec)


def layout_for_new(x: Any) -> NamedSharding | None:
    """`layout_of`, for a new array that is made beside x.

    Outside of `jax.set_mesh`, JAX does not know which devices a new array is for.
    """
    return None if jax.sharding.get_abstract_mesh().empty else layout_of(x)


def _spread(x: jax.Array, *leading: Any) -> jax.Array:
    """x with its leading axes on these mesh axes, and the others as they are."""
    sharding = jax.typeof(x).sharding
    rest = tuple(sharding.spec)[len(leading) :]
    spec = PartitionSpec(*leading, *rest)
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, spec))


def _if_divisible(x: jax.Array, axes: Any, length: int) -> Any:
    names = axes if isinstance(axes, tuple) else (axes,)
    devices = math.prod(jax.typeof(x).sharding.mesh.shape[name] for name in names)
    return axes if length % devices == 0 else None


def take(x: Any, indices: Any) -> jax.Array:
    """x[indices] along the first axis, spread over devices as x is where possible."""
    if not isinstance(x, jax.Array):
        x = jnp.asarray(x)  # NumPy takes no traced indices
    axes = first_axes(x)
    if axes is None:
        return x[indices]
    if not isinstance(indices, slice):
        indices = replicate(jnp.asarray(indices))
    taken = _spread(x, None)[indices]
    return _spread(taken, _if_divisible(taken, axes, taken.shape[0]))


def split(x: Any, count: int, *, together: bool) -> jax.Array:
    """(count · m, ...) as (count, m, ...).

    If the groups run together, they are spread over the devices. If they run one after
    another, the examples of each group are spread instead.
    """
    x = x if isinstance(x, jax.Array) else jnp.asarray(x)
    axes = first_axes(x)
    size = x.shape[0] // count
    shape = (count, size, *x.shape[1:])
    if axes is None:
        return x.reshape(shape)
    parts = _spread(x, None).reshape(shape)
    if together and _if_divisible(x, axes, count) is not None:
        return _spread(parts, axes, None)
    return _spread(parts, None, _if_divisible(x, axes, size))


def replicate(x: jax.Array) -> jax.Array:
    """The whole array on every device."""
    layout = layout_of(x)
    if layout is None:
        return x
    return jax.sharding.reshard(x, NamedSharding(layout.mesh, PartitionSpec()))


def spread_or_replicate(x: jax.Array, length: int) -> jax.Array:
    """x as it is if this length divides evenly over its devices, else whole on each."""
    axes = first_axes(x)
    if axes is None or _if_divisible(x, axes, length) is not None:
        return x
    return replicate(x)


def like(tree: Any, reference: Any) -> Any:
    """A tree, spread over the devices as a reference tree of the same shapes is."""

    def lay(x, r):
        layout = layout_of(r)
        return x if layout is None else jax.sharding.reshard(x, layout)

    return jax.tree.map(lay, tree, reference)


def like_first_axis(x: jax.Array, examples: Any) -> jax.Array:
    """A vector spread over the devices as the first axis of the examples is."""
    for leaf in jax.tree.leaves(examples):
        axes = first_axes(leaf)
        if axes is not None:
            mesh = jax.typeof(leaf).sharding.mesh
            return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(axes)))
    return x
