"""For Flax NNX: the gradients and extra arguments that `nnx.Optimizer.update` takes.

    import sam_optax.nnx

`nnx.Optimizer.update` rebuilds the gradients that it is given, so that nothing can ride
on them, but it forwards keyword arguments to the update. This module is the only one
that imports Flax.
"""

import functools
from collections.abc import Callable
from typing import Any, Unpack

import jax
from flax import nnx

from sam_optax import _tree
from sam_optax._doors.batch import loss_and_aux
from sam_optax._doors.value_and_grad import FirstPassOptions
from sam_optax._doors.value_and_grad import (
    value_and_ascent_grad as _value_and_ascent_grad,
)


def value_and_ascent_grad(
    loss_fn: Callable[..., Any],
    *,
    wrt: Any = nnx.Param,
    has_aux: bool = False,
    report: bool = False,
    **options: Unpack[FirstPassOptions],
) -> Callable[..., tuple[Any, Any, dict[str, Any]]]:
    """Like `nnx.value_and_grad`, with what the optimizer needs for the second gradient.

    The model's random streams, batch statistics and other variables advance once per
    step, as those of a plain step do: in the pass at the parameters. The second pass
    starts from a copy of what they were before it, so it sees the same dropout masks,
    and what it changes is forgotten.

    Args:
      loss_fn: the model, and any further arguments, -> loss, or (loss, aux).
      wrt: the variables that are trained, the same as the optimizer's. Default
        `nnx.Param`.
      has_aux: whether loss_fn returns (loss, aux). Default False.
      report: whether the update reports on the step. After it, and in the same jitted
        function, `extra_args["report"].value` is the `sam_optax.Report`. Default False.
      options: data=, batch_argnums=, batch_argnames=, m=, map_groups=, axis_name=,
        sync_perturbation= and axis_index_groups=, as for
        `sam_optax.sam_value_and_grad`, where argument 0 is the model. Under m=, what
        the groups make of floating-point variables is averaged. Under axis_name=,
        variables that are not trained are those of the device.

    Returns:
      A function of the arguments of loss_fn that updates the model's other variables
      in place, and returns `(loss, gradients, extra_args)`, or
      `((loss, aux), gradients, extra_args)`, for
      `optimizer.update(model, gradients, **extra_args)`.

    Raises:
      ValueError: as `sam_optax.value_and_ascent_grad`; if loss_fn adds variables to the
        model, as `sow` does.

    Examples:
      >>> import jax.numpy as jnp, optax, sam_optax, sam_optax.nnx
      >>> from flax import nnx
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> tx = optax.chain(sam_optax.sam(rho=0.05), optax.sgd(0.1))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> gradients = sam_optax.nnx.value_and_ascent_grad(
      ...     lambda model, x: jnp.mean(model(x) ** 2))
      >>> @nnx.jit
      ... def train_step(model, optimizer, x):
      ...     loss, grads, extra_args = gradients(model, x)
      ...     optimizer.update(model, grads, **extra_args)
      ...     return loss
      >>> losses = [train_step(model, optimizer, jnp.ones((4, 2))) for _ in range(9)]
      >>> bool(losses[-1] < losses[0])
      True

    Cost: one gradient; the other is taken in the update.
    """

    # Built here for what it raises; each step builds its own, over its own model.
    first_pass_of = functools.partial(_value_and_ascent_grad, report=report, **options)
    first_pass_of(loss_fn)

    def value_and_ascent_grad_fn(model, /, *args, **kwargs):
        graph, params, others = nnx.split(model, wrt, ...)
        # Values, not the variables: these will have advanced at the second pass.
        others = nnx.as_pure(others)

        @functools.wraps(loss_fn)
        def pure_loss_fn(params, *args, **kwargs):
            copied = nnx.merge(graph, params, others, copy=True)
            loss, aux = loss_and_aux(loss_fn(copied, *args, **kwargs), has_aux)
            return loss, (aux, nnx.as_pure(nnx.split(copied, wrt, ...)[2]))

        first_pass = first_pass_of(pure_loss_fn, has_aux=True)
        (loss, (aux, changed)), gradients, extra_args = first_pass(
            nnx.as_pure(params), *args, **kwargs
        )
        _check_same_variables(others, changed)
        if options.get("m") is not None:
            changed = _tree.mean_of_groups(changed)
        nnx.update(model, changed)
        # The optimizer looks for variables of the kind that it trains.
        gradients = jax.tree.unflatten(
            jax.tree.structure(params), jax.tree.leaves(gradients)
        )
        return ((loss, aux) if has_aux else loss), gradients, extra_args

    return value_and_ascent_grad_fn


def _check_same_variables(before: Any, after: Any) -> None:
    """Refuses variables that a pass adds: they cannot leave the gradient's trace."""
    known = {path for path, _ in nnx.to_flat_state(before)}
    added = [path for path, _ in nnx.to_flat_state(after) if path not in known]
    if added:
        raise ValueError(
            f"loss_fn adds the variable {'.'.join(map(str, added[0]))} to the model, "
            "as sow does. Return such values as its auxiliary output, with "
            "has_aux=True, or create the variable beforehand."
        )
