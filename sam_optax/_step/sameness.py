"""Whether two things are the same, as far as it can be known.

Two objects can be the same transformation: `optax.inject_hyperparams` builds one anew
on every call, and scripts do so too. So functions are compared by their code and by
what they have closed over. Arrays of a trace are compared by identity.
"""

import dataclasses
import functools
import numbers
import reprlib
import weakref
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """What a SAM transformation was built from: the arguments of `sharpness_aware`."""

    ascent: Any
    descent: Any
    cadence: Any
    mask: Any
    guard: bool
    stochastic_rounding: Any


def may_be_same(tree: Any, other: Any) -> bool:
    """Whether two trees of one structure hold the same values, as far as is known.

    Values of one trace are taken for the same if they are the same objects. Of values
    of two traces, as inside and outside of a `lax.cond`, nothing is known.
    """
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return all(a is b or _may_be_equal(a, b) for a, b in pairs)


def _may_be_equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tracer) or isinstance(b, Tracer):
        return not _are_of_one_trace(a, b)
    return np.array_equal(a, b, equal_nan=True)


def _are_of_one_trace(a: Any, b: Any) -> bool:
    trace = getattr(a, "_trace", None)
    return trace is not None and trace is getattr(b, "_trace", None)


class HandedOut:
    """Remembers the values of traces that updates have handed out as next states."""

    def __init__(self) -> None:
        self._values = weakref.WeakValueDictionary[int, Any]()

    def add(self, tree: Any) -> None:
        for leaf in jax.tree.leaves(tree):
            if isinstance(leaf, Tracer):
                self._values[id(leaf)] = leaf

    def is_another(self, now: Any, before: Any) -> bool:
        """Whether a state is known to be another one than that of before.

        Of two values of one trace this is known only if the first was handed out: the
        user may have laid out or cast the other one anew.
        """
        pairs = zip(jax.tree.leaves(now), jax.tree.leaves(before), strict=True)
        return any(a is not b and self._differ(a, b) for a, b in pairs)

    def _differ(self, now: Any, before: Any) -> bool:
        if _are_of_one_trace(now, before):
            return self._values.get(id(now)) is now
        return not _may_be_equal(now, before)


def first_difference(one: Any, other: Any) -> str | None:
    """Where two values differ, in words; None if nothing shows that they do.

    A traced value is different from a known one, and from no other traced one.
    """
    return _difference(one, other, "", {})


def _difference(
    one: Any, other: Any, name: str, seen: dict[tuple[int, int], Any]
) -> str | None:
    if one is other or (id(one), id(other)) in seen:
        return None
    # Kept alive, so that no other object takes over the number of one of them.
    seen[id(one), id(other)] = one, other
    if isinstance(one, Tracer) and isinstance(other, Tracer):
        return None
    differ = f"{name or 'they'}: {_in_words(one)} and {_in_words(other)}"
    if isinstance(one, Tracer) or isinstance(other, Tracer):
        return differ
    if isinstance(one, _NUMBERS) and isinstance(other, _NUMBERS):
        return None if np.array_equal(_data(one), _data(other)) else differ
    if type(one) is not type(other):
        return differ
    if isinstance(one, FunctionType) and not _is_same_code(one, other):
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
    """A number or an array as NumPy can compare it; of a typed key, its data.

    A number that went through JAX has single precision, and may be the same as one
    that did not.
    """
    is_array = isinstance(value, jax.Array)
    if is_array and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(value)
    is_float = isinstance(value, numbers.Real) and not isinstance(value, int)
    return np.float32(value) if is_float else np.asarray(value)


def _is_same_code(one: FunctionType, other: FunctionType) -> bool:
    """Whether two functions are written alike, be it in different lines."""
    return _outline(one.__code__) == _outline(other.__code__)


def _outline(code: CodeType) -> tuple[Any, ...]:
    constants = [_outline(x) if isinstance(x, CodeType) else x for x in code.co_consts]
    # A number is told apart from another of equal value, such as 1 from True.
    kinds = [type(x) for x in code.co_consts]
    return code.co_code, code.co_names, code.co_varnames, constants, kinds


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
        # An `Ascent` is a tuple with further attributes.
        entries = {f"_{index}": part for index, part in enumerate(value)}
        return entries | getattr(value, "__dict__", {})
    if isinstance(value, dict):
        return {str(key): part for key, part in value.items()}
    if hasattr(value, "__wrapped__"):  # jax.jit and functools.cache
        return {"_wrapped": value.__wrapped__}
    slots = [
        name
        for base in type(value).__mro__
        for name in getattr(base, "__slots__", ())
        if hasattr(value, name)
    ]
    attributes = getattr(value, "__dict__", None)
    if attributes is None and not slots:
        return None
    return dict(attributes or {}) | {name: getattr(value, name) for name in slots}


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
    return reprlib.repr(value)
