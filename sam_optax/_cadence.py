"""The cadence axis: on which steps the second gradient is taken."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax import _tree
from sam_optax._hyperparameters import (
    ScalarOrSchedule,
    check_number,
    check_static_integer,
    value_at,
)
from sam_optax._random import Key, key_stream


class Cadence(NamedTuple):
    """Four small functions that say when, and what happens in between.

    All of them see the mean gradient over groups and devices, so that every replica
    decides alike.

    Attributes:
      init: params -> state.
      decide: (g, state) -> (decision, state), called on every step. The decision is a
        Python bool, which leaves no branch in the program, or a traced one.
      remember: (d, g, state) -> state, called after a step with a second gradient.
      substitute: (g, state) -> d, what stands in for the sharpness-aware gradient on a
        step without one. What is not finite in g should not be in d either, for who
        watches for it sees d.
    """

    init: Callable[[Any], Any]
    decide: Callable[[Any, Any], tuple[bool | jax.Array, Any]]
    remember: Callable[[Any, Any, Any], Any] = lambda d, g, state: state
    substitute: Callable[[Any, Any], Any] = lambda g, state: g


def every_step() -> Cadence:
    """The second gradient on every step: SAM as published, and the default."""
    return Cadence(
        init=lambda params: optax.EmptyState(),
        decide=lambda g, state: (True, state),
    )


class EveryKState(NamedTuple):
    """State of `every_k`."""

    cadence_step: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32


def every_k(k: int) -> Cadence:
    """The second gradient on steps 0, k, 2k, ...; plain gradients in between.

    Args:
      k: period >= 1, a Python integer.

    Returns:
      A cadence. Its decision is traced, so the second gradient sits in a `lax.cond`;
      pass `ascend=step % k == 0` as a Python bool to specialise the step instead.

    Raises:
      ValueError: if k is not a positive integer.
    """
    check_static_integer("k", k)

    def decide(g, state):
        del g
        step = state.cadence_step
        return step % k == 0, EveryKState(optax.safe_increment(step))

    return Cadence(
        init=lambda params: EveryKState(jnp.zeros((), jnp.int32)), decide=decide
    )


class AtRandomState(NamedTuple):
    """State of `at_random`."""

    cadence_step: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32
    cadence_key: jax.Array  # key data, dtype=jnp.uint32


def at_random(probability: ScalarOrSchedule, *, key: Key = 0) -> Cadence:
    """The second gradient with a given probability, drawn anew on every step.

    Args:
      probability: a number from 0 to 1, a schedule of the step, or a traced scalar.
      key: an int, a typed key or a legacy one. Default 0.

    Returns:
      A cadence. Its decision is traced; draw in Python and pass `ascend=` to leave no
      branch in the program.

    Raises:
      ValueError: if probability is a Python number outside [0, 1].
    """
    check_number("probability", probability, at_least=0, at_most=1)
    keys = key_stream(key)

    def decide(g, state):
        del g
        step, key_data = state
        now, later = keys.next(key_data)
        ascend = jax.random.bernoulli(now, value_at(probability, step))
        return ascend, AtRandomState(optax.safe_increment(step), later)

    return Cadence(
        init=lambda params: AtRandomState(jnp.zeros((), jnp.int32), keys.start()),
        decide=decide,
    )


class WhenSteepState(NamedTuple):
    """State of `when_steep`."""

    cadence_step: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32
    squared_norm_mean: jax.Array  # shape=(), dtype=jnp.float32
    squared_norm_variance: jax.Array  # shape=(), dtype=jnp.float32


def when_steep(
    threshold: ScalarOrSchedule, *, decay: ScalarOrSchedule = 0.9
) -> Cadence:
    r"""The second gradient where ‖g‖² is large for its recent past, as in AE-SAM.

    .. math::
      \mu_t = \delta \mu_{t-1} + (1-\delta) \|g_t\|^2, \quad
      \sigma_t^2 = \delta \sigma_{t-1}^2 + (1-\delta) (\|g_t\|^2 - \mu_t)^2, \quad
      \|g_t\|^2 \ge \mu_t + c_t \sigma_t

    Args:
      threshold: c_t, a number, a schedule of the step, or a traced scalar.
      decay: δ in [0, 1). Default 0.9, from the paper.

    Returns:
      A cadence whose decision is traced.

    Raises:
      ValueError: if decay is a Python number outside [0, 1).
    """
    check_number("threshold", threshold)
    check_number("decay", decay, at_least=0, below=1)

    def init(params):
        del params
        # The first variance is that of the authors, exp(-10) squared.
        variance = jnp.exp(jnp.asarray(-20.0, jnp.float32))
        return WhenSteepState(
            jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32), variance
        )

    def decide(g, state):
        step, mean, variance = state
        square = jnp.asarray(_tree.squared_norm(g), jnp.float32)
        kept = jnp.asarray(value_at(decay, step), jnp.float32)
        mean = kept * mean + (1 - kept) * square
        variance = kept * variance + (1 - kept) * jnp.square(square - mean)
        steep = square >= mean + value_at(threshold, step) * jnp.sqrt(variance)
        return steep, WhenSteepState(optax.safe_increment(step), mean, variance)

    return Cadence(init=init, decide=decide)


class ReuseState(NamedTuple):
    """State of `every_k_reusing`."""

    cadence_step: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32
    kept_direction: Any  # like the parameters, at least float32; v/‖v‖, or zero


def every_k_reusing(
    k: int, alpha: ScalarOrSchedule = 0.7, *, per_tensor: bool = False
) -> Cadence:
    r"""LookSAM's cadence: the part of gᵃ orthogonal to g is kept, and used k − 1 times.

    On steps 0, k, 2k, ... the second gradient is taken, and of it

    .. math::
      v = g^a - \mathrm{proj}_g\, g^a
      \qquad\text{is kept; in between}\qquad
      d = g + \alpha \frac{\|g\|}{\|v\|} v

    Args:
      k: period >= 1, a Python integer.
      alpha: α, weight of the kept direction. Default 0.7, from the paper.
      per_tensor: project and measure norms leaf by leaf, as third-party code does.
        Default False: over all leaves, as in the paper.

    Returns:
      A cadence that carries v/‖v‖, in at least float32. Its decision is traced; pass
      `ascend=step % k == 0` as a Python bool to specialise the step instead.

    Raises:
      ValueError: if k is not a positive integer.
    """
    check_number("alpha", alpha)
    periodic = every_k(k)

    def each(function, *trees):
        return jax.tree.map(function, *trees) if per_tensor else function(*trees)

    def direction_of(d, g):
        # Of gᵃ − g, whose orthogonal part is that of gᵃ, but with fewer digits lost;
        # what is rounding is judged by the size of gᵃ.
        return _tree.unit_unless_rounding_of(d, _tree.orthogonal_difference(d, g, g))

    def init(params):
        return ReuseState(periodic.init(params).cadence_step, _tree.zeros_like(params))

    def decide(g, state):
        decision, (step,) = periodic.decide(g, EveryKState(state.cadence_step))
        return decision, state._replace(cadence_step=step)

    def remember(d, g, state):
        d, g = _tree.at_least_float32(d), _tree.at_least_float32(g)
        return state._replace(kept_direction=each(direction_of, d, g))

    def substitute(g, state):
        weight = value_at(alpha, state.cadence_step - 1)  # that was counted on already
        return each(
            lambda g, v: _tree.add_scaled(g, weight * _tree.norm(g), v),
            _tree.at_least_float32(g),
            state.kept_direction,
        )

    return Cadence(init, decide, remember, substitute)
