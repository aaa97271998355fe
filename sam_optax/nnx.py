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
from flax.errors import TraceContextError

from sam_optax import _tree
from sam_optax._doors.batch import loss_and_aux
from sam_optax._doors.value_and_grad import FirstPassOptions
from sam_optax._doors.value_and_grad import (
    value_and_ascent_grad as _value_and_ascent_grad,
)
from sam_optax._step import ValueSlot


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
    and what it changes is forgotten. What loss_fn itself assigns to variables that are
    trained is forgotten too: do that after the optimizer's update. With
    value_at="perturbed" it is the other way round: they advance as the second pass
    says, when the optimizer updates the model.

    Args:
      loss_fn: the model, and any further arguments, -> loss, or (loss, aux).
      wrt: the variables that are trained, the same as the optimizer's. Default
        `nnx.Param`.
      has_aux: whether loss_fn returns (loss, aux). Default False.
      report: whether the update reports on the step. After it, and in the same jitted
        function, `extra_args["report"].value` is the `sam_optax.Report`. Default False.
      options: value_at=, ascent_loss_fn=, data=, batch_argnums=, batch_argnames=, m=,
        map_groups=, axis_name=, sync_perturbation= and axis_index_groups=, as for
        `sam_optax.sam_value_and_grad`, where argument 0 is the model. Under m=, what
        the groups make of floating-point variables is averaged, and all groups begin
        with the same random streams, so that they draw the same dropout masks. Under
        axis_name=, variables that are not trained are those of the device.

    Returns:
      A function of the arguments of loss_fn that updates the model's other variables
      in place, and returns `(loss, gradients, extra_args)`, or
      `((loss, aux), gradients, extra_args)`, for
      `optimizer.update(model, gradients, **extra_args)`. With value_at="perturbed", an
      object comes in the place of the loss, whose attribute `value` is the loss, or
      (loss, aux), after the update.

    Raises:
      ValueError: as `sam_optax.value_and_ascent_grad`; if the model has no variables of
        the kind wrt; if loss_fn adds variables to the model, as `sow` does, or changes
        a module, a metric or random streams that are among its further arguments.

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
    ascent_loss_fn = options.pop("ascent_loss_fn", None)
    first_pass_of = functools.partial(_value_and_ascent_grad, report=report, **options)
    first_pass_of(loss_fn, ascent_loss_fn=ascent_loss_fn)

    def value_and_ascent_grad_fn(model, /, *args, **kwargs):
        graph, params, others = nnx.split(model, wrt, ...)
        if not jax.tree.leaves(params):
            raise ValueError(
                f"The model has no variables to train: none is of the kind {wrt!r}, "
                "which is wrt=. For adapters, replace layers of the model by ones that "
                "have them, such as nnx.LoRALinear."
            )
        # Values, not the variables: these will have advanced at the second pass.
        others = nnx.as_pure(others)

        def pure(loss_fn):
            @functools.wraps(loss_fn)
            def pure_loss_fn(params, *args, **kwargs):
                copied = nnx.merge(graph, params, others, copy=True)
                try:
                    returned = loss_fn(copied, *args, **kwargs)
                except TraceContextError as error:
                    raise ValueError(_CHANGED_ARGUMENT) from error
                loss, aux = loss_and_aux(returned, has_aux)
                _, trained, changed = nnx.split(copied, wrt, ...)
                _check_same_variables(params, nnx.as_pure(trained))
                return loss, (aux, nnx.as_pure(changed))

            return pure_loss_fn

        def updated(value):
            """The user's value, after the model's other variables have advanced."""
            loss, (aux, changed) = value
            _check_same_variables(others, changed)
            if options.get("m") is not None:
                changed = _tree.mean_of_groups(changed)
            nnx.update(model, changed)
            return loss, aux

        first_pass = first_pass_of(
            pure(loss_fn),
            has_aux=True,
            ascent_loss_fn=ascent_loss_fn and pure(ascent_loss_fn),
        )
        value, gradients, extra_args = first_pass(nnx.as_pure(params), *args, **kwargs)
        if isinstance(value, ValueSlot):
            value = _UpdatingSlot(has_aux, updated)
            choice = extra_args["grad_fn"].replace(value_slot=value)
            extra_args["grad_fn"] = choice
        else:
            loss, aux = updated(value)
            value = (loss, aux) if has_aux else loss
        # The optimizer looks for variables of the kind that it trains.
        gradients = jax.tree.unflatten(
            jax.tree.structure(params), jax.tree.leaves(gradients)
        )
        return value, gradients, extra_args

    return value_and_ascent_grad_fn


class _UpdatingSlot(ValueSlot):
    """Updates the model when the update of the optimizer says what has changed."""

    def __init__(self, has_aux: bool, updated: Callable[[Any], Any]) -> None:
        super().__init__(has_aux)
        self._updated = updated

    def __call__(self, value: Any) -> None:
        super().__call__(self._updated(value))


_CHANGED_ARGUMENT = (
    "loss_fn changes an object of Flax NNX that is not the model, such as an nnx.Rngs, "
    "an nnx.Metric, or another model with batch normalisation or dropout, among its "
    "arguments or closed over. It cannot be changed while gradients are taken. Make "
    "random streams a part of the model; return what a metric needs as the auxiliary "
    "output (has_aux=True), and update the metric after the gradients; switch another "
    "model to eval(), or make both models parts of one, and choose which is trained by "
    "wrt=, such as nnx.All(nnx.Param, nnx.PathContains('generator')). If it is a part "
    "of the model, inside of jax.checkpoint, jax.jit or jax.lax, take nnx.remat, "
    "nnx.jit and the like instead."
)


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
