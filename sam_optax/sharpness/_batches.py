"""Means over a data set that one compiled program visits a batch at a time."""

import functools
import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sam_optax import _sharding as sharding
from sam_optax import _tree
from sam_optax._checks import check_positive_integer


@jax.tree_util.register_pytree_node_class
class Stream:
    """Batches that are read one at a time, when a measure needs them; see `stream`."""

    def __init__(self, batches: Sequence[Any]):
        self._source = _Source(batches)
        self._number = np.int32(next(_numbers))  # names it in compiled programs
        _sources[int(self._number)] = self._source
        self.count = len(batches)
        self.first = _outline(self._source.read(0))
        # The last batch may be shorter. Whether the others are like the first is only
        # checked when they are fetched.
        self.last = _outline(self._source.read(self.count - 1))
        for outline in (self.first, self.last):
            example_count(outline)  # raises if the batch holds no examples

    def __repr__(self) -> str:
        return f"Stream({self.count} batches, {self.size} examples)"

    @property
    def size(self) -> int:
        """The number of examples."""
        return example_count(self.first) * (self.count - 1) + example_count(self.last)

    def tree_flatten(self) -> tuple[Any, Any]:
        return (self._number,), (self.count, _static(self.first), _static(self.last))

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> "Stream":
        stream = object.__new__(cls)
        (stream._number,) = children
        stream.count = static[0]
        stream.first, stream.last = (s.unflatten(leaves) for leaves, s in static[1:])
        # A copy by `jax.tree.map` keeps the batches alive as well.
        number = stream._number
        known = isinstance(number, (int, np.integer, np.ndarray))
        stream._source = _sources.get(int(number)) if known else None
        return stream

    def fetch(self, index: Any, *, is_last: bool) -> tuple[jax.Array, tuple[Any, ...]]:
        """Reads a batch inside a compiled program, cast to the dtypes that JAX uses.

        Returns 1, or NaN if the batch cannot be read, and the batch.
        """
        expected = self.last if is_last else self.first
        outline = jax.tree.map(
            lambda s: s.update(dtype=jax.dtypes.canonicalize_dtype(s.dtype)), expected
        )
        # JAX may call a pure callback repeatedly and in any order. That is harmless
        # here, because each call reads by index.
        return jax.pure_callback(
            functools.partial(_read, expected, outline),
            (jax.ShapeDtypeStruct((), jnp.float32), outline),
            self._number,
            index,
            vmap_method="sequential",
        )

    def take_error(self) -> Exception | None:
        """The first error that reading a batch has raised since the last call."""
        if isinstance(self._number, Tracer):
            return None
        source = _sources.get(int(self._number))
        if source is None:
            return None
        error, source.error = source.error, None
        return error


class _Source:
    """The batches of a stream, and the first error that reading them has raised."""

    def __init__(self, batches: Sequence[Any]):
        self.batches = batches
        self.error: Exception | None = None

    def read(self, index: int) -> tuple[Any, ...]:
        return jax.tree.map(np.asarray, as_arguments(self.batches[index]))


# A compiled program gets the number of a stream, not its data. So streams of the same
# shapes share a program, and no program keeps the data alive.
_sources: weakref.WeakValueDictionary[int, _Source] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def _read(expected: Any, outline: Any, number: Any, index: Any) -> Any:
    """Reads a batch on the host. After an error, it returns NaN and zeros.

    An error raised here would leave the other devices waiting for this one. So the
    source keeps it, and `run_over` raises it when the program has ended.
    """
    source = _sources.get(int(number))
    try:
        if source is None:
            raise RuntimeError(
                "The stream was deleted, but a compiled program still reads it. Keep a "
                "reference to the stream."
            )
        batch = source.read(int(index))
        if _outline(batch) != expected:
            raise ValueError(
                "All streamed batches but the last must have the same structure, "
                f"shapes and dtypes; batch {int(index)} has {_outline(batch)}, "
                f"expected {expected}."
            )
        batch = jax.tree.map(lambda x, s: x.astype(s.dtype), batch, outline)
        return np.float32(1), batch
    except Exception as error:
        if source is None:
            raise
        source.error = source.error or error
        zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), outline)
        return np.float32(np.nan), zeros


def run_over(data: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """function(*args, **kwargs), or the error of reading the data that it visits."""
    if not isinstance(data, Stream):
        return function(*args, **kwargs)
    data.take_error()  # one that a jitted function of the user's has left
    result = jax.block_until_ready(function(*args, **kwargs))
    error = data.take_error()
    if error is not None:
        raise error
    return result


def _static(outline: Any) -> Any:
    leaves, structure = jax.tree.flatten(outline)
    return tuple(leaves), structure


def _outline(batch: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)


def stream(batches: Sequence[Any]) -> Stream:
    """Data that does not fit on the device: batches in host memory or on disk.

    Args:
      batches: a sequence, that is anything with a length and integer indices. Each item
        is one batch: the arguments of the loss after the parameters. All batches have
        the same shapes, except that the last may hold fewer examples. A measure can ask
        for the same index several times and must get the same batch each time, so do
        not shuffle or augment at random. Reading runs inside of a compiled program, so
        it must use NumPy and not JAX, which would wait for that program to end.

    Returns:
      A `Stream`, which every measure of this module takes as `data`. Each batch is
      fetched when it is needed and dropped afterwards, so the device holds one batch at
      a time. If a batch cannot be read, the measure raises the error. Inside a jitted
      function of your own it cannot raise; there its result is NaN.

    Raises:
      TypeError: if batches is not a sequence, for example an iterator, which can be
        read only once.
      ValueError: if there are no batches, or the first or the last is empty. A measure
        raises it if another batch differs from the first in shapes or dtypes.

    Examples:
      This reads batches of a memory-mapped file from the disk when they are needed.

      >>> import numpy as np
      >>> from sam_optax import sharpness
      >>> class Rows:
      ...     def __init__(self, x, size):
      ...         self.x, self.size = x, size
      ...     def __len__(self):
      ...         return -(-len(self.x) // self.size)
      ...     def __getitem__(self, i):
      ...         return (self.x[i * self.size:(i + 1) * self.size],)
      >>> x = np.arange(10, dtype=np.float32)  # np.load(..., mmap_mode="r")
      >>> print(sharpness.gradient_norm(
      ...     lambda w, x: ((w - x) ** 2).mean(), 0.0, sharpness.stream(Rows(x, 4))))
      9.0
    """
    if not (hasattr(batches, "__len__") and hasattr(batches, "__getitem__")):
        raise TypeError(
            "batches must be a sequence, with a length and integer indices, because a "
            f"measure reads the data many times; got {type(batches).__name__}. Make it "
            "a list, or a class with __len__ and __getitem__ that reads from the disk."
        )
    if len(batches) == 0:
        raise ValueError("There are no batches to measure on.")
    return Stream(batches)


def as_arguments(data: Any) -> tuple[Any, ...]:
    """`data` as a tuple of arguments; a single argument needs no tuple."""
    is_several = isinstance(data, (tuple, list)) and not hasattr(data, "_fields")
    return tuple(data) if is_several else (data,)


def check_data(data: Any, batch_size: int | None, m: int | None = None) -> Any:
    """`data` as a Stream or a tuple of trees, after checks that it can be divided."""
    if batch_size is not None:
        check_positive_integer("batch_size", batch_size)
    if m is not None:
        check_positive_integer("m", m)
    if isinstance(data, Stream):
        if batch_size is not None:
            raise ValueError("A stream already has its batches; leave out batch_size=.")
        _check_groups(m, [data.first, data.last])
        return data
    data = as_arguments(data)
    example_count(data)
    _check_groups(m, [data])
    if m is not None and batch_size is not None and batch_size % m:
        raise ValueError(f"batch_size must be a multiple of m = {m}, got {batch_size}.")
    return data


def example_count(data: Any) -> int:
    leaves = jax.tree.leaves(data)
    if not leaves:
        raise ValueError("The data hold no arrays.")
    shapes = [jnp.shape(leaf) for leaf in leaves]
    if any(not shape for shape in shapes) or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            "All arrays of the data must have the examples along their first axis, the "
            f"same number in each; their shapes are {shapes}. If an argument of the "
            "loss holds no examples, bind it with jax.tree_util.Partial."
        )
    if shapes[0][0] == 0:
        raise ValueError(f"The data are empty: their shapes are {shapes}.")
    return shapes[0][0]


def _check_groups(m: int | None, batches: Sequence[Any]) -> None:
    for batch in batches:
        if m is not None and example_count(batch) % m:
            raise ValueError(
                f"{example_count(batch)} examples make no whole number of groups of "
                f"m = {m}. Leave some out: x[: len(x) // {m} * {m}]."
            )


def mean_over_batches(
    function: Callable[..., Any], data: Any, batch_size: int | None
) -> Any:
    """The mean of `function(index, *batch)` over batches, weighted by their sizes.

    The function returns a tree of floats. The sum is in at least float32, and
    compensated: it is as exact for many batches as for one. If n batches
    of equal size make up the data, each takes every n-th example, so that examples that
    are sharded over devices stay on their devices.
    """
    if isinstance(data, Stream):
        count, size = data.count, data.size
        batch = example_count(data.first)
        even = size == count * batch
        whole = count if even else count - 1

        def read_and_visit(index, is_last):
            valid, batch = data.fetch(index, is_last=is_last)
            return _tree.scale(valid, function(index, *batch))

        visit = functools.partial(read_and_visit, is_last=False)
        visit_rest = functools.partial(read_and_visit, whole, is_last=True)

    else:
        size = example_count(data)
        batch = min(batch_size or size, size)
        whole, rest = divmod(size, batch)
        even = rest == 0
        if even and whole == 1:
            return _tree.at_least_float32(function(0, *data))
        take = _every_nth if even else _consecutive
        data = _divisible(data, math.gcd(batch, rest))

        def visit(index):
            return function(
                index, *jax.tree.map(lambda x: take(x, index, batch, whole), data)
            )

        def visit_rest():
            return function(whole, *jax.tree.map(lambda x: x[whole * batch :], data))

    mean = _tree.scale(batch / size, _sum(visit, whole))
    if even:
        return mean
    last = _tree.at_least_float32(visit_rest())
    return _tree.add_scaled(mean, (size - whole * batch) / size, last)


def mean_over_groups(
    function: Callable[..., Any],
    data: Any,
    batch_size: int | None,
    m: int,
    key: jax.Array,
) -> Any:
    """The mean of `function(key, *group)` over groups of m consecutive examples.

    The key of a group depends on its number among all groups, and not on the batch. The
    groups of a batch run together. If batch_size is None, the groups of arrays run one
    after another; those of a stream still run a batch at a time.
    """

    def split(x):
        return x.reshape(x.shape[0] // m, m, *x.shape[1:])

    def visit(index, numbers, *groups):
        del index
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(numbers)
        keys = sharding.like_first_axis(keys, groups)
        return _tree.mean_of_groups(
            _tree.at_least_float32(jax.vmap(function)(keys, *groups))
        )

    if isinstance(data, Stream):
        before = example_count(data.first) // m  # groups in a batch

        def visit_batch(index, *batch):
            numbers = index * before + jnp.arange(example_count(batch) // m)
            return visit(index, numbers, *jax.tree.map(split, batch))

        return mean_over_batches(visit_batch, data, None)
    count = example_count(data) // m
    groups = jnp.arange(count), *jax.tree.map(split, _divisible(data, count))
    return mean_over_batches(visit, groups, (batch_size or m) // m)


def _divisible(data: Any, length: int) -> Any:
    return jax.tree.map(
        lambda x: sharding.spread_or_replicate(jnp.asarray(x), length), data
    )


def _every_nth(x: Any, index: Any, batch: int, count: int) -> jax.Array:
    # If the first axis is sharded, the part of it that a device holds contains the
    # device's part of every batch.
    x = x.reshape(batch, count, *x.shape[1:])
    return jax.lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False)


def _consecutive(x: Any, index: Any, batch: int, count: int) -> jax.Array:
    del count
    return jax.lax.dynamic_slice_in_dim(x, index * batch, batch)


def _sum(visit: Callable[[Any], Any], count: int) -> Any:
    """visit(0) + … + visit(count − 1), in at least float32.

    The sum is compensated (Kahan 1965). Measures are differences of such sums, and with
    a thousand batches a plain sum would lose three of their seven digits.
    """

    def term(index):
        return _tree.at_least_float32(visit(index))

    def add(index, carry):
        total, lost = carry
        added = jax.tree.map(jnp.subtract, term(index), lost)
        new = jax.tree.map(jnp.add, total, added)
        lost = jax.tree.map(_lost, new, total, added)
        return new, lost

    if count == 1:
        return term(0)
    shapes = jax.eval_shape(lambda: term(jnp.int32(0)))
    start = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype, device=s.sharding), shapes
    )
    return jax.lax.fori_loop(0, count, add, (start, start))[0]


def _lost(new: jax.Array, total: jax.Array, added: jax.Array) -> jax.Array:
    """What rounding has put into new = total + added; 0 where new is not finite."""
    return jnp.where(jnp.isfinite(new), (new - total) - added, 0)
