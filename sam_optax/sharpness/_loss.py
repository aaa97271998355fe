"""A loss that is a mean over examples, for all data and for a single example."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam_optax.sharpness._batches import mean_over_batches

LossFn = Callable[..., Any]


@jax.tree_util.register_pytree_node_class
class Function:
    """A function as a pytree: the arrays it contains are traced, the rest is static.

    A plain function contains no arrays, but a `jax.tree_util.Partial` or an Equinox
    module does. As these are traced, a program that was compiled for one such function
    also runs others whose arrays have the same shapes.
    """

    def __init__(self, function: Callable[..., Any]):
        if not callable(function):
            raise TypeError(f"A loss must be a function, got {function!r}.")
        leaves, self._structure = jax.tree.flatten(function)
        self._arrays = [x if _is_array(x) else None for x in leaves]
        self._others = tuple(None if _is_array(x) else x for x in leaves)

    def __call__(self, *arguments: Any) -> Any:
        leaves = [
            other if array is None else array
            for array, other in zip(self._arrays, self._others, strict=True)
        ]
        return self._structure.unflatten(leaves)(*arguments)

    def tree_flatten(self) -> tuple[Any, Any]:
        return (self._arrays,), (self._others, self._structure)

    @classmethod
    def tree_unflatten(cls, static: Any, arrays: Any) -> "Function":
        function = object.__new__(cls)
        (function._arrays,) = arrays
        function._others, function._structure = static
        return function


def _is_array(leaf: Any) -> bool:
    """Tests the type, because other leaves, such as Flax modules, can have a dtype."""
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic))


def scalar(loss_fn: Callable[..., Any]) -> Callable[..., jax.Array]:
    """loss_fn, with an error while it is traced if it does not return a real scalar."""

    def checked(*arguments):
        loss = loss_fn(*arguments)
        if isinstance(loss, (tuple, list)):
            raise TypeError(
                "loss_fn must return the loss alone; it returned "
                f"{len(loss)} values. If the first of them is the loss, pass "
                "lambda *arguments: loss_fn(*arguments)[0]."
            )
        is_number = isinstance(loss, (jax.Array, np.ndarray, np.generic, float))
        if not is_number or jnp.shape(loss) != ():
            returned = f"shape {jnp.shape(loss)}" if hasattr(loss, "shape") else loss
            raise TypeError(
                "loss_fn must return a scalar, the mean over the examples it is given; "
                f"it returned {returned}."
            )
        if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
            raise TypeError(
                f"loss_fn must return a real number, got {jnp.result_type(loss)}."
            )
        return jnp.asarray(loss)

    return checked


def one_loss(loss_fn: LossFn) -> Callable[..., jax.Array]:
    """`loss(params, *example)`, the loss of a batch that holds this one example."""

    def loss(params, *example):
        return scalar(loss_fn)(params, *jax.tree.map(lambda x: x[None], example))

    return loss


def mean_loss(
    loss_fn: LossFn, params: Any, data: Any, batch_size: int | None
) -> jax.Array:
    return mean_over_batches(
        lambda index, *batch: scalar(loss_fn)(params, *batch), data, batch_size
    )


def mean_loss_and_gradient(
    loss_fn: LossFn, params: Any, data: Any, batch_size: int | None
) -> tuple[jax.Array, Any]:
    return mean_over_batches(
        lambda index, *batch: jax.value_and_grad(scalar(loss_fn))(params, *batch),
        data,
        batch_size,
    )
