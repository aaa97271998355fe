"""Whether two things are the same, as far as it can be known.

Two objects can be the same transformation: `optax.inject_hyperparams` builds one anew
on every call, and scripts do so too. So functions are compared by their code and by
what they have closed over. Arrays of a trace are compared by identity.
"""

import dataclasses
import functools
import numbers
from types import CellType, FunctionType, MethodType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


@dataclasses.dataclass(frozen=True, eq=False)
class Axes:
    """What a SAM transformation was built from: the arguments of `sharpness_aware`."""

    ascent: Any
    descent: Any
    cadence: Any
    mask: Any
    guard: bool
    stochastic_rounding: Any


def may_be_same(tree: Any, other: Any) -> bool:
    """Whether two trees of one structure hold the same values, as far as is known.

    Values of one trace are the same if they are the same objects. Of values of two
    traces, as inside and outside of a `lax.cond`, nothing is known.
    """
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return all(a is b or _may_be_equal(a, b) for a, b in pairs)


def _may_be_equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tracer) or isinstance(b, Tracer):
        trace, other = getattr(a, "_trace", None), getattr(b, "_trace", None)
        return trace is None or trace is not other
    return np.array_equal(a, b, equal_nan=True)


def first_difference(one: Any, other: Any) -> str | None:
    """Where two values differ, in words; None if nothing shows that they do.

    A traced value is different from a known one, and from no other traced one.
    """
    return _difference(one, other, "", set())


def _difference(one: Any, other: Any, name: str, seen: set[tuple[int, int]]):
    if one is other or (id(one), id(other)) in seen:
        return None
    seen.add((id(one), id(other)))
    if isinstance(one, Tracer) and isinstance(other, Tracer):
        return None
    differ = f"{name or 'they'}: {_in_words(one)} and {_in_words(other)}"
    if isinstance(one, Tracer) or isinstance(other, Tracer):
        return differ
    if isinstance(one, _NUMBERS) and isinstance(other, _NUMBERS):
        return None if np.array_equal(_data(one), _data(other)) else differ
    if type(one) is not type(other):
        return differ
    if isinstance(one, FunctionType) and one.__code__ != other.__code__:
        return differ
    parts, other_parts = _parts(one), _parts(other)
    if parts is None or other_parts is None:
        return None if _are_equal(one, other) else differ
    if parts.keys() != other_parts.keys():
        return differ
    for key, part in parts.items():
        # Names that only tell how something is built say nothing to a reader.
        own = name if key.startswith("_") else key
        found = _difference(part, other_parts[key], own, seen)
        if found is not None:
            return found
    return None


_NUMBERS = (numbers.Number, np.ndarray, np.generic, jax.Array)


def _data(value: Any) -> Any:
    """A number or an array as NumPy can compare it; of a typed key, its data."""
    is_key = isinstance(value, jax.Array) and jnp.issubdtype(
        value.dtype, jax.dtypes.prng_key
    )
    return jax.random.key_data(value) if is_key else value


def _parts(value: Any) -> dict[str, Any] | None:
    """What a value is made of, by name; None if it has no parts."""
    if isinstance(value, FunctionType):
        contents = map(_content, value.__closure__ or ())
        captured = zip(value.__code__.co_freevars, contents, strict=True)
        defaults = {"_defaults": (value.__defaults__, value.__kwdefaults__)}
        return dict(captured) | defaults
    if isinstance(value, MethodType):
        return {"_function": value.__func__, "_self": value.__self__}
    if isinstance(value, functools.partial):
        return {"_function": value.func, "_args": value.args, "_kw": value.keywords}
    if isinstance(value, (tuple, list)):
        return {f"_{index}": part for index, part in enumerate(value)}
    if isinstance(value, dict):
        return {str(key): part for key, part in value.items()}
    if hasattr(value, "__wrapped__"):  # jax.jit and functools.cache
        return {"_wrapped": value.__wrapped__}
    attributes = getattr(value, "__dict__", None)
    return None if attributes is None else dict(attributes)


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that has no value yet
        return None


def _are_equal(one: Any, other: Any) -> bool:
    if type(one).__eq__ is object.__eq__:
        return True
    try:
        return bool(one == other)
    except Exception:  # what cannot be compared shows no difference
        return True


def _in_words(value: Any) -> str:
    if isinstance(value, Tracer):
        return "a traced value"
    if callable(value) or isinstance(value, (tuple, dict)):
        return getattr(value, "__qualname__", type(value).__name__)
    return repr(value)
