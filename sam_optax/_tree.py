"""Arithmetic on trees of arrays.

Norms, directions, projections and cosines are computed in at least float32, whatever
the dtype of the leaves, and stay correct where the square of an entry would overflow or
underflow. (`dot` and `squared_norm` themselves do overflow there.) Trees are traversed
with `jax.tree` only, so `None` leaves (Equinox) and `optax.MaskedNode` pass through
untouched.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sam_optax._sharding import layout_for_new

Tree = Any
Scalar = jax.Array | float


def is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def mismatch(found: Tree, expected: Tree) -> str | None:
    """Where two trees differ in structure or shapes, in words; None if they do not."""
    shapes, wanted = _shapes(found), _shapes(expected)
    for path, shape in wanted.items():
        if path not in shapes:
            return f"{path} is missing" if path else "it is not a single array"
        if shapes[path] != shape:
            return f"{path or 'it'} has shape {shapes[path]} in place of {shape}"
    for path in shapes:
        if path not in wanted:
            return f"{path or 'an array'} should not be there"
    if jax.tree.structure(found) != jax.tree.structure(expected):
        return "it is of another type"
    return None


def _shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf, by its path."""
    return {
        jax.tree_util.keystr(path): jnp.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def at_least_float32(tree: Tree) -> Tree:
    """Casts half-precision leaves to float32 and leaves wider ones as they are."""

    def widen(leaf):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            return leaf
        return jnp.asarray(leaf, widest(dtype, jnp.dtype(jnp.float32)))

    return jax.tree.map(widen, tree)


def cast_like(tree: Tree, like: Tree) -> Tree:
    return jax.tree.map(lambda x, y: jnp.asarray(x, jnp.result_type(y)), tree, like)


def zeros_like(tree: Tree) -> Tree:
    """Zeros in at least float32, the dtype of carried state and perturbations."""
    return jax.tree.map(jnp.zeros_like, at_least_float32(tree))


def scale(factor: Scalar, tree: Tree) -> Tree:
    """factor · tree, in the dtype of each leaf, even if the factor's dtype is wider."""
    return jax.tree.map(lambda x: x * _as_real_of(factor, x), tree)


def add_scaled(x: Tree, factor: Scalar, y: Tree) -> Tree:
    """x + factor · y, in the dtype of each leaf of x."""
    return jax.tree.map(
        lambda a, b: a + _as_real_of(factor, a) * jnp.asarray(b, a.dtype), x, y
    )


def multiply(x: Tree, y: Tree) -> Tree:
    return jax.tree.map(lambda a, b: a * jnp.asarray(b, a.dtype), x, y)


def subtract(x: Tree, y: Tree) -> Tree:
    return jax.tree.map(lambda a, b: a - jnp.asarray(b, a.dtype), x, y)


def mean_of_groups(tree: Tree) -> Tree:
    """The mean over the first axis; of counters and keys, the first entry is taken."""
    return jax.tree.map(lambda x: jnp.mean(x, axis=0) if is_inexact(x) else x[0], tree)


def magnitude(tree: Tree) -> Tree:
    return jax.tree.map(jnp.abs, at_least_float32(tree))


def sum_leaves(function: Callable[..., jax.Array], *trees: Tree) -> jax.Array:
    """Sum over leaves of a scalar function of each; 0 for a tree without leaves."""
    terms = jax.tree.leaves(jax.tree.map(function, *trees))
    if not terms:
        return jnp.zeros((), jnp.float32)
    dtype = widest(*[term.dtype for term in terms])
    return functools.reduce(jnp.add, [jnp.asarray(term, dtype) for term in terms])


def dot(x: Tree, y: Tree) -> jax.Array:
    """Real inner product over all leaves."""
    return sum_leaves(_overlap, at_least_float32(x), at_least_float32(y))


def squared_norm(tree: Tree) -> jax.Array:
    """The plain sum of squares; that of a `ScaledNorm` cannot leave the range."""
    return sum_leaves(_square, at_least_float32(tree))


# These two are compiled as calls, because XLA then lays out their arguments by rows.
# Otherwise the gradient of a matrix lies by columns, and a sum over columns takes a CPU
# up to thirty times as long.
@jax.jit
def _overlap(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(jnp.real(jnp.conj(a) * b))


@jax.jit
def _square(leaf: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(leaf):
        return jnp.sum(jnp.square(leaf.real) + jnp.square(leaf.imag))
    return jnp.sum(jnp.square(leaf))


def largest_magnitude(tree: Tree) -> jax.Array:
    largest = [
        jnp.max(jnp.abs(leaf))
        for leaf in jax.tree.leaves(at_least_float32(tree))
        if leaf.size
    ]
    if not largest:
        return jnp.zeros((), jnp.float32)
    dtype = widest(*[x.dtype for x in largest])
    return functools.reduce(jnp.maximum, [jnp.asarray(x, dtype) for x in largest])


def reciprocal_or_zero(largest: jax.Array) -> jax.Array:
    """About 1/x; 0 where x is 0 or subnormal, NaN where x is not finite.

    1/inf would be 0, and a tree with an infinite entry would get a finite direction.
    But such a tree has no direction, so the result is NaN.
    """
    tiny = jnp.finfo(largest.dtype).tiny
    is_zero = largest < tiny
    # The reciprocal of the very largest numbers would itself be subnormal.
    divisor = jnp.where(is_zero, 1, jnp.minimum(largest, 0.25 / tiny))
    inverse = jnp.where(is_zero, 0, 1 / divisor)
    return jnp.where(jnp.isfinite(largest), inverse, jnp.nan).astype(largest.dtype)


class ScaledNorm(NamedTuple):
    """A tree's 2-norm, split so that no part of it leaves the range of the dtype.

    ‖tree‖ = sqrt(square) / factor, and the direction is (tree · factor) / sqrt(square).
    """

    factor: jax.Array  # shape=(), a power of two, or NaN for a tree that is not finite
    square: jax.Array  # shape=(), the squared norm of tree · factor

    @property
    def is_finite(self) -> jax.Array:
        """Whether every number of the tree is finite."""
        return jnp.isfinite(self.square)


def scaled_norm(tree: Tree) -> ScaledNorm:
    """Measures a tree once: norm, direction and finiteness all follow from it.

    If the plain sum of squares is inside of [1/reach, reach], it has lost no digits,
    and is taken as it is. If it is outside, the tree is first multiplied by reach or
    1/reach. This brings the sum of squares inside, for every norm that the dtype can
    hold.
    """
    leaves = _of_one_width(jax.tree.leaves(at_least_float32(tree)))
    plain = squared_norm(leaves)
    reach = 2.0 ** (jnp.finfo(plain.dtype).maxexp * 3 // 4)
    is_safe = (plain >= 1 / reach) & (plain <= reach)
    rescue = jnp.where(plain > reach, 1 / reach, jnp.asarray(reach, plain.dtype))
    # The cond saves the second pass over the tree, which is rarely needed. Its
    # branches are module-level functions, so that eager calls compile them only once.
    square = jax.lax.cond(is_safe, _plain, _rescued, plain, rescue, leaves)
    # If all leaves are constant zeros, such as a momentum that the same program starts,
    # the barrier in `_rescued` is of no use. No tree whose plain sum is 0 holds a NaN.
    square = jnp.where((plain == 0) & jnp.isnan(square), 0, square)
    factor = jnp.where(is_safe | (square == 0), 1, rescue)
    return ScaledNorm(jnp.where(jnp.isfinite(square), factor, jnp.nan), square)


def _plain(plain: jax.Array, rescue: jax.Array, leaves: list[Any]) -> jax.Array:
    del rescue, leaves
    return plain


def _rescued(plain: jax.Array, rescue: jax.Array, leaves: list[Any]) -> jax.Array:
    del plain
    # A leaf can be constant when the step is compiled, such as the zeros of a parameter
    # that the loss does not use. Without the barrier, XLA would then compute
    # (rescue · rescue) · (leaf · leaf), which is inf · 0.
    return squared_norm(scale(rescue, _afresh(leaves)))


def _of_one_width(leaves: list[Any]) -> list[Any]:
    """All leaves in the widest dtype among them.

    The factor that brings a norm back into range is chosen for that dtype, and would
    overflow in a narrower one.
    """
    dtypes = [jnp.finfo(leaf.dtype).dtype for leaf in leaves]
    if len(set(dtypes)) <= 1:
        return leaves
    wide = widest(*dtypes)
    return [leaf.astype(np.promote_types(leaf.dtype, wide)) for leaf in leaves]


def norm(tree: Tree) -> jax.Array:
    """Global 2-norm over all leaves, exact wherever it is representable."""
    return length(scaled_norm(tree))


def length(norm: ScaledNorm) -> jax.Array:
    """`norm` of a tree of which the norm is known."""
    return _root(norm.square) / norm.factor


def _root(square: jax.Array) -> jax.Array:
    """The square root, with a derivative of zero at zero, where that of sqrt is NaN."""
    is_zero = square == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))


def unit(tree: Tree) -> Tree:
    """The direction of a tree: global 2-norm one, or zero where the tree is zero."""
    return to_unit(tree, scaled_norm(tree))


def to_unit(tree: Tree, norm: ScaledNorm) -> Tree:
    """`unit` of a tree of which the norm is known."""
    factor, square = norm
    is_zero = square == 0
    inverse = jnp.where(is_zero, 0, 1 / jnp.sqrt(jnp.where(is_zero, 1, square)))
    # Two factors: their product can leave the range of the dtype, x · factor cannot.
    return scale(inverse, scale(factor, at_least_float32(tree)))


def projection(x: Tree, direction: Tree) -> Tree:
    """The part of x that lies along a direction; zero if the direction is zero."""
    factor, square = scaled_norm(direction)
    factor, x, direction = _afresh((factor, *map(at_least_float32, (x, direction))))
    # Both are shrunk, so that the factor is right without undoing it, and no product
    # leaves the range of the dtype where x is about as large as the direction.
    overlap = dot(scale(factor, x), scale(factor, direction))
    factor = overlap / jnp.where(square == 0, 1, square)
    return scale(factor, _afresh(direction))


def orthogonal(x: Tree, direction: Tree) -> Tree:
    """The part of x orthogonal to a direction; x itself if the direction is zero."""
    return subtract(x, projection(x, direction))


def orthogonal_difference(x: Tree, y: Tree, direction: Tree) -> Tree:
    """The part of x − y that is orthogonal to a direction."""
    overlap = projection(subtract(x, y), direction)
    x, y = _afresh((x, y))
    return subtract(subtract(x, y), overlap)


def _afresh(tree: Tree) -> Tree:
    """The same tree, in a form that keeps the compiler from reusing earlier results.

    The compiler would write a product or difference to memory for its second use.
    Computing it twice is cheaper.
    """
    return jax.lax.optimization_barrier(tree)


# A difference is only rounding error below this many ulps of what it came from.
_ROUNDING = 32


def zero_if_rounding_of(whole: Tree, part: Tree) -> Tree:
    """The part, or zero if it is only the rounding error of a subtraction from whole.

    This is for parts that are scaled up later: rounding error must not become a
    direction.
    """
    return scale(jnp.where(_is_rounding_of(whole, norm(part)), 0, 1), part)


def unit_unless_rounding_of(whole: Tree, part: Tree) -> Tree:
    """`unit` of `zero_if_rounding_of`, but measures the part only once."""
    norm_of_part = scaled_norm(part)
    is_rounding = _is_rounding_of(whole, length(norm_of_part))
    return scale(jnp.where(is_rounding, 0, 1), to_unit(part, norm_of_part))


def _is_rounding_of(whole: Tree, size_of_part: jax.Array) -> jax.Array:
    size = norm(whole)
    return size_of_part <= _ROUNDING * jnp.finfo(size.dtype).eps * size


def cosine(x: Tree, y: Tree) -> jax.Array:
    """Cosine of the angle between two trees; 0 if either is zero."""
    (factor_x, square_x), (factor_y, square_y) = scaled_norm(x), scaled_norm(y)
    x, y = at_least_float32(x), at_least_float32(y)
    factor_x, x, factor_y, y = _afresh((factor_x, x, factor_y, y))
    lengths = _root(square_x) * _root(square_y)
    overlap = dot(scale(factor_x, x), scale(factor_y, y))
    return overlap / jnp.where(lengths == 0, 1, lengths)


def normal_like(key: jax.Array, tree: Tree) -> Tree:
    """Independent standard normal entries, in at least float32."""
    return _draw_like(jax.random.normal, key, at_least_float32(tree))


def uniform_like(key: jax.Array, tree: Tree) -> Tree:
    """Independent entries, uniform on [0, 1), in at least float32."""
    return _draw_like(jax.random.uniform, key, at_least_float32(tree))


def _draw_like(draw: Callable[..., jax.Array], key: jax.Array, tree: Tree) -> Tree:
    leaves, structure = jax.tree.flatten(tree)
    drawn = [
        draw(
            jax.random.fold_in(key, index),
            leaf.shape,
            leaf.dtype,
            out_sharding=layout_for_new(leaf),
        )
        for index, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, drawn)


def all_finite(tree: Tree) -> jax.Array:
    """Whether every floating-point entry is finite.

    It uses `scaled_norm`, because a method often takes that of the same tree, and the
    compiler then computes the two only once.
    """
    return scaled_norm([x for x in jax.tree.leaves(tree) if is_inexact(x)]).is_finite


def widest(*dtypes: Any) -> Any:
    """The dtype with the most bits; strict dtype promotion would refuse to choose."""
    return max(dtypes, key=lambda dtype: jnp.finfo(dtype).bits)


def _as_real_of(factor: Scalar, leaf: jax.Array) -> jax.Array:
    return jnp.asarray(factor, jnp.finfo(leaf.dtype).dtype)
