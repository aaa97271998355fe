"""The examples of one step, the loss and its gradient on some of them, and data rules.

A data rule says which examples each of the two gradients of a step sees. It is a
function of the batch and the parameters; the methods know nothing of it.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam_optax import _sharding as sharding
from sam_optax._checks import is_integer
from sam_optax._step.inputs import Choice, Pass

Slots = tuple[int | str, ...]  # positions in args, and names in kwargs


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Examples, and the loss on them as a function of the parameters alone.

    Data rules (`sub_batch` and its like) are written with it. XLA drops whatever is
    evaluated but not used.
    """

    _loss_fn: Callable[..., Any]  # -> (what the user's function returns, aux)
    _args: tuple[Any, ...]
    _kwargs: dict[str, Any]
    _slots: Callable[[], Slots]
    _has_aux: bool
    user_loss_fn: Any  # that the helper was given; None if a rule has changed it

    def forward(self, point: Any) -> Pass:
        """The loss at a point."""
        returned, aux = self._loss_fn(point, *self._args, **self._kwargs)
        return Pass(_mean(returned), None, aux, self, returned)

    def gradient(self, point: Any) -> Pass:
        """The loss at a point with its gradient."""

        def mean_loss(point):
            there = self.forward(point)
            return there.loss, (there.aux, there.returned)

        (loss, (aux, returned)), gradient = jax.value_and_grad(mean_loss, has_aux=True)(
            point
        )
        return Pass(loss, gradient, aux, self, returned)

    def call(self, function: Callable[..., Any], point: Any) -> Any:
        """Another function of the arguments of loss_fn, with these examples."""
        return function(point, *self._args, **self._kwargs)

    def with_loss(self, loss_fn: Callable[..., Any]) -> "Batch":
        """The same examples with another loss, of anything and these examples."""
        return self.with_loss_and_aux(with_aux(loss_fn, self._has_aux))

    def with_loss_and_aux(self, loss_fn: Callable[..., Any]) -> "Batch":
        """The same examples with another function, which returns (loss, aux)."""
        return dataclasses.replace(self, _loss_fn=loss_fn, user_loss_fn=None)

    @property
    def examples(self) -> list[Any]:
        """The arguments that hold examples, each a tree of arrays."""
        return [
            self._kwargs[slot] if isinstance(slot, str) else self._args[slot]
            for slot in self._slots()
        ]

    @property
    def size(self) -> int:
        """The number of examples: the length of their first axis."""
        leaves = jax.tree.leaves(self.examples)
        for leaf in leaves:
            if not hasattr(leaf, "shape") or not leaf.shape:
                raise ValueError(
                    "Each array of a batch needs a first axis that numbers the "
                    f"examples, got {leaf!r}. batch_argnums= says which arguments are "
                    "batches, numbered as in jax.value_and_grad."
                )
        sizes = {leaf.shape[0] for leaf in leaves}
        if len(sizes) != 1:
            listed = ", ".join(str(leaf.shape) for leaf in leaves)
            raise ValueError(
                "The arrays of a batch need first axes of one length, that of the "
                f"examples, got shapes {listed or 'of no array at all'}."
            )
        return sizes.pop()

    def take(self, indices: Any) -> "Batch":
        """Some of the examples: by a slice, or an array of indices."""

        def take_leaf(x):
            return sharding.take(x, indices)

        return self.replace([jax.tree.map(take_leaf, tree) for tree in self.examples])

    def weigh(self, weights: Any) -> "Batch":
        """The same examples, with the loss of each multiplied by its weight."""
        if jnp.shape(weights) != (self.size,):
            raise ValueError(
                f"The weights must be an array of shape ({self.size},), one for each "
                f"example, got shape {jnp.shape(weights)}."
            )

        def weighted_loss(point, *args, **kwargs):
            returned, aux = self._loss_fn(point, *args, **kwargs)
            if jnp.shape(returned) != jnp.shape(weights):
                raise ValueError(
                    "To weigh examples, loss_fn must return one loss per example, of "
                    f"shape {jnp.shape(weights)}, not their mean; the mean is taken "
                    f"afterwards. It returned shape {jnp.shape(returned)}."
                )
            return returned * jnp.asarray(weights, returned.dtype), aux

        return self.with_loss_and_aux(weighted_loss)

    def replace(self, examples: Sequence[Any]) -> "Batch":
        """Other examples, in the places of these."""
        args, kwargs = list(self._args), dict(self._kwargs)
        for slot, tree in zip(self._slots(), examples, strict=True):
            if isinstance(slot, str):
                kwargs[slot] = tree
            else:
                args[slot] = tree
        return dataclasses.replace(self, _args=tuple(args), _kwargs=kwargs)


def make_batch(
    loss_fn: Callable[..., Any],
    has_aux: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    argnums: int | Sequence[int] | None,
    argnames: str | Sequence[str],
) -> Batch:
    """The batch of a call of loss_fn.

    Which arguments hold examples is found out when somebody asks, and then once: a step
    without a data rule must not be refused because that is not clear.
    """

    @functools.cache
    def slots() -> Slots:
        return _find_slots(loss_fn, args, kwargs, argnums, argnames)

    whole = with_aux(loss_fn, has_aux)
    return Batch(whole, args, kwargs, slots, has_aux, loss_fn)


def with_aux(
    loss_fn: Callable[..., Any], has_aux: bool, name: str = "loss_fn"
) -> Callable[..., tuple[Any, Any]]:
    """The user's loss_fn as one that returns (loss, aux)."""

    def loss_with_aux(point: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return loss_and_aux(loss_fn(point, *args, **kwargs), has_aux, name)

    return loss_with_aux


def _mean(loss: Any) -> jax.Array:
    return jnp.mean(loss) if jnp.ndim(loss) else jnp.asarray(loss)


def loss_and_aux(
    result: Any, has_aux: bool, name: str = "loss_fn"
) -> tuple[jax.Array, Any]:
    """The two parts of what the loss function called `name` returned."""
    if not has_aux:
        loss, aux = result, None
    elif isinstance(result, tuple) and len(result) == 2:
        loss, aux = result
    else:
        raise TypeError(
            f"With has_aux=True, {name} must return a pair (loss, aux), got "
            f"{type(result).__name__}."
        )
    if isinstance(loss, tuple):
        raise TypeError(
            f"{name} returned a tuple where a loss was expected; if it returns "
            "(loss, aux), pass has_aux=True to sam_value_and_grad."
        )
    if not isinstance(loss, (jax.Array, np.ndarray, np.generic, float)):
        raise TypeError(
            f"{name} must return a loss, or an array of losses, got "
            f"{type(loss).__name__}."
        )
    if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise TypeError(
            f"{name} must return floating-point numbers, which have a gradient, got "
            f"{jnp.result_type(loss)}."
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
    loss_fn = inspect.unwrap(loss_fn)  # of what jax.jit or sam_optax.nnx has wrapped
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


# --- Data rules.

DataRule = Callable[[Batch, Any], Choice]


def same_batch(batch: Batch, params: Any) -> Choice:
    """Both gradients on the whole batch: the rule of a step without any."""
    return Choice(batch.gradient(params), batch.gradient, batch.gradient)


def another_ascent(
    loss_fn: Callable[..., Any] | None, examples: Any | None
) -> DataRule:
    """ε from another loss, on other examples, or both; the rest from the batch.

    `loss_fn` returns (loss, aux) as that of a `Batch` does.
    """

    def rule(batch: Batch, params: Any) -> Choice:
        other = batch
        if examples is not None:
            is_single = len(batch.examples) == 1
            others = [examples] if is_single else list(examples)
            _check_match(batch.examples, others)
            other = other.replace(others)
        if loss_fn is not None:
            other = other.with_loss_and_aux(loss_fn)
        return Choice(
            batch.forward(params),
            other.gradient,
            batch.gradient,
            recompute=True,
            only_ascent=True,
        )

    return rule


def choose(rule: DataRule, batch: Batch, params: Any) -> Choice:
    """Calls a rule, and completes its answer for the step.

    `seen.gradient` is then g, and each pass has the unperturbed loss for a report.
    """
    choice = rule(batch, params)
    _check_choice(choice)
    seen = choice.seen
    if seen.gradient is None:
        first = _checked(choice.ascent, "ascent")(params)
        seen = seen._replace(gradient=first.gradient)

    def pass_for_step(evaluate: Callable[[Any], Pass]) -> Callable[[Any], Pass]:
        def pass_at(point):
            there = evaluate(point)
            known = Pass(there.loss, there.gradient, there.aux)
            if there.batch is None:  # a pass that the rule made by hand
                return known
            is_seen = there.batch is seen.batch
            here = seen if is_seen else there.batch.forward(params)
            return known._replace(unperturbed_loss=here.loss)

        return pass_at

    ascent = descent = pass_for_step(_checked(choice.ascent, "ascent"))
    if not choice.sees_one_loss:
        descent = pass_for_step(_checked(choice.descent, "descent"))
    return choice.replace(seen=seen, ascent=ascent, descent=descent)


def _check_choice(choice: Any) -> None:
    """Refuses what a rule must not return, where the step would fail or be wrong."""
    if not isinstance(choice, Choice):
        raise TypeError(
            "A data rule must return a sam_optax.data.Choice, got "
            f"{type(choice).__name__}."
        )
    if not isinstance(choice.seen, Pass):
        raise TypeError(
            "A data rule's Choice needs as `seen` the pass at the parameters, such as "
            f"batch.forward(params), got {type(choice.seen).__name__}."
        )
    for name in ("ascent", "descent"):
        if not callable(getattr(choice, name)):
            raise TypeError(
                f"A data rule's Choice needs as `{name}` a function of a point, such "
                f"as batch.gradient, got {type(getattr(choice, name)).__name__}."
            )
    is_of_ascent = getattr(choice.ascent, "__self__", None) is choice.seen.batch
    if choice.seen.gradient is not None and not is_of_ascent:
        raise ValueError(
            "A data rule's `seen` has a gradient, which is g, so `ascent` must be the "
            "method `gradient` of the same batch. To make ε from other examples, take "
            "`seen` from batch.forward(params): g is then that of `ascent`."
        )


def _checked(evaluate: Callable[[Any], Any], name: str) -> Callable[[Any], Pass]:
    def checked(point):
        result = evaluate(point)
        if not isinstance(result, Pass) or result.gradient is None:
            raise TypeError(
                f"A data rule's `{name}` must return a Pass with a gradient, as "
                "batch.gradient does."
            )
        return result

    return checked


def _check_match(examples: list[Any], other: Any) -> None:
    """The arguments of another batch, as many and of the same kinds."""
    wanted, given = jax.tree.structure(examples), jax.tree.structure(other)
    kinds = [
        [(x.shape[1:], jnp.result_type(x)) for x in jax.tree.leaves(tree)]
        for tree in (examples, other)
        if wanted == given
    ]
    if wanted != given or kinds[0] != kinds[1]:
        raise ValueError(
            "ascent_batch does not match the batch: it needs the same structure, and "
            "arrays of the same dtypes and shapes but for the first axis. The batch is "
            f"{jax.tree.map(jnp.shape, examples)}, the other "
            f"{jax.tree.map(jnp.shape, other)}."
        )
