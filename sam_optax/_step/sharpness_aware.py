"""`sharpness_aware`: one ascent, one descent and one cadence make a SAM method."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from sam_optax import _tree
from sam_optax._masks import Mask, check_selects, masked, resolve_mask, restrict
from sam_optax._parts import (
    Ascent,
    Cadence,
    as_ascent,
    as_descent,
    every_step,
    follow,
)
from sam_optax._random import Key
from sam_optax._rounding import Rounding
from sam_optax._step.carrier import SharpnessAwareGradients
from sam_optax._step.inputs import (
    NO_EFFECT,
    as_choice,
    check_axes,
    check_call,
    check_comparable,
    check_is_whole,
    note_auxiliary,
    noting,
    warn_if_descends,
)
from sam_optax._step.path import Path
from sam_optax._step.report import (
    AtPerturbed,
    Report,
    report_of,
    report_without_ascent,
)
from sam_optax._step.sameness import Recipe


class SharpnessAwareState(NamedTuple):
    """State of a SAM transformation; the base optimizer's state is not in it."""

    ascent_state: optax.OptState
    descent_state: optax.OptState
    cadence_state: Any
    rounding_key: Any  # uint32 key data under stochastic rounding, else empty


class Options(TypedDict, total=False):
    """The arguments of `sharpness_aware` that every named method passes on."""

    mask: Mask
    guard: bool
    stochastic_rounding: Key | None


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

    with g = ∇L(w). The result maps g to d. It comes first in a chain, before any base
    optimizer; what follows (clipping, weight decay, accumulation) sees d.

    Args:
      ascent: transformation g ↦ ε, such as `sam_optax.ascents.sam(rho)`. The namespace
        `sam_optax.ascents` says what it receives. Its update runs on every step. Of an
        ascent that makes no use of g, such as `ascents.msam`, no gradient is taken at
        w, unless something else uses it: a report, or a cadence that looks at it.
      descent: transformation gᵃ ↦ d, such as `sam_optax.descents.gsam()`. It should
        give d = g when gᵃ = g, because a step that does not ascend passes g on. Default
        None: d = gᵃ.
      cadence: on which steps the second gradient is taken, such as
        `sam_optax.cadences.every_k(5)`. Default None: on all.
      mask: where False, ε = 0; the gradient is real everywhere. A tree of bools (or a
        prefix of one), or a function of the parameters that returns one. Norms run
        over the perturbed leaves. Default None: every leaf is perturbed, including
        those that the optimizer freezes.
      guard: values that are not finite appear in d and never in the state. If g is not
        finite, floats and masks in the state keep their old values, while counters and
        random keys advance. If the step also ascended, d becomes NaN, because a loss
        can hide a NaN in w + ε. Where the ascent makes no use of g, d and ε are looked
        at in its place. Default True.

        The guard costs a pass over g, to see whether it is finite. It costs nothing
        where the ascent takes a 2-norm that shows it (that of `sam`, `asam`, `fsam`,
        `fasam`, `vasso` and `fisher_sam`), and where ascend=False and the method
        carries no values. Carried values cost up to three passes more, because the old
        ones are kept until the step is judged.
      stochastic_rounding: a key (int, typed or legacy) with which w + ε is rounded to
        half-precision parameters without bias. The price is noise: the actual
        displacement is usually 2 to 5 rho. Default None: round to nearest, and warn
        where parameters are half-precision.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Its update is

          update(g, state, params, *, grad_fn, per_group=None, ascend=None,
                 report=None, **extra_args) -> (d, state)

      - grad_fn: parameters -> gradient of the same loss on the same batch.
      - ascend: overrides the cadence for this step. A Python bool specialises the
        program when it is traced; a traced bool becomes a `lax.cond`.
      - per_group: for one perturbation per group of examples. A function that takes
        `path`, calls `path(g_i, grad_fn_i, i)` for each group i, and returns the mean
        of the results, which are trees. The argument g must be the mean of the g_i; if
        the step is known to ascend when it is traced, g is taken from this map instead.
        The state follows the mean gradients alone, so it is the same on all devices.
      - report: a function that is called with the `Report` of the step, when update is
        traced; so under jit it receives tracers.
      - extra_args: forwarded to ascent and descent; unknown names are ignored.

      Another argument, maker=, is for `sam_value_and_grad`: it learns in this way which
      transformation makes its gradients.

    Raises:
      ValueError: from init, if the transformation is inside of `optax.masked` or
        `optax.partition`, or if the mask is False for every parameter; from update, if
        params or grad_fn is missing, if grad_fn returns something that is not a
        gradient, or if a part of the ascent follows d, and what it is wrapped in does
        not hand d on; when building, if the descent compares gᵃ with g, and the ascent
        makes no use of g.
      TypeError: if ascent or descent is a whole SAM transformation.

    Warns:
      from init, if the ascent points against the gradient; from update, if parameters
      that are perturbed have half precision, and if the gradients are not those that
      came with a grad_fn of `value_and_ascent_grad`.

    Examples:
      SAM on f(w) = w², from w = 1: ε = 0.5, so d = 2 · 1.5 = 3.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> sam = sam_optax.sharpness_aware(sam_optax.ascents.sam(rho=0.5))
      >>> tx = optax.chain(sam, optax.sgd(0.1))
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> w = jnp.array(1.0)
      >>> state = tx.init(w)
      >>> updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
      >>> round(float(optax.apply_updates(w, updates)), 6)
      0.7

    Cost: two gradients on a step that ascends, one on a step that does not; one on each
    step if neither the ascent nor anything else uses g. Gradients that the ascent takes
    itself, as `ascents.ascend_repeatedly` does, are taken on every step, because its
    update runs on every step.
    """
    check_axes(ascent, descent, cadence)
    recipe = Recipe(ascent, descent, cadence, mask, guard, stochastic_rounding)
    ascent = as_ascent(ascent) if mask is None else restrict(ascent, mask)
    cadence = every_step() if cadence is None else cadence
    descent = as_descent(descent)
    something_compares = descent.compares or not cadence.forgets
    rounding = Rounding(stochastic_rounding)
    was_tried: list[bool] = []

    def init_fn(params: optax.Params) -> SharpnessAwareState:
        check_is_whole(params)
        if mask is not None:
            check_selects(mask, params)
        if not was_tried:
            was_tried.append(True)
            warn_if_descends(recipe.ascent)
        return SharpnessAwareState(
            ascent_state=ascent.init(params),
            descent_state=descent.init(params),
            cadence_state=cadence.init(params),
            rounding_key=rounding.init(),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: Any = None,
        *,
        grad_fn: Any = None,
        per_group: Callable[[Callable[..., Any]], Any] | None = None,
        ascend: bool | jax.Array | None = None,
        report: Callable[[Report], Any] | None = None,
        maker: Callable[[Recipe], Any] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        if isinstance(updates, SharpnessAwareGradients):
            return updates.unpack(recipe, state)
        check_call(updates, params, grad_fn, report, extra_args)
        g, passes = updates, as_choice(grad_fn, like=updates)
        check_comparable(passes, descent, cadence)
        must_be_asked = passes.only_ascent and not ascent.uses_gradient
        was_asked: list[Any] = []
        if must_be_asked:
            passes, was_asked = noting(passes)
        rounding.warn_of_lost_digits(params, mask)
        is_measured = report is not None
        path = Path(
            ascent,
            descent,
            rounding,
            state,
            params,
            extra_args,
            is_measured=is_measured,
            compares=something_compares,
        )

        ascends, cadence_state = cadence.decide(g, state.cadence_state)
        ascends = _as_decision(ascends if ascend is None else ascend)

        grouped = None
        if per_group is not None and ascends is True:
            # The map starts from the gradient of each group, so it gives their mean as
            # well, and no group takes its first gradient twice.
            grouped, g = per_group(path.with_gradient)

        # The ascent runs on every step, so that averages and schedules do not lag.
        # The last result is None if the ascent took no norm that shows it.
        perturbation, ascent_state, source_is_finite = path.ascent_step(g, passes)

        outputs: list[Any] = []  # auxiliary, of the branches as they are traced

        def with_second_gradient():
            g_descent = path.compared_gradient(g, passes)
            if per_group is None:
                mean_d, there = None, path.evaluate(passes, perturbation)
            else:
                mean_d, there = per_group(path) if grouped is None else grouped
            # Under groups, this step from the means is only there for its state.
            own_d, descent_state = path.descent_step(
                there, g_descent, passes, perturbation
            )
            if mean_d is not None:
                descent_state = path.with_averages(descent_state, there)
            d = _tree.cast_like(own_d if mean_d is None else mean_d, g)
            kept = cadence.remember(d, g_descent, cadence_state)
            measured = report_of(g, there, passes.loss) if is_measured else ()
            note_auxiliary(there.value, outputs)
            return d, descent_state, kept, measured, there.value

        def without_second_gradient():
            is_known = ascends is False
            take = path.plain_pass if is_known else path.plain_pass_of_branch
            here = take(g, passes)
            d = _tree.cast_like(cadence.substitute(here.gradient, cadence_state), g)
            # The descent runs as if gᵃ = g, only so that its counters go on.
            there = AtPerturbed(here.gradient, loss=path.loss_for_descent(here))
            _, descent_state = path.descent_step(
                there, here.gradient, passes, _tree.zeros_like(g)
            )
            measured = report_without_ascent(g, passes.loss) if is_measured else ()
            value = () if passes.value_slot is None else (here.loss, here.aux)
            note_auxiliary(value, outputs)
            return d, descent_state, cadence_state, measured, value

        d, descent_state, cadence_state, measured, value = _cond(
            ascends, with_second_gradient, without_second_gradient
        )
        if must_be_asked and not was_asked:
            raise ValueError(NO_EFFECT)
        ascent_state = follow(ascent, d, ascent_state, params)
        rounding_key = rounding.advance(state.rounding_key)
        new = SharpnessAwareState(
            ascent_state, descent_state, cadence_state, rounding_key
        )
        if guard:
            source = _source(ascent, ascends, g, perturbation)
            if mask is not None and _has_values((descent_state, cadence_state)):
                # They may be made of all of g, and the norm is of what the mask leaves.
                source_is_finite = None
            elif mask is not None and jax.tree.leaves(source):
                # The other leaves of g do not enter ε. If they were looked at, the
                # gradient of frozen parameters would be computed for that alone.
                source = masked(resolve_mask(mask, params), source)
            d, new = _guarded(
                d,
                new,
                state,
                source=source,
                source_is_finite=source_is_finite,
                follows_d=ascent.follow is not None,
                ascended=ascends,
            )
        if passes.value_slot is not None:
            passes.value_slot(value)
        if report is not None:
            report(measured)
        if maker is not None:
            maker(recipe)
        return d, new

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _cond(condition: bool | jax.Array, yes: Callable[[], Any], no: Callable[[], Any]):
    """`jax.lax.cond`, without a branch in the program if the condition is static."""
    if isinstance(condition, bool):
        return yes() if condition else no()
    return jax.lax.cond(condition, yes, no)


def _as_decision(ascend: Any) -> bool | jax.Array:
    """Whether a step ascends, as a Python bool where it is known when tracing.

    Outside of `jax.jit` it always is. A branch would be compiled there on each step.
    """
    if isinstance(ascend, (bool, np.bool_)):
        return bool(ascend)
    if not isinstance(ascend, (jax.Array, np.ndarray)) or (
        ascend.shape != () or ascend.dtype != jnp.bool_
    ):
        raise TypeError(
            f"ascend must be a bool or a scalar bool array, got {ascend!r}."
        )
    return ascend if isinstance(ascend, Tracer) else bool(ascend)


# --- The guard: values that are not finite appear in d, and never in the state.


def _source(ascent: Ascent, ascends: Any, g: Any, perturbation: Any) -> optax.Updates:
    """What must be finite for ε to be so: nothing, where no ε is used."""
    if ascent.uses_gradient:
        return g
    return () if ascends is False else perturbation


def _guarded(
    d: optax.Updates,
    new: Any,
    old: Any,
    *,
    source: optax.Updates,
    source_is_finite: jax.Array | None,
    follows_d: bool,
    ascended: bool | jax.Array,
) -> tuple[optax.Updates, Any]:
    """(d, state) of a step, mended if a gradient was not finite.

    The ascent's state is made of the source of ε: of g, or if the ascent uses no
    gradient, of what shows in ε. So the source decides whether it reverts; and it is
    looked at itself, unless the ascent's norm tells all of it. The states of the
    descent and of the cadence, and that of an ascent which follows d, are made of gᵃ as
    well, so d decides too; if they carry no values, d is not looked at, which saves a
    pass over it. `source_is_finite` is what the ascent's norm found, or None.
    """
    norm_tells_all = source_is_finite is not None
    if source_is_finite is None or ascended is False:
        # Without an ascent, nothing else needs the ascent's norm. A look is cheaper.
        source_is_finite = _tree.all_finite(source)
    both_are_finite = source_is_finite
    made_of_d = (new.descent_state, new.cadence_state)
    if follows_d:
        made_of_d += (new.ascent_state,)
    if _has_values(made_of_d):
        both_are_finite &= _tree.all_finite(d)
    state = new._replace(
        ascent_state=_revert_unless(
            both_are_finite if follows_d else source_is_finite,
            new.ascent_state,
            old.ascent_state,
            look=not norm_tells_all,
        ),
        descent_state=_revert_unless(
            both_are_finite, new.descent_state, old.descent_state
        ),
        cadence_state=_revert_unless(
            both_are_finite, new.cadence_state, old.cadence_state
        ),
    )
    # A rectifier can have a gradient of zero at w + NaN, so that d looks finite; it is
    # made NaN. A step that does not ascend makes d of g, which shows the fault by
    # itself: if that is known when tracing, the norm of g is not needed, and dropped.
    spoiled = ~source_is_finite & ascended
    return _tree.scale(jnp.where(spoiled, jnp.nan, 1), d), state


def _revert_unless(finite: jax.Array, new: Any, old: Any, *, look: bool = False) -> Any:
    """The new state if what it is made of is finite, else the old values.

    Values (floats and masks) revert. Counters and random keys advance all the same, so
    that schedules go on and no noise is drawn twice. With `look`, a new value that is
    not finite decides as well, as an ascent may take gradients of its own. Scalars
    always do, because one can overflow by itself, such as the square of a norm.
    """
    for n, o in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        if _tree.is_inexact(n) and (look or jnp.ndim(n) == 0):
            # A value that was infinite before may stay so: some parts start with it.
            spoiled = (jnp.isfinite(o) & ~jnp.isfinite(n)) | (
                jnp.isnan(n) & ~jnp.isnan(o)
            )
            finite &= ~jnp.any(spoiled)
    return jax.tree.map(
        lambda n, o: jnp.where(finite, n, o) if _is_value(n) else n, new, old
    )


def _has_values(state: Any) -> bool:
    """Whether a state holds anything that a gradient could spoil."""
    return any(_is_value(leaf) for leaf in jax.tree.leaves(state))


def _is_value(leaf: Any) -> bool:
    return _tree.is_inexact(leaf) or jnp.result_type(leaf) == jnp.bool_
