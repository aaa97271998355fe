"""What the axes of a method are made of: `Ascent` and `Cadence`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

# (g, state, params, **extra_args) -> (ε, next state, whether g is finite or None)
Climb = Callable[..., tuple[optax.Updates, optax.OptState, jax.Array | None]]


class Ascent(optax.GradientTransformationExtraArgs):
    """An ascent whose norm also tells whether g is finite.

    This saves the guard of `sharpness_aware` a pass over g. As an Optax transformation,
    an `Ascent` can be chained, wrapped and copied like any other. The result is then a
    plain transformation, and the guard looks for itself.

    Attributes:
      climb: (g, state, params, **extra_args) -> (ε, state, finite), where finite is a
        scalar bool, or None if the ascent does not know.
    """

    climb: Climb | None = None

    @classmethod
    def from_climb(cls, init: optax.TransformInitFn, climb: Climb) -> "Ascent":
        def update_fn(updates, state, params=None, **extra_args):
            perturbation, state, _ = climb(updates, state, params, **extra_args)
            return perturbation, state

        ascent = cls(init, update_fn)
        ascent.climb = climb
        return ascent


def climb(
    ascent: optax.GradientTransformation,
    g: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None,
    extra_args: Mapping[str, Any],
) -> tuple[optax.Updates, optax.OptState, jax.Array | None]:
    """(ε, state, finite) of any ascent; a plain transformation knows nothing of g."""
    if isinstance(ascent, Ascent) and ascent.climb is not None:
        return ascent.climb(g, state, params, **extra_args)
    update = optax.with_extra_args_support(ascent).update
    return *update(g, state, params, **extra_args), None


def chain(*parts: optax.GradientTransformation) -> Ascent:
    """Like `optax.chain`, and hands on what the norm in it knows of g.

    Each part before the norm must make its output not finite where its input is not (a
    part that replaces g by noise does not). A finite norm then means that g was finite.
    """

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
        return updates, tuple(states), finite

    return Ascent.from_climb(init_fn, climb_fn)


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


def every_step() -> Cadence:
    """The second gradient on every step: SAM as published, and the default."""
    return Cadence(
        init=lambda params: optax.EmptyState(),
        decide=lambda g, state: (True, state),
    )
