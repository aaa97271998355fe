"""What the axes of a method are made of: `Ascent`, `Descent` and `Cadence`."""

import contextvars
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from sam_optax._checks import check_transformation

# (g, state, params, **extra_args) -> (ε, next state, whether ε has a finite source)
Climb = Callable[..., tuple[optax.Updates, optax.OptState, jax.Array | None]]
# (d, state, params) -> next state
Follow = Callable[[optax.Updates, Any, Any], Any]


class Ascent(optax.GradientTransformationExtraArgs):
    """An ascent that tells the step more than ε, and may learn d from it.

    As an Optax transformation, an `Ascent` can be wrapped and copied like any other.
    The result is then a plain transformation: the guard of `sharpness_aware` looks for
    itself whether g is finite, and an ascent that follows d is refused when it runs.

    Attributes:
      climb: (g, state, params, **extra_args) -> (ε, state, finite), where finite is a
        scalar bool that says whether what ε is made of is finite, or None if the ascent
        does not know. It saves the guard a pass.
      follow: (d, state, params) -> state, called once a step with the d of that step,
        the mean over groups and devices; or None.
      uses_gradient: whether the ascent makes any use of g. Where it does not, no
        gradient is taken at the parameters, unless something else uses it.
      reads_gradient: whether, as a part of a chain, it finds g in the extra argument
        `ascent_gradient`. The chain then uses g even if a part before drops it.
    """

    climb: Climb | None = None
    follow: Follow | None = None
    uses_gradient: bool = True
    reads_gradient: bool = False

    @classmethod
    def from_climb(
        cls,
        init: optax.TransformInitFn,
        climb: Climb,
        follow: Follow | None = None,
        uses_gradient: bool = True,
    ) -> "Ascent":
        def update_fn(updates, state, params=None, **extra_args):
            _note(follow)
            perturbation, state, _ = climb(updates, state, params, **extra_args)
            return perturbation, state

        ascent = cls(init, update_fn)
        ascent.climb = climb
        ascent.follow, ascent.uses_gradient = follow, uses_gradient
        return ascent


def reading_gradient(part: optax.GradientTransformation) -> Ascent:
    """The same part, known to find g in the extra argument `ascent_gradient`."""
    ascent = Ascent(*optax.with_extra_args_support(part))
    ascent.reads_gradient = True
    return ascent


def following(
    ascent: optax.GradientTransformation,
    follow: Follow | None,
    *,
    uses_gradient: bool = True,
) -> Ascent:
    """An ascent that also learns the direction d of each step.

    Args:
      ascent: transformation g ↦ ε, whose state `follow` changes.
      follow: (d, state, params) -> state, called once a step, after everything else.
        d is what the step returns: the mean over groups and devices, and the plain
        gradient on a step that does not ascend. If d is not finite, the guard undoes
        the change. If the ascent follows d already, it does so first. None: nothing is
        added.
      uses_gradient: whether ε depends on g. If it does not, the step takes no gradient
        at the parameters, as long as nothing else uses it, and costs one gradient in
        all. Default True.

    Returns:
      An ascent for `sharpness_aware`. To combine it with other parts, use
      `ascents.chain`: `optax.chain` would drop `follow`, which raises an error.

    Examples:
      Along the last step, with one gradient a step, which is momentum-SAM without
      momentum:

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> from sam_optax import ascents
      >>> last_step = ascents.following(
      ...     optax.GradientTransformation(
      ...         init=lambda params: jax.tree.map(jnp.zeros_like, params),
      ...         update=lambda g, last, params=None: (
      ...             jax.tree.map(jnp.negative, last), last)),
      ...     follow=lambda d, last, params: d,
      ...     uses_gradient=False)
      >>> ascent = ascents.chain(
      ...     last_step, ascents.normalize_by_global_norm(), ascents.scale_by_rho(0.5))
      >>> tx = sam_optax.sharpness_aware(ascent)
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> w = jnp.array(1.0)
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     d, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
      ...     print(d)
      2.0
      1.0
    """
    check_transformation("ascent", ascent)
    inner = optax.with_extra_args_support(ascent)
    both = follow
    if isinstance(inner, Ascent):
        uses_gradient = uses_gradient and inner.uses_gradient
        both = _one_after_another(inner.follow, follow)

    def update_fn(updates, state, params=None, **extra_args):
        _note(both)
        perturbation, state, _ = climb(inner, updates, state, params, extra_args)
        return perturbation, state

    outer = Ascent(inner.init, update_fn)
    if isinstance(inner, Ascent):
        outer.climb = inner.climb
    outer.follow, outer.uses_gradient = both, uses_gradient
    return outer


def _one_after_another(first: Follow | None, second: Follow | None) -> Follow | None:
    if first is None or second is None:
        return second if first is None else first
    return lambda d, state, params: second(d, first(d, state, params), params)


# Of a part that runs in `climb`: the functions of ascents in it that follow d.
_followers: contextvars.ContextVar[list[Follow] | None] = contextvars.ContextVar(
    "followers", default=None
)


def _note(follow: Follow | None) -> None:
    followers = _followers.get()
    if follow is not None and followers is not None:
        followers.append(follow)


def climb(
    ascent: optax.GradientTransformation,
    g: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None,
    extra_args: Mapping[str, Any],
) -> tuple[optax.Updates, optax.OptState, jax.Array | None]:
    """(ε, state, finite) of any ascent; a plain transformation knows nothing of g.

    Raises a ValueError for a transformation that does not follow d, if an ascent in it
    would: it has been wrapped in something that keeps nothing but its update.
    """
    if isinstance(ascent, Ascent) and ascent.climb is not None:
        return ascent.climb(g, state, params, **extra_args)
    update = optax.with_extra_args_support(ascent).update
    perturbation, state = run(ascent, update, g, state, params, **extra_args)
    return perturbation, state, None


def run(
    ascent: optax.GradientTransformation,
    update: Callable[..., Any],
    *args: Any,
    **extra_args: Any,
) -> Any:
    """What an update returns that runs the one of an ascent; an error as in `climb`."""
    followers: list[Follow] = []
    token = _followers.set(followers)
    try:
        result = update(*args, **extra_args)
    finally:
        _followers.reset(token)
    if followers and not follows(ascent):
        raise ValueError(
            "A part of the ascent follows d, as the momentum of msam does, and is "
            "wrapped in something that does not hand d on to it, such as optax.chain, "
            "optax.masked or optax.inject_hyperparams. Combine the parts of an ascent "
            "with ascents.chain, pass a mask as mask= to sharpness_aware, and inject "
            "hyperparameters into the whole method: "
            "optax.inject_hyperparams(sam_optax.msam)(rho=0.3)."
        )
    return result


def follow(
    ascent: optax.GradientTransformation,
    d: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None,
) -> optax.OptState:
    """The state of any ascent after a step in the direction d."""
    if isinstance(ascent, Ascent) and ascent.follow is not None:
        return ascent.follow(d, state, params)
    return state


def follows(ascent: optax.GradientTransformation) -> bool:
    """Whether an ascent learns d."""
    return isinstance(ascent, Ascent) and ascent.follow is not None


def uses_gradient(ascent: optax.GradientTransformation) -> bool:
    """Whether ε depends on g; of a transformation that says nothing, it does."""
    return ascent.uses_gradient if isinstance(ascent, Ascent) else True


def chain(*parts: optax.GradientTransformation) -> Ascent:
    """Like `optax.chain`, for the parts of an ascent.

    It also hands d on to the parts that follow it, such as the momentum of `msam`, and
    tells the guard of `sharpness_aware` whether g is finite, if a norm in it knows.

    Args:
      parts: transformations, each of which receives the output of the one before. Each
        part before a norm must make its output not finite where its input is not (a
        part that replaces g by noise does not). A finite norm then means that g was
        finite.

    Returns:
      An ascent for `sharpness_aware`.
    """
    for part in parts:
        check_transformation("Each part of a chain", part)
    has_follow = any(map(follows, parts))
    keeps_g, reads_g = all(map(uses_gradient, parts)), any(map(_reads_gradient, parts))

    def init_fn(params: optax.Params) -> optax.OptState:
        return tuple(part.init(params) for part in parts)

    def climb_fn(updates, state, params=None, **extra_args):
        finite, states = None, []
        for part, part_state in zip(parts, state, strict=True):
            updates, part_state, found = climb(
                part, updates, part_state, params, extra_args
            )
            finite = found if finite is None else finite
            states.append(part_state)
        # A norm of what has replaced g says nothing of the g that another part reads.
        return updates, tuple(states), finite if keeps_g or not reads_g else None

    def follow_fn(d, state, params):
        pairs = zip(parts, state, strict=True)
        return tuple(follow(part, d, own, params) for part, own in pairs)

    return Ascent.from_climb(
        init_fn,
        climb_fn,
        follow_fn if has_follow else None,
        # A part that drops what it receives drops g with it, but for those who read it.
        uses_gradient=keeps_g or reads_g,
    )


def _reads_gradient(part: optax.GradientTransformation) -> bool:
    return isinstance(part, Ascent) and part.reads_gradient


class Descent(optax.GradientTransformationExtraArgs):
    """A descent that tells the step more than d.

    Attributes:
      compares: whether it compares gᵃ with g, the gradient at the parameters.
      for_ascent: state -> extra arguments of the next ascent, for a descent that finds
        what the ascent needs; or None.
      uses_loss: whether it needs L(w + ε), which it then receives as the extra argument
        `perturbed_loss`.
      averages_state: whether, under groups, the floats of its state are the means of
        what they are in the groups, and not what follows from the mean gradients.
    """

    compares: bool = False
    for_ascent: Callable[[Any], dict[str, Any]] | None = None
    uses_loss: bool = False
    averages_state: bool = False

    @classmethod
    def of(
        cls,
        descent: optax.GradientTransformation,
        *,
        compares: bool = False,
        for_ascent: Callable[[Any], dict[str, Any]] | None = None,
        uses_loss: bool = False,
        averages_state: bool = False,
    ) -> "Descent":
        own = cls(*optax.with_extra_args_support(descent))
        own.compares, own.for_ascent = compares, for_ascent
        own.uses_loss, own.averages_state = uses_loss, averages_state
        return own


def compares(descent: optax.GradientTransformation | None) -> bool:
    """Whether a descent may compare gᵃ with g; of one that says nothing, it may."""
    if isinstance(descent, Descent):
        return descent.compares
    return descent is not None


class Cadence(NamedTuple):
    """Four small functions that decide when, and what happens in between.

    The last three see the mean gradient over groups and devices, so that every replica
    decides alike.

    Attributes:
      init: params -> state.
      decide: (g, state) -> (decision, state), called on every step. The decision is a
        Python bool, which leaves no branch in the program, or a traced one.
      remember: (d, g, state) -> state, called after a step with a second gradient.
      substitute: (g, state) -> d, called on a step without one: what stands in for the
        sharpness-aware gradient. If g is not finite, d must not be either: checks
        further down the chain see only d.
    """

    init: Callable[[optax.Params], Any]
    decide: Callable[[optax.Updates, Any], tuple[bool | jax.Array, Any]]
    remember: Callable[[optax.Updates, optax.Updates, Any], Any] = lambda d, g, state: (
        state
    )
    substitute: Callable[[optax.Updates, Any], optax.Updates] = lambda g, state: g

    @property
    def forgets(self) -> bool:
        """Whether nothing is remembered of a step, not even its gradient at w."""
        return self.remember is Cadence._field_defaults["remember"]


def every_step() -> Cadence:
    """The second gradient on every step: SAM as published, and the default."""
    return Cadence(
        init=lambda params: optax.EmptyState(),
        decide=lambda g, state: (True, state),
    )
