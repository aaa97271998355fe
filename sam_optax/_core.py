"""`sharpness_aware`: one ascent, one descent and one cadence make a SAM method."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sam_optax import _tree
from sam_optax._ascent import (
    Mask,
    VouchingAscent,
    require_params,
    resolve_mask,
    restrict,
)
from sam_optax._cadence import Cadence, every_step
from sam_optax._carrier import Report, SharpnessAwareGradients
from sam_optax._guard import has_values, revert_unless
from sam_optax._perturb import (
    round_stochastically,
    round_to_nearest,
    warn_of_lost_digits,
)
from sam_optax._random import Key, key_stream


class SharpnessAwareState(NamedTuple):
    """State of a SAM transformation; the base optimizer's state is not in it."""

    ascent_state: optax.OptState
    descent_state: optax.OptState
    cadence_state: Any
    rounding_key: Any  # uint32 key data under stochastic rounding, else empty


class Evaluation(NamedTuple):
    """What a grad_fn may return in place of a gradient, to report the losses with it.

    Both on the examples of the gradient: at the point, and at the parameters.
    """

    gradient: Any
    loss: jax.typing.ArrayLike
    unperturbed_loss: jax.typing.ArrayLike


@dataclasses.dataclass(frozen=True)
class GradFn:
    """A grad_fn whose two gradients see different examples.

    Attributes:
      descent: point -> `Evaluation` on the examples that the step descends on.
      ascent: point -> the same on those that the perturbation is made from.
      recompute: whether the gradient that the update gets is the ascent's alone, so
        that whoever needs the descent's at w must take it anew.
    """

    descent: Callable[[Any], Any]
    ascent: Callable[[Any], Any]
    recompute: bool = False

    def __call__(self, point: Any) -> Any:
        return self.descent(point)

    def map(self, change: Callable[[Callable], Callable]) -> "GradFn":
        """The same with both functions changed."""
        return GradFn(change(self.descent), change(self.ascent), self.recompute)


class _Step(NamedTuple):
    """What a step yields, whether or not it took a second gradient."""

    d: Any
    descent_state: Any
    measured: Any  # _Measured if a report is wanted, else empty


class _Measured(NamedTuple):
    """What a report tells of the perturbed point."""

    perturbed_loss: jax.Array
    surrogate_gap: jax.Array
    descent_norm: jax.Array
    cosine: jax.Array
    perturbation_norm: jax.Array


class _GroupMeasured(NamedTuple):
    """What one group of examples contributes to a report."""

    descent_gradient: Any
    perturbed_loss: jax.typing.ArrayLike
    surrogate_gap: jax.typing.ArrayLike
    perturbation_norm: jax.Array


def sharpness_aware(
    ascent: optax.GradientTransformation,
    *,
    descent: optax.GradientTransformation | None = None,
    cadence: Cadence | None = None,
    mask: Mask = None,
    guard: bool = True,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Composes a sharpness-aware transformation from its axes.

    .. math::
      \varepsilon = \mathrm{ascent}(g, w), \qquad
      g^a = \nabla L(w + \varepsilon), \qquad
      d = \mathrm{descent}(g^a;\, g, \varepsilon, w)

    with g = ∇L(w). The result maps g to d, and comes first in a chain, before any base
    optimizer; what follows (clipping, weight decay, accumulation) sees d.

    Args:
      ascent: transformation g ↦ ε. It sees the parameters, and `grad_fn=`, `perturb=`
        (params, ε -> w + ε in the dtype of w, for points on the way to take gradients
        at), `ascent_gradient=` (g, for the later parts of a chain) and `group=` as
        extra arguments. Its update runs on every step.
      descent: transformation gᵃ ↦ d with the extra arguments `ascent_gradient=` and
        `perturbation=`. Default None: d = gᵃ. It must give d = g when gᵃ = g.
      cadence: on which steps the second gradient is taken. Default None: on all.
      mask: where False, ε = 0; the gradient is real everywhere. A tree of bools (or a
        prefix of one), or a function of the parameters that returns one. Norms run
        over the perturbed leaves. Default None: every leaf is perturbed, including
        those that the optimizer freezes.
      guard: after a step whose g is not finite, values in the state (floats and masks)
        are as before the step, while counters and random keys advance; and if it
        ascended, d is not finite either, whatever the loss makes of w + ε. Needs to
        know whether g is finite: a pass over g, unless the method carries no values
        and ascend=False, or the ascent takes a 2-norm that says the same, as that of
        `sam`, `asam`, `fsam`, `fasam`, `vasso` and `fisher_sam` does without a mask.
        What is carried needs up to three more, because the old values are kept as well.
        Default True.
      stochastic_rounding: a key (int, typed or legacy) with which w + ε is rounded to
        half-precision parameters without bias. The price is noise: the actual
        displacement is usually 2 to 5 rho. Default None: round to nearest, and warn
        where parameters are half-precision.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Its update is

          update(g, state, params, *, grad_fn, per_group=None, ascend=None, **extra)

      - grad_fn: parameters -> gradient of the same loss on the same batch.
      - ascend: overrides the cadence for this step. A Python bool specialises the
        program when it is traced, a traced bool becomes a `lax.cond`.
      - per_group: how the path from a group's gradient to its d is mapped over groups
        of examples and averaged: a function of `path`, where
        `path(group_gradient, group_grad_fn, group_index)` returns a tree, and per_group
        the mean of these trees over the groups. g is then the mean over all groups; on
        a step that is known to ascend it is taken from there. Carried state follows g
        alone, so it is the same on all devices.
      - extra: forwarded to ascent and descent; unknown names are ignored.

    Raises:
      ValueError: from update, if params or grad_fn is missing, or grad_fn returns
        something that is not a gradient.

    Examples:
      SAM on f(w) = w², from w = 1: ε = 0.5, so d = 2 · 1.5 = 3.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> sam = sam_optax.sharpness_aware(sam_optax.sam_ascent(rho=0.5))
      >>> tx = optax.chain(sam, optax.sgd(0.1))
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> w = jnp.array(1.0)
      >>> state = tx.init(w)
      >>> updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
      >>> round(float(optax.apply_updates(w, updates)), 6)
      0.7

    Cost: two gradients on a step that ascends, one on a step that does not.
    """
    _check_axes(ascent, descent, cadence)
    if mask is not None:
        ascent = restrict(ascent, mask)
    ascent = optax.with_extra_args_support(ascent)
    descent = optax.with_extra_args_support(
        optax.identity() if descent is None else descent
    )
    cadence = every_step() if cadence is None else cadence
    keys = None if stochastic_rounding is None else key_stream(stochastic_rounding)
    warned = False

    def warn_once(params):
        nonlocal warned
        if keys is None and not warned:
            perturbed = jax.tree.map(lambda _: True, params)
            if mask is not None:
                perturbed = resolve_mask(mask, params)
            warned = warn_of_lost_digits(params, perturbed)

    def init_fn(params):
        return SharpnessAwareState(
            ascent_state=ascent.init(params),
            descent_state=descent.init(params),
            cadence_state=cadence.init(params),
            rounding_key=() if keys is None else keys.start(),
        )

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        grad_fn: Any = None,
        per_group: Callable[[Callable[..., Any]], Any] | None = None,
        ascend: Any = None,
        value: Any = None,
        carry_state: bool = False,
        carry_report: bool = False,
        **extra_args: Any,
    ) -> Any:
        if isinstance(updates, SharpnessAwareGradients):
            return updates.unpack()
        _check_call(updates, params, grad_fn)
        warn_once(params)

        g = updates
        evaluate = _checked(grad_fn, like=g)
        if value is not None:
            extra_args["value"] = value

        def perturb(params, perturbation, group):
            if keys is None:
                return round_to_nearest(params, perturbation)
            key, _ = keys.next(state.rounding_key, group)
            return round_stochastically(params, perturbation, key)

        def plain_gradient(g, evaluate):
            """The gradient at w that gᵃ is to be compared with, on its examples."""
            return evaluate.descent(params).gradient if evaluate.recompute else g

        def ascend_from(g, evaluate, group=None, **for_ascent):
            g = _tree.at_least_float32(g)
            return ascent.update(
                g,
                state.ascent_state,
                params,
                ascent_gradient=g,
                grad_fn=lambda point: evaluate.ascent(point).gradient,
                perturb=lambda params, e: perturb(params, e, group),
                group=group,
                **for_ascent,
                **extra_args,
            )

        def descend(descent_gradient, g, perturbation, group=None):
            d, descent_state = descent.update(
                _tree.at_least_float32(descent_gradient),
                state.descent_state,
                params,
                ascent_gradient=_tree.at_least_float32(g),
                perturbation=perturbation,
                group=group,
                **extra_args,
            )
            return d, descent_state

        def second_half(plain, evaluate, perturbation, group=None):
            there = evaluate.descent(perturb(params, perturbation, group))
            d, descent_state = descend(there.gradient, plain, perturbation, group)
            measured = ()
            if carry_report:
                gap = there.loss - there.unperturbed_loss
                radius = _tree.norm(perturbation)
                measured = _GroupMeasured(there.gradient, there.loss, gap, radius)
            return _Step(d, descent_state, measured)

        def path(group_gradient, group_grad_fn, group=None):
            evaluate = _checked(group_grad_fn, like=group_gradient)
            perturbation, _ = ascend_from(group_gradient, evaluate, group)
            plain = plain_gradient(group_gradient, evaluate)
            return second_half(plain, evaluate, perturbation, group)

        def path_with_gradient(group_gradient, group_grad_fn, group=None):
            return path(group_gradient, group_grad_fn, group), group_gradient

        decision, cadence_state = cadence.decide(g, state.cadence_state)
        decision = _decision(decision if ascend is None else ascend)
        grouped = None
        if per_group is not None and decision is True:
            # The path begins with the gradient of each group. Their mean is g, and who
            # takes them one after another need not go through them twice.
            grouped, g = per_group(path_with_gradient)

        # The ascent runs on every step, so that its averages and schedules do not lag.
        verdicts: list[jax.Array] = []
        for_ascent = {}
        if isinstance(ascent, VouchingAscent) and decision is not False:
            for_ascent["vouch"] = verdicts.append
        perturbation, ascent_state = ascend_from(g, evaluate, **for_ascent)

        def step_with_second_gradient():
            plain = plain_gradient(g, evaluate)
            if per_group is None:
                step = second_half(plain, evaluate, perturbation)
            else:
                step = per_group(path) if grouped is None else grouped
                own_state = descend_from_equal()[1]
                step = step._replace(
                    descent_state=_floats_of(step.descent_state, own_state)
                )
            step = step._replace(d=_tree.cast_like(step.d, g))
            if carry_report:
                step = step._replace(measured=_measured(g, step.measured, value))
            return step, cadence.remember(step.d, plain, cadence_state)

        def step_without():
            plain = plain_gradient(g, evaluate)
            d = _tree.cast_like(cadence.substitute(plain, cadence_state), g)
            measured = _not_measured(g, value) if carry_report else ()
            return _Step(d, descend_from_equal()[1], measured), cadence_state

        def descend_from_equal():
            # With gᵃ = g a descent returns g; it runs for its counters' sake.
            return descend(g, g, _tree.zeros_like(g))

        if decision is True:
            step, cadence_state = step_with_second_gradient()
        elif decision is False:
            step, cadence_state = step_without()
        else:
            step, cadence_state = jax.lax.cond(
                decision, step_with_second_gradient, step_without
            )

        d, descent_state = step.d, step.descent_state
        if guard:
            finite = verdicts[0] if verdicts else _tree.all_finite(g)
            # Only what depends on gᵃ is judged by it: a pass over d is saved otherwise.
            both = finite
            if has_values((descent_state, cadence_state)):
                both &= _tree.all_finite(d)
            ascent_state = revert_unless(finite, ascent_state, state.ascent_state)
            descent_state = revert_unless(both, descent_state, state.descent_state)
            cadence_state = revert_unless(both, cadence_state, state.cadence_state)
            # At w + NaN, a rectifier can have a gradient of zero. At w, what is not
            # finite shows by itself: where that is known, the norm of g is not needed.
            d = _tree.scale(jnp.where(~finite & decision, jnp.nan, 1), d)
        rounding_key = () if keys is None else keys.next(state.rounding_key)[1]
        new_state = SharpnessAwareState(
            ascent_state, descent_state, cadence_state, rounding_key
        )
        if not carry_state:
            return d, new_state
        report = _report(g, step.measured, decision) if carry_report else None
        return SharpnessAwareGradients(d, new_state, report), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _floats_of(averaged: Any, exact: Any) -> Any:
    """State whose floats are means over groups; counters and keys have no mean."""
    return jax.tree.map(
        lambda mean, own: mean if _tree.is_inexact(own) else own, averaged, exact
    )


def _measured(g: Any, groups: _GroupMeasured, value: Any) -> _Measured:
    norm = _tree.norm(g)
    return _Measured(
        jnp.asarray(groups.perturbed_loss, value.dtype),
        jnp.asarray(groups.surrogate_gap, value.dtype),
        jnp.asarray(_tree.norm(groups.descent_gradient), norm.dtype),
        jnp.asarray(_tree.cosine(g, groups.descent_gradient), norm.dtype),
        jnp.asarray(groups.perturbation_norm, norm.dtype),
    )


def _not_measured(g: Any, value: Any) -> _Measured:
    # Products, so that they vary over the same mesh axes as what was measured would.
    loss, norm = value * jnp.nan, _tree.norm(g) * jnp.nan
    return _Measured(loss, loss, norm, norm, norm)


def _report(g: Any, measured: _Measured, decision: bool | jax.Array) -> Report:
    return Report(
        ascent_norm=_tree.norm(g),
        ascended=jnp.asarray(decision),
        **measured._asdict(),
    )


def _decision(ascend: Any) -> bool | jax.Array:
    if isinstance(ascend, (bool, np.bool_)):
        return bool(ascend)
    if not isinstance(ascend, (jax.Array, np.ndarray)) or (
        ascend.shape != () or ascend.dtype != jnp.bool_
    ):
        raise TypeError(f"ascend must be a bool or a scalar bool array, got {ascend!r}")
    return jnp.asarray(ascend)


def _check_call(updates: Any, params: Any, grad_fn: Any) -> None:
    """Contracts of the call, each with the remedy for the door it came through."""
    require_params(params, "A SAM transformation")
    if grad_fn is None:
        raise ValueError(
            "A SAM transformation needs the gradient at the perturbed parameters. "
            "Either pass grad_fn= (parameters -> gradient, on the same batch) to "
            "tx.update, as nnx.Optimizer.update forwards it; or compute the gradients "
            "with sam_optax.sam_value_and_grad and pass these on unchanged. Flax "
            "Linen's TrainState.apply_gradients forwards no extra arguments to "
            "tx.update, so there it must be sam_value_and_grad."
        )
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    if any(isinstance(leaf, optax.MaskedNode) for leaf in leaves):
        raise ValueError(
            "A SAM transformation inside optax.masked or optax.partition sees only "
            "part of the parameters, and the loss needs all of them. Put it outside, "
            "first in the chain, and choose what it perturbs with its mask= argument."
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = f"params{jax.tree_util.keystr(path)} is {jnp.result_type(leaf)}: "
        if not _tree.is_inexact(leaf):
            raise TypeError(
                name + "only floating-point parameters have gradients. Keep others out "
                "of params, as eqx.partition or nnx.split do."
            )
        if jnp.iscomplexobj(leaf):
            raise TypeError(
                name + "the gradient that JAX takes is the conjugate of the direction "
                "in which the loss rises. Keep the real and the imaginary part as "
                "parameters of their own."
            )
    if _outline(updates) != _outline(params):
        raise ValueError(
            "The gradient and the parameters have different structures or shapes: "
            f"{_outline(updates)} and {_outline(params)}."
        )


def _outline(tree: Any) -> tuple[Any, list[tuple[int, ...]]]:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [jnp.shape(leaf) for leaf in leaves]


def _check_axes(ascent: Any, descent: Any, cadence: Any) -> None:
    for name, part in (("ascent", ascent), ("descent", descent)):
        is_missing = part is None and name == "descent"
        if not is_missing and not isinstance(part, optax.GradientTransformation):
            raise TypeError(
                f"{name} must be an optax.GradientTransformation, got {part!r}."
            )
    if cadence is not None and not isinstance(cadence, Cadence):
        raise TypeError(f"cadence must be a sam_optax.Cadence, got {cadence!r}.")


def _checked(grad_fn: Callable, like: Any) -> GradFn:
    """grad_fn with its results checked, and the loss NaN if it returns none."""
    outline = _outline(like)

    def check(function):
        def evaluate(point):
            result = function(point)
            if not isinstance(result, Evaluation):
                unknown = np.float32("nan")
                result = Evaluation(result, unknown, unknown)
            if _outline(result.gradient) != outline:
                raise ValueError(
                    "grad_fn must return the gradient alone, with the structure and "
                    f"shapes of the parameters, {outline}; it returned "
                    f"{_outline(result.gradient)}. From a function with has_aux=True "
                    "or from jax.value_and_grad, take the gradient out: "
                    "grad_fn=lambda params: grad_with_aux(params)[0]."
                )
            return result

        return evaluate

    if not isinstance(grad_fn, GradFn):
        grad_fn = GradFn(grad_fn, grad_fn)
    return grad_fn.map(check)
