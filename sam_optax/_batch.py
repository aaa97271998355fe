"""The examples of one step, and the loss and its gradient on some of them."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sam_optax import _layout as layout
from sam_optax._hyperparameters import is_integer


@dataclasses.dataclass(frozen=True)
class Pass:
    """What one pass over a batch yields at one point.

    Attributes:
      batch: the examples it saw.
      loss: the mean of what loss_fn returned.
      aux: its auxiliary output, or None.
      gradient: of the mean loss; None from a forward pass.
      losses: the loss of each example; an error if loss_fn does not return one each.
    """

    batch: "Batch"
    loss: jax.Array  # shape=()
    aux: Any
    gradient: Any
    _raw: jax.Array

    @property
    def losses(self) -> jax.Array:
        wanted = (self.batch.size,)
        if self._raw.shape != wanted:
            raise ValueError(
                "To select examples by their loss, loss_fn must return one loss per "
                f"example, of shape {wanted}, not their mean; the mean is taken "
                f"afterwards. It returned shape {self._raw.shape}."
            )
        return self._raw


@dataclasses.dataclass(frozen=True)
class Batch:
    """Examples, and the loss on them as a function of the parameters alone.

    Data rules (`sub_batch` and its like) are written with it. What it evaluates and
    nobody uses, XLA drops.
    """

    _loss_fn: Callable[..., Any]  # -> (raw loss, aux)
    _args: tuple[Any, ...]
    _kwargs: dict[str, Any]
    _slots: Callable[[], tuple[int | str, ...]]

    def forward(self, point: Any) -> Pass:
        """The loss at a point."""
        raw, aux = self._loss_fn(point, *self._args, **self._kwargs)
        return Pass(self, _mean(raw), aux, None, raw)

    def gradient(self, point: Any) -> Pass:
        """The loss at a point with its gradient."""

        def mean_loss(point):
            raw, aux = self._loss_fn(point, *self._args, **self._kwargs)
            return _mean(raw), (aux, raw)

        (loss, (aux, raw)), gradient = jax.value_and_grad(mean_loss, has_aux=True)(
            point
        )
        return Pass(self, loss, aux, gradient, raw)

    @property
    def examples(self) -> list[Any]:
        """The arguments that hold examples, each a tree of arrays."""
        return [self._at(slot) for slot in self._slots()]

    @property
    def size(self) -> int:
        """The number of examples: the length of their first axis."""
        leaves = jax.tree_util.tree_leaves_with_path(self.examples)
        for _, leaf in leaves:
            if not hasattr(leaf, "shape") or not leaf.shape:
                raise ValueError(
                    "Each array of a batch needs a first axis that numbers the "
                    f"examples, got {leaf!r}. batch_argnums= says which arguments are "
                    "batches, numbered as in jax.value_and_grad."
                )
        sizes = {leaf.shape[0] for _, leaf in leaves}
        if len(sizes) != 1:
            listed = ", ".join(str(leaf.shape) for _, leaf in leaves)
            raise ValueError(
                "The arrays of a batch need first axes of one length, that of the "
                f"examples, got shapes {listed or 'of no array at all'}."
            )
        return sizes.pop()

    def take(self, indices: Any) -> "Batch":
        """Some of the examples: by a slice, or an array of indices."""
        return self.replace(
            [
                jax.tree.map(lambda x: layout.take(x, indices), tree)
                for tree in self.examples
            ]
        )

    def replace(self, examples: Sequence[Any]) -> "Batch":
        """Other examples, in the places of these."""
        args, kwargs = list(self._args), dict(self._kwargs)
        for slot, tree in zip(self._slots(), examples, strict=True):
            if isinstance(slot, str):
                kwargs[slot] = tree
            else:
                args[slot] = tree
        return dataclasses.replace(self, _args=tuple(args), _kwargs=kwargs)

    def _at(self, slot: int | str) -> Any:
        return self._kwargs[slot] if isinstance(slot, str) else self._args[slot]


def make_batch(
    loss_fn: Callable[..., Any],
    has_aux: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    argnums: int | Sequence[int] | None,
    argnames: str | Sequence[str],
) -> Batch:
    """The batch of a call of loss_fn; where it is, is found out only when asked."""

    def with_aux(point, *args, **kwargs):
        return loss_and_aux(loss_fn(point, *args, **kwargs), has_aux)

    def slots():
        return _find_slots(loss_fn, args, kwargs, argnums, argnames)

    return Batch(with_aux, args, kwargs, slots)


def _mean(loss: Any) -> jax.Array:
    return jnp.mean(loss) if jnp.ndim(loss) else jnp.asarray(loss)


def loss_and_aux(result: Any, has_aux: bool) -> tuple[jax.Array, Any]:
    if not has_aux:
        loss, aux = result, None
    elif isinstance(result, tuple) and len(result) == 2:
        loss, aux = result
    else:
        raise TypeError(
            "With has_aux=True, loss_fn must return a pair (loss, aux), got "
            f"{type(result).__name__}."
        )
    if isinstance(loss, tuple):
        raise TypeError(
            "loss_fn returned a tuple where a loss was expected; if it returns "
            "(loss, aux), pass has_aux=True to sam_value_and_grad."
        )
    return jnp.asarray(loss), aux


def check_argnums(argnums: Any, argnames: Any) -> None:
    """What can be known to be wrong before any call."""
    for number in _as_tuple(argnums):
        if not is_integer(number) or number < 1:
            raise ValueError(
                "batch_argnums must be integers >= 1, numbered as in "
                f"jax.value_and_grad, where 0 is the parameters; got {argnums!r}."
            )
    for name in _as_tuple(argnames):
        if not isinstance(name, str):
            raise ValueError(f"batch_argnames must be strings, got {argnames!r}.")


def _as_tuple(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _find_slots(
    loss_fn: Callable,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    argnums: int | Sequence[int] | None,
    argnames: str | Sequence[str],
) -> tuple[int | str, ...]:
    """Where the examples are: positions in args, and names in kwargs."""
    names = _as_tuple(argnames)
    missing = [name for name in names if name not in kwargs]
    if missing:
        raise ValueError(
            f"batch_argnames= names {missing[0]!r}, which was not passed by keyword."
        )
    is_default = argnums is None and not names
    numbers = (1,) if is_default else _as_tuple(argnums)
    slots = tuple(_slot(loss_fn, number, args, kwargs) for number in numbers) + names
    if is_default:
        _check_no_other_batch(loss_fn, slots[0], args, kwargs)
    return slots


def _slot(loss_fn, number, args, kwargs) -> int | str:
    """Argument `number` of loss_fn, passed by position or by keyword."""
    if number <= len(args):
        return number - 1
    try:
        names = list(inspect.signature(loss_fn).parameters)
    except (TypeError, ValueError):  # builtins have no signature
        names = []
    if number < len(names) and names[number] in kwargs:
        return names[number]
    raise ValueError(
        f"Argument {number} of loss_fn should hold the batch (batch_argnums=, which "
        "counts the parameters as 0), but was not passed. For one that is passed by "
        "keyword only, name it in batch_argnames=."
    )


def _check_no_other_batch(
    loss_fn: Callable,
    slot: int | str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Labels left whole beside half of the images could broadcast to a wrong loss."""
    everything = {**dict(enumerate(args)), **kwargs}

    def sizes(tree):
        return {x.shape[0] for x in jax.tree.leaves(tree) if getattr(x, "shape", ())}

    batch = sizes(everything.pop(slot))
    if isinstance(loss_fn, functools.partial):
        everything["bound by functools.partial"] = (loss_fn.args, loss_fn.keywords)
    for key, value in everything.items():
        if batch & sizes(value):
            name = key + 1 if isinstance(key, int) else repr(key)
            raise ValueError(
                f"Argument {name} of loss_fn has a first axis as long as the batch in "
                "argument 1. Say which arguments hold examples: batch_argnums=(1, 2) "
                "for both of two positional ones, batch_argnums=1 if it is the first "
                "alone, batch_argnames= for keywords."
            )
