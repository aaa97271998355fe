"""What the axes of a method are made of: `Ascent`, `Descent` and `Cadence`."""

import contextvars
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import optax

from sam_optax._checks import check_transformation

# (g, state, params, **extra_args) -> (ε, next state, whether ε has a finite source)
Climb = Callable[..., tuple[optax.Updates, optax.OptState, jax.Array | None]]
# (d, state, params) -> next state
Follow = Callable[[optax.Updates, Any, Any], Any]


class Facts(TypedDict, total=False):
    """What is known of an ascent; the attributes of `Ascent` say what each means."""

    follow: Follow | None
    uses_gradient: bool
    reads_gradient: bool
    shows_nonfinite: bool
    may_descend: bool


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
      shows_nonfinite: whether its output is not finite wherever what it uses is not:
        its input, if it uses that, and what it carries. The norm of a chain knows of
        all this only if the parts before it show it.
      may_descend: whether it is somebody else's, such as a base optimizer, which points
        against the gradient. It is then tried before the first step.
    """

    climb: Climb
    follow: Follow | None = None
    uses_gradient: bool = True
    reads_gradient: bool = False
    shows_nonfinite: bool = False
    may_descend: bool = False

    @classmethod
    def from_climb(
        cls, init: optax.TransformInitFn, climb: Climb, **facts: Unpack[Facts]
    ) -> "Ascent":
        follow = facts.get("follow")

        def update_fn(updates, state, params=None, **extra_args):
            _note(follow)
            perturbation, state, _ = climb(updates, state, params, **extra_args)
            return perturbation, state

        ascent = cls(init, update_fn)
        vars(ascent).update(facts, climb=climb)
        return ascent

    @classmethod
    def of(cls, part: optax.GradientTransformation, **facts: Unpack[Facts]) -> "Ascent":
        """The same part, of which these facts are known beside those it tells."""
        if isinstance(part, Ascent) and "climb" in vars(part):
            known: Any = vars(part) | facts
            return cls.from_climb(part.init, **known)
        follow = facts.get("follow")
        climb = _climb_of(part, follows=follow is not None)
        return cls.from_climb(part.init, climb, **facts)


def as_ascent(part: optax.GradientTransformation) -> Ascent:
    """Any part of an ascent as an `Ascent`; of a plain one, nothing is known."""
    if isinstance(part, Ascent) and "climb" in vars(part):
        return part
    return Ascent.of(part, may_descend=True)


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
        all. Default True: as the ascent itself says, if it is one of ours.

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
    inner = as_ascent(ascent)
    return Ascent.of(
        inner,
        follow=_one_after_another(inner.follow, follow),
        uses_gradient=uses_gradient and inner.uses_gradient,
    )


def reading_gradient(part: optax.GradientTransformation) -> Ascent:
    """The same part of an ascent, known to read the extra argument `ascent_gradient`.

    A chain in which a part drops g, such as `against_momentum`, makes no use of g, for
    all that the step knows. It then need not take g, and refuses `ascent_batch=`. A
    part further down that reads g from `ascent_gradient` has to say so.

    Args:
      part: a transformation whose update takes the extra argument `ascent_gradient`.

    Returns:
      An ascent, or a part of one, for `ascents.chain`.

    Examples:
      The momentum, with the lengths of the gradient's entries:

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> from sam_optax import ascents
      >>> def update(u, state, params=None, *, ascent_gradient, **extra_args):
      ...     lengths = jax.tree.map(jnp.abs, ascent_gradient)
      ...     return jax.tree.map(jnp.multiply, u, lengths), state
      >>> weigh = optax.GradientTransformationExtraArgs(
      ...     lambda params: optax.EmptyState(), update)
      >>> ascent = ascents.chain(
      ...     ascents.against_momentum(), ascents.reading_gradient(weigh),
      ...     ascents.sam(rho=0.5))
      >>> tx = sam_optax.sharpness_aware(ascent)

    Cost: the gradient at w, on each step.
    """
    check_transformation("part", part)
    return Ascent.of(as_ascent(part), reads_gradient=True)


def _one_after_another(first: Follow | None, second: Follow | None) -> Follow | None:
    if first is None or second is None:
        return second if first is None else first
    return lambda d, state, params: second(d, first(d, state, params), params)


# The functions of the ascents that follow d, noted as a plain transformation runs.
_followers: contextvars.ContextVar[list[Follow] | None] = contextvars.ContextVar(
    "followers", default=None
)


def _note(follow: Follow | None) -> None:
    followers = _followers.get()
    if follow is not None and followers is not None:
        followers.append(follow)


def _with_followers(update: Callable[..., Any], /, *args: Any, **extra_args: Any):
    """What an update returns, and the functions of the ascents in it that follow d."""
    followers: list[Follow] = []
    token = _followers.set(followers)
    try:
        return update(*args, **extra_args), followers
    finally:
        _followers.reset(token)


def _climb_of(part: optax.GradientTransformation, *, follows: bool) -> Climb:
    """The `climb` of a plain transformation, which does not know what is finite.

    It raises a ValueError if the transformation does not follow d, and an ascent in it
    would: that ascent is wrapped in something that keeps nothing but its update.
    """
    update = optax.with_extra_args_support(part).update

    def climb(g, state, params=None, /, **extra_args):
        (perturbation, state), followers = _with_followers(
            update, g, state, params, **extra_args
        )
        if followers and not follows:
            raise ValueError(
                "A part of the ascent follows d, as the momentum of msam does, and is "
                "wrapped in something that does not hand d on to it, such as "
                "optax.chain, optax.masked or optax.inject_hyperparams. Combine the "
                "parts of an ascent with ascents.chain, pass a mask as mask= to "
                "sharpness_aware, and inject hyperparameters into the whole method: "
                "optax.inject_hyperparams(sam_optax.msam)(rho=0.3)."
            )
        return perturbation, state, None

    return climb


def follow(ascent: Ascent, d: optax.Updates, state: Any, params: Any) -> Any:
    """The state of any ascent after a step in the direction d."""
    return state if ascent.follow is None else ascent.follow(d, state, params)


def chain(*parts: optax.GradientTransformation) -> Ascent:
    """Like `optax.chain`, for the parts of an ascent.

    It also hands d on to the parts that follow it, such as the momentum of `msam`, and
    tells the guard of `sharpness_aware` whether g is finite, if a norm in it knows.

    Args:
      parts: transformations, each of which receives the output of the one before. A
        part before the first norm that can hide what is not finite, such as
        `optax.clip`, costs the guard a look at g.

    Returns:
      An ascent for `sharpness_aware`.
    """
    for part in parts:
        check_transformation("Each part of a chain", part)
    ascents = [as_ascent(part) for part in parts]
    keeps_g = all(part.uses_gradient for part in ascents)
    reads_g = any(part.reads_gradient for part in ascents)

    def init_fn(params: optax.Params) -> optax.OptState:
        return tuple(part.init(params) for part in ascents)

    def climb_fn(updates, state, params=None, /, **extra_args):
        finite, shows, states = None, True, []
        for part, own in zip(ascents, state, strict=True):
            updates, own, found = part.climb(updates, own, params, **extra_args)
            if not part.uses_gradient:
                finite = None  # of what this part has dropped
            finite = found if finite is None and shows else finite
            shows = part.shows_nonfinite and (
                shows if part.uses_gradient else part is ascents[0]
            )
            states.append(own)
        # A norm of what has replaced g says nothing of the g that another part reads.
        return updates, tuple(states), finite if keeps_g or not reads_g else None

    def follow_fn(d, state, params):
        pairs = zip(ascents, state, strict=True)
        return tuple(follow(part, d, own, params) for part, own in pairs)

    return Ascent.from_climb(
        init_fn,
        climb_fn,
        follow=follow_fn if any(part.follow for part in ascents) else None,
        # A part that drops what it receives drops g with it, but for those who read it.
        uses_gradient=keeps_g or reads_g,
        reads_gradient=reads_g,
        shows_nonfinite=all(part.shows_nonfinite for part in ascents),
    )


class Descent(optax.GradientTransformationExtraArgs):
    """A descent that tells the step more than d.

    Attributes:
      compares: whether it compares gᵃ with g, the gradient at the parameters.
      for_ascent: state -> extra arguments of the next ascent, for a descent that finds
        what the ascent needs; or None.
      uses_loss: whether it needs L(w + ε), the extra argument `perturbed_loss`. A step
        without losses is then refused. None: it is given the loss if there is one.
      averages_state: whether, under groups, the floats of its state are the means of
        what they are in the groups, and not what follows from the mean gradients.
    """

    compares: bool = False
    for_ascent: Callable[[Any], dict[str, Any]] | None = None
    uses_loss: bool | None = False
    averages_state: bool = False

    @classmethod
    def of(
        cls,
        descent: optax.GradientTransformation,
        *,
        compares: bool = False,
        for_ascent: Callable[[Any], dict[str, Any]] | None = None,
        uses_loss: bool | None = False,
        averages_state: bool = False,
    ) -> "Descent":
        own = cls(*optax.with_extra_args_support(descent))
        own.compares, own.for_ascent = compares, for_ascent
        own.uses_loss, own.averages_state = uses_loss, averages_state
        return own


def as_descent(descent: optax.GradientTransformation | None) -> Descent:
    """Any descent as a `Descent`; a plain one may use all that there is."""
    if descent is None:
        return Descent.of(optax.identity())
    if isinstance(descent, Descent) and vars(descent):
        return descent
    return Descent.of(descent, compares=True, uses_loss=None)


def ignoring_gradient(descent: optax.GradientTransformation) -> Descent:
    """The same descent, known to make no use of g, the extra `ascent_gradient`.

    A step with an ascent that makes no use of g either, such as `ascents.msam`, then
    takes one gradient. And `data.largest_increase`, with which gᵃ and g are of
    different examples, is accepted.

    Args:
      descent: a transformation gᵃ ↦ d.

    Returns:
      A descent for `sharpness_aware`.

    Raises:
      ValueError: if it is a descent of this library that compares gᵃ with g.

    Examples:
      Momentum-SAM with a descent that shortens gᵃ where ε is long:

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> from sam_optax import ascents, descents
      >>> def update(ga, state, params=None, *, perturbation, **extra_args):
      ...     factor = 1 / (1 + optax.tree.norm(perturbation))
      ...     return optax.tree.scale(factor, ga), state
      >>> shorten = optax.GradientTransformationExtraArgs(
      ...     lambda params: optax.EmptyState(), update)
      >>> tx = sam_optax.sharpness_aware(
      ...     ascents.msam(rho=0.3), descent=descents.ignoring_gradient(shorten))

    Cost: one gradient less on each step, with an ascent that makes no use of g.
    """
    check_transformation("descent", descent)
    known = as_descent(descent)
    if known.compares and known.uses_loss is not None:
        raise ValueError(
            "This descent compares gᵃ with g, as descents.gsam and descents.blend do, "
            "and cannot ignore g."
        )
    facts: Any = vars(known) | {"compares": False}
    return Descent.of(descent, **facts)


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
