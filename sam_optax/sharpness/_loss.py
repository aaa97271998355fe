"""A loss that is a mean over examples: over all data, and of one example."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sam_optax.sharpness._batches import mean_over_batches

LossFn = Callable[..., Any]


def scalar(loss_fn: Callable[..., Any]) -> Callable[..., jax.Array]:
    """loss_fn, refused while it is traced if it returns anything but a real scalar."""

    def checked(*arguments):
        loss = loss_fn(*arguments)
        if isinstance(loss, (tuple, list)):
            raise TypeError(
                "loss_fn must return the loss alone; it returned "
                f"{len(loss)} values. Without its auxiliary output: "
                "lambda *arguments: loss_fn(*arguments)[0]."
            )
        if not isinstance(loss, (jax.Array, float)) or jnp.shape(loss) != ():
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
    """(params, *example) -> its loss, as that of a batch of one."""

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
