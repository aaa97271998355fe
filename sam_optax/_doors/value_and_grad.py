"""The helpers that take the gradients of a step: one for each door."""

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, Unpack

import optax

from sam_optax._doors.batch import (
    DataRule,
    another_ascent,
    check_argnums,
    choose,
    make_batch,
    same_batch,
    with_aux,
)
from sam_optax._doors.devices import check_loss_is_averaged
from sam_optax._doors.find_state import find_sam_state, sam_state_of
from sam_optax._doors.grouping import Grouping, make_grouping
from sam_optax._step import ReportSlot, SharpnessAwareGradients, ValueSlot
from sam_optax._step.inputs import check_params


class FirstPassOptions(TypedDict, total=False):
    """The options that all helpers have in common; see `sam_value_and_grad`."""

    value_at: str
    ascent_loss_fn: Callable[..., Any] | None
    data: DataRule | None
    batch_argnums: int | Sequence[int] | None
    batch_argnames: str | Sequence[str]
    m: int | None
    map_groups: str | None
    axis_name: str | Sequence[str] | None
    sync_perturbation: bool | str | Sequence[str]
    axis_index_groups: Sequence[Sequence[int]] | None


def sam_value_and_grad(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    report: bool = False,
    value_at: str = "parameters",
    ascent_loss_fn: Callable[..., Any] | None = None,
    data: DataRule | None = None,
    batch_argnums: int | Sequence[int] | None = None,
    batch_argnames: str | Sequence[str] = (),
    m: int | None = None,
    map_groups: str | None = None,
    axis_name: str | Sequence[str] | None = None,
    sync_perturbation: bool | str | Sequence[str] = True,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Callable[..., tuple[Any, SharpnessAwareGradients]]:
    """Like `jax.value_and_grad`, with the sharpness-aware gradient of `tx`.

    The value and the auxiliary output are those at the parameters themselves, unless
    you ask for others; only the gradients come from the perturbed point. Both passes
    get the same arguments, so the same batch and the same dropout key.

    Args:
      loss_fn: parameters, and any further arguments, -> loss, or (loss, aux). If the
        loss has a shape, its mean is taken. loss_fn must not have parameters of the
        names that the returned function takes for itself, listed below.
      tx: the SAM transformation alone, or `optax.inject_hyperparams` of it, and not the
        chain. It must be the same object that starts the chain, or one that is built
        in the same way; the chain's update raises if the two differ.
      has_aux: whether loss_fn returns (loss, aux). Default False.
      report: whether the gradients carry a `Report` of the step, at
        `gradients.report`. What is not used is not computed. Default False.
      value_at: where the loss and the auxiliary output, such as metrics and new batch
        statistics, are taken. `"parameters"` (default): at w. `"perturbed"`: from the
        pass that gives the gradient d is made of, at w + ε, or at w on a step that does
        not ascend. A method such as `msam`, which takes no gradient at w, then needs no
        other pass; with the default, such a method needs a forward pass more if the
        loss or the auxiliary output is used. "perturbed" does not go with m= or with
        perturbations per device.
      ascent_loss_fn: a loss of its own for the gradient from which ε is made, as a
        function of the same arguments, with an auxiliary output if loss_fn has one
        (which is not used). Everything else, d above all, comes from loss_fn. Default
        None: the same loss.
      data: which examples each of the two gradients sees: `data.sub_batch`,
        `data.largest_increase`, `data.k_sam`, or a rule of your own. Default None: both
        see the whole batch.
      batch_argnums: the arguments of loss_fn that hold examples along their first axis,
        numbered as in `jax.value_and_grad` (0 is the parameters). Only read where
        examples are chosen. Default 1; if another argument then has a first axis of the
        same length, you must say which arguments hold examples.
      batch_argnames: the same for arguments that are passed by keyword only. Default
        none.
      m: one perturbation for each m examples of the batch, in their order, instead of
        one for all of them: m-sharpness. It must divide the batch, and the loss be a
        mean over examples. d is the mean over the groups, and the auxiliary output,
        which must be arrays, gains an axis of groups. Default None: one perturbation.
      map_groups: how the groups of m run: `"vmap"` together, `"unroll"` in a program
        that contains each, `"scan"` one after another, which needs the memory of one
        group only, and costs a forward pass more. Default None: under jit with several
        devices `"vmap"`; else, and with parameters that are spread over a mesh of
        explicit axes, `"unroll"` up to 16 groups, and `"scan"` beyond.
      axis_name: the axis, or axes, of a `pmap` or `shard_map` over which the batch is
        spread. Gradients and the loss are averaged over it; do not do so again. The
        auxiliary output is that of the device. Default None: under `jit` with sharded
        arrays, and on one device, there is none to name.
      sync_perturbation: whether all devices of the axis share one perturbation, that of
        the global batch (True, default), or each has its own (False), that of its
        examples: the setting of the published results. With several axes, the names of
        those along which it is shared.
      axis_index_groups: lists of indices along the one axis, of equal length: the
        devices of each list share a perturbation. It does not work under `shard_map`
        with check_vma, where JAX supports no index groups; use a mesh of two axes
        there. Default None.

    Returns:
      A function of the arguments of loss_fn that also takes

      - opt_state (required): the state of the whole optimizer, in which the SAM state
        is found by its class.
      - ascend: overrides the cadence for this step, as in `sharpness_aware`.
      - ascent_batch: other examples for the gradient from which ε is made, in the place
        of those of `batch_argnums` (a tuple for several), of any number. A method that
        compares gᵃ with the gradient at w, and a step that does not ascend, take that
        gradient on the batch itself.
      - extra_args: a dict of extra arguments for the update of `tx`, such as the
        `full_gradient` of `sam_full`.

      It returns (loss, gradients), or ((loss, aux), gradients). The gradients act as
      the sharpness-aware gradient, and bring the next SAM state with them: give them to
      the optimizer's update in the same jitted function.

    Raises:
      ValueError: when building, if loss_fn has a parameter of a name given above; when
        called, if opt_state is missing, or holds no SAM state, or several, or one of
        another transformation, or another transformation comes before SAM in its chain,
        or if tx is not the SAM transformation itself; if the batch is not where
        batch_argnums says, ascent_batch does not match it, m does not divide it, or
        options contradict each other. The update that takes the gradients raises if
        another transformation made them, or if they carry on from another state.
      TypeError: if loss_fn is a gradient, or returns something that is not a loss; if
        the parameters are a whole model, or hold other things than numbers.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> sam = sam_optax.sam(rho=0.5)
      >>> tx = optax.chain(sam, optax.sgd(0.1))
      >>> loss_and_grads = sam_optax.sam_value_and_grad(lambda w: w**2, sam)
      >>> @jax.jit
      ... def step(w, opt_state):
      ...     loss, grads = loss_and_grads(w, opt_state=opt_state)
      ...     updates, opt_state = tx.update(grads, opt_state, w)
      ...     return optax.apply_updates(w, updates), opt_state, loss
      >>> w = jnp.array(1.0)
      >>> w, opt_state, loss = step(w, tx.init(w))
      >>> print(f"{loss:.1f} {w:.1f}")
      1.0 0.7

    Cost: two gradients on a step that ascends, one on a step that does not; the data
    rules say what they change. With ascent_batch, a forward pass of the batch comes on
    top if the loss or the auxiliary output is used.
    """
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            "The second argument of sam_value_and_grad must be the SAM transformation "
            f"(an optax.GradientTransformation), got {type(tx).__name__}."
        )
    own_keywords = ("opt_state", "ascend", "ascent_batch", "extra_args")
    _check_parameter_names(loss_fn, own_keywords, "sam_value_and_grad")
    first_pass = _make_first_pass(
        loss_fn,
        has_aux,
        value_at=value_at,
        ascent_loss_fn=ascent_loss_fn,
        data=data,
        batch_argnums=batch_argnums,
        batch_argnames=batch_argnames,
        m=m,
        map_groups=map_groups,
        axis_name=axis_name,
        sync_perturbation=sync_perturbation,
        axis_index_groups=axis_index_groups,
    )
    update = optax.with_extra_args_support(tx).update

    @_named_after(loss_fn, "sam_value_and_grad")
    def value_and_grad_fn(
        params,
        /,
        *args,
        opt_state=None,
        ascend=None,
        ascent_batch=None,
        extra_args: Mapping[str, Any] | None = None,
        **kwargs,
    ):
        _check_no_module(params)
        check_params(params)
        state: Any = find_sam_state(tx, opt_state, params)
        value, g, own_args = first_pass(params, args, kwargs, ascent_batch)
        slot = ReportSlot() if report else None
        made_by = []
        own_args |= {"ascend": ascend, "value": own_args["grad_fn"].loss}
        own_args |= {"report": slot, "maker": made_by.append}
        _check_extra_args(extra_args or {}, own_args)
        d, next_state = update(g, state, params, **(extra_args or {}), **own_args)
        if isinstance(value, ValueSlot):
            value = value.value
        return value, SharpnessAwareGradients(
            d,
            recipe=made_by[0],
            before=sam_state_of(state),
            state=sam_state_of(next_state),
            report=slot and slot.value,
        )

    return value_and_grad_fn


def value_and_ascent_grad(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    report: bool = False,
    **options: Unpack[FirstPassOptions],
) -> Callable[..., tuple[Any, optax.Updates, dict[str, Any]]]:
    """What a step passes to `tx.update`, where it calls that itself.

    `sam_value_and_grad` without the optimizer state: for frameworks that forward extra
    arguments to the update, and for the data rules there.

    Args:
      loss_fn: as for `sam_value_and_grad`.
      has_aux: as for `sam_value_and_grad`. Default False.
      report: whether the update reports on the step. After it, and in the same jitted
        function, `extra_args["report"].value` is the `Report`. Default False.
      options: value_at=, ascent_loss_fn=, data=, batch_argnums=, batch_argnames=, m=,
        map_groups=, axis_name=, sync_perturbation= and axis_index_groups=, as for
        `sam_value_and_grad`.

    Returns:
      A function of the arguments of loss_fn, and of ascent_batch, that returns
      `(loss, g, extra_args)`, or `((loss, aux), g, extra_args)`: the gradient g at the
      parameters, and a dict with the `grad_fn` for the perturbed point and whatever
      else the update needs to know. With value_at="perturbed", the loss is known only
      after the update. In its place comes an object whose attribute `value` is then the
      loss, or (loss, aux).

    Raises:
      ValueError: as `sam_value_and_grad`, as far as its arguments are here.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.sam(rho=0.5), optax.sgd(0.1))
      >>> gradients = sam_optax.value_and_ascent_grad(lambda w: w**2, report=True)
      >>> w = jnp.array(1.0)
      >>> loss, g, extra_args = gradients(w)
      >>> updates, _ = tx.update(g, tx.init(w), w, **extra_args)
      >>> print(f"{optax.apply_updates(w, updates):.1f}")
      0.7
      >>> print(extra_args["report"].value.perturbed_loss)
      2.25

    Cost: one gradient; the other is taken in the update.
    """
    unknown = set(options) - set(FirstPassOptions.__annotations__)
    if unknown:
        raise TypeError(
            f"value_and_ascent_grad got the unknown option {min(unknown)!r}; it takes "
            f"{', '.join(FirstPassOptions.__annotations__)}."
        )
    _check_parameter_names(loss_fn, ("ascent_batch",), "value_and_ascent_grad")
    first_pass = _make_first_pass(loss_fn, has_aux, **options)

    @_named_after(loss_fn, "value_and_ascent_grad")
    def value_and_ascent_grad_fn(params, /, *args, ascent_batch=None, **kwargs):
        value, g, extra_args = first_pass(params, args, kwargs, ascent_batch)
        if report:
            extra_args["report"] = ReportSlot()
        return value, g, extra_args

    return value_and_ascent_grad_fn


# (params, args, kwargs, ascent_batch) -> (loss or (loss, aux), g, extra arguments)
FirstPass = Callable[
    [Any, tuple[Any, ...], dict[str, Any], Any], tuple[Any, Any, dict[str, Any]]
]


def _make_first_pass(
    loss_fn: Callable[..., Any],
    has_aux: bool,
    *,
    value_at: str = "parameters",
    ascent_loss_fn: Callable[..., Any] | None = None,
    data: DataRule | None = None,
    batch_argnums: int | Sequence[int] | None = None,
    batch_argnames: str | Sequence[str] = (),
    **grouping_options: Any,
) -> FirstPass:
    """The function that takes the gradient at w; its options are checked here."""
    _check_is_loss(loss_fn)
    if ascent_loss_fn is not None:
        _check_is_loss(ascent_loss_fn, "ascent_loss_fn")
    check_argnums(batch_argnums, batch_argnames)
    if data is not None and not callable(data):
        raise TypeError(
            "data must be a data rule, such as sam_optax.data.sub_batch(0.25), got "
            f"{data!r}."
        )
    grouping = make_grouping(**grouping_options)
    _check_value_at(value_at, grouping)
    has_own_ascent = ascent_loss_fn is not None
    ascent_loss = (
        with_aux(ascent_loss_fn, has_aux, "ascent_loss_fn") if has_own_ascent else None
    )
    if has_own_ascent and data is not None:
        raise ValueError(
            "data= says how each gradient sees the one loss, and ascent_loss_fn= gives "
            "the ascent another one: pass one of them, and other examples for the "
            "ascent as ascent_batch=."
        )

    def first_pass(params, args, kwargs, ascent_batch):
        _check_no_module(params)
        check_params(params)
        rule = data or same_batch
        has_other_rule = data is not None or grouping_options.get("m") is not None
        if ascent_batch is not None and has_other_rule:
            raise ValueError(
                "ascent_batch= says which examples the ascent sees, and so does data= "
                "or m=: pass one of them."
            )
        if has_own_ascent or ascent_batch is not None:
            rule = another_ascent(ascent_loss, ascent_batch)
        batch = make_batch(
            loss_fn, has_aux, args, kwargs, batch_argnums, batch_argnames
        )
        if grouping is None:
            choice, per_group = choose(rule, batch, params), None
        else:
            choice, per_group = grouping.choose(rule, batch, params)
        seen = choice.seen
        check_loss_is_averaged(seen.loss, params)
        extra_args: dict[str, Any] = {"grad_fn": choice}
        if per_group is not None:
            extra_args["per_group"] = per_group
        value = (seen.loss, seen.aux) if has_aux else seen.loss
        if value_at == "perturbed":
            value = ValueSlot(has_aux)
            extra_args["grad_fn"] = choice.replace(value_slot=value)
        return value, seen.gradient, extra_args

    return first_pass


def _check_value_at(value_at: Any, grouping: Grouping | None) -> None:
    if value_at not in ("parameters", "perturbed"):
        raise ValueError(
            f"value_at must be 'parameters' or 'perturbed', got {value_at!r}."
        )
    if value_at == "perturbed" and grouping is not None and not grouping.is_one_group:
        raise ValueError(
            "value_at='perturbed' does not go with m= or with perturbations per "
            "device: each group would have a loss and auxiliary output of its own. "
            "With value_at='parameters' they are those of all, at no cost where the "
            "ascent follows the gradient."
        )


def _check_is_loss(loss_fn: Any, name: str = "loss_fn") -> None:
    """Refuses a gradient in the place of a loss: its mean would pass for one."""
    if not callable(loss_fn):
        raise TypeError(f"{name} must be a function, got {loss_fn!r}.")
    function = loss_fn.func if isinstance(loss_fn, functools.partial) else loss_fn
    # JAX writes so in the docstrings of what jax.grad and jax.value_and_grad return.
    words = str(getattr(function, "__doc__", None))
    is_gradient = words.startswith(("Gradient of ", "Value and gradient of "))
    if is_gradient and "with respect to positional argument(s) 0." in words:
        raise TypeError(
            f"{name} is a gradient, made by jax.grad or jax.value_and_grad. Pass the "
            "loss itself; the gradients are taken here."
        )


def _check_no_module(params: Any) -> None:
    nnx = sys.modules.get("flax.nnx")  # without it, there are no modules of it
    if nnx is not None and isinstance(params, nnx.Module):
        raise TypeError(
            "The parameters are a whole Flax NNX module, with its random streams and "
            "batch statistics. Use sam_optax.nnx.value_and_ascent_grad, which takes "
            "the module; or split it, graph, params, rest = nnx.split(model, "
            "nnx.Param, ...), and merge it again in loss_fn."
        )


def _check_parameter_names(
    loss_fn: Callable, own_keywords: Sequence[str], helper: str
) -> None:
    """Refuses a loss_fn whose parameters have names that a helper takes itself."""
    try:
        parameters = inspect.signature(loss_fn).parameters
    except (TypeError, ValueError):  # builtins have no signature, nor names to collide
        return
    # What a partial has bound already can no longer be passed by mistake.
    inner = inspect.unwrap(loss_fn)
    bound = inner.keywords if isinstance(inner, functools.partial) else {}
    taken = [key for key in own_keywords if key in parameters and key not in bound]
    if taken:
        raise ValueError(
            f"loss_fn has a parameter named {taken[0]!r}, which {helper} takes for "
            "itself; rename it, or wrap loss_fn."
        )


def _named_after(loss_fn: Callable, helper: str) -> Callable[[Callable], Callable]:
    """Names a function after loss_fn, whose docstring it carries over."""

    def rename(function):
        name = getattr(loss_fn, "__name__", "loss")
        function.__name__ = f"{helper}_{name}"
        own = (
            f"Loss and gradient of {name}, with its arguments and those that "
            f"sam_optax.{helper} lists."
        )
        doc = getattr(loss_fn, "__doc__", None)
        function.__doc__ = f"{own}\n\n{doc}" if doc else own
        return function

    return rename


def _check_extra_args(extra_args: Mapping[str, Any], own_args: Mapping[str, Any]):
    """Refuses extra arguments that a helper passes itself."""
    reserved = ({"per_group"} | set(own_args)) & set(extra_args)
    if reserved:
        raise ValueError(
            f"extra_args has {sorted(reserved)[0]!r}, which sam_value_and_grad passes "
            "itself."
        )
