"""Hyperparameters: each a number, a schedule of the step, or a traced value."""

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax._checks import check_number
from sam_optax._parts import Ascent, follow

ScalarOrSchedule = float | jax.Array | Callable[[jax.Array], Any]


def value_at(hyperparameter: ScalarOrSchedule, step: Any) -> Any:
    """The value of a number, a schedule or a traced scalar at a step."""
    return hyperparameter(step) if callable(hyperparameter) else hyperparameter


def map_value(
    function: Callable[[Any], Any], hyperparameter: ScalarOrSchedule
) -> ScalarOrSchedule:
    """Applies a function to a number, a schedule or a traced scalar."""
    if not callable(hyperparameter):
        return function(hyperparameter)
    return lambda step: function(hyperparameter(step))


def nan_if_negative(value: Any) -> Any:
    """A traced value, with NaN in the place of what must not be negative.

    The value is known only when the program runs, where nothing can be raised. NaN
    makes d NaN, which is seen; a negative radius would descend without a word. What is
    only rounding error counts as zero: under jit, a linear schedule that ends at 0 can
    end at -1e-7.
    """
    if not isinstance(value, jax.Array):
        return value
    return jnp.where(value < -1e-6, jnp.nan, jnp.maximum(value, 0))


class ScheduledState(NamedTuple):
    """State of a part whose hyperparameters follow schedules of the step."""

    schedule_step: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32
    scheduled_state: optax.OptState


def scheduled(
    make_part: Callable[..., optax.GradientTransformation],
    *,
    follows_d: bool = False,
    uses_gradient: bool = True,
    **hyperparameters: ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    """Builds `make_part(**hyperparameters)`, evaluating callables at the current step.

    A part need only be written for numbers; with this function, each of them may also
    be a schedule. Step k uses the schedule's value at k, counted from 0. A part without
    schedules carries no counter. The other two arguments say of an ascent what
    `Ascent` says of it.
    """
    constants = {k: v for k, v in hyperparameters.items() if not callable(v)}
    schedules = {k: v for k, v in hyperparameters.items() if callable(v)}

    def part_at(step):
        values = {name: schedule(step) for name, schedule in schedules.items()}
        for name, value in values.items():
            if jnp.ndim(value) != 0:
                raise ValueError(
                    f"The schedule of {name} must return a scalar, and returned an "
                    f"array of shape {jnp.shape(value)}."
                )
        return Ascent.of(make_part(**constants, **values))

    if not schedules:
        return part_at(None)

    def init_fn(params: Any) -> Any:
        step = jnp.zeros((), jnp.int32)
        return ScheduledState(step, part_at(step).init(params))

    def climb_fn(updates: Any, state: Any, params: Any = None, /, **extra_args: Any):
        step, inner = state
        part = part_at(step)
        updates, inner, finite = part.climb(updates, inner, params, **extra_args)
        return updates, ScheduledState(optax.safe_increment(step), inner), finite

    def follow_fn(d: Any, state: Any, params: Any) -> Any:
        # The update of this step has counted already.
        part = part_at(state.schedule_step - 1)
        followed = follow(part, d, state.scheduled_state, params)
        return state._replace(scheduled_state=followed)

    return Ascent.from_climb(
        init_fn,
        climb_fn,
        follow=follow_fn if follows_d else None,
        uses_gradient=uses_gradient,
    )


def unscheduled(state: Any) -> Any:
    """The state of a part itself, whether its hyperparameters are scheduled or not."""
    return state.scheduled_state if isinstance(state, ScheduledState) else state


def rho_from_learning_rate(
    learning_rate: Callable[[Any], Any],
    *,
    rho_max: float,
    rho_min: float,
    learning_rate_max: float,
    learning_rate_min: float = 0.0,
) -> Callable[[Any], Any]:
    r"""A schedule that ties rho to the learning rate, as GSAM trains.

    .. math::
      \rho_t = \rho_{min} + (\rho_{max} - \rho_{min})
               \frac{lr_t - lr_{min}}{lr_{max} - lr_{min}}

    Args:
      learning_rate: the schedule given to the base optimizer, step -> learning rate.
      rho_max: radius where the learning rate is `learning_rate_max`.
      rho_min: radius where the learning rate is `learning_rate_min`.
      learning_rate_max: largest value of the schedule.
      learning_rate_min: smallest value of the schedule. Default 0, where cosine and
        linear decays end. For a learning rate outside the two limits, as in a warm-up
        that starts below the minimum, rho continues on the same line, but is never
        below 0.

    Returns:
      A schedule, step -> rho, for the `rho` of any method.

    Raises:
      ValueError: if the two learning rates are equal, or a radius is negative.

    Examples:
      >>> import optax, sam_optax
      >>> learning_rate = optax.linear_schedule(0.1, 0.0, transition_steps=100)
      >>> rho = sam_optax.rho_from_learning_rate(
      ...     learning_rate, rho_max=0.5, rho_min=0.1, learning_rate_max=0.1)
      >>> [round(float(rho(step)), 3) for step in (0, 50, 100)]
      [0.5, 0.3, 0.1]
      >>> tx = optax.chain(sam_optax.sam(rho), optax.sgd(learning_rate))

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, ICLR 2022, Algorithm 1.

    Differences from the authors' code: none in the formula. Their PyTorch scheduler
    computes the first rho from a learning rate of 0; here step k always uses the
    learning rate of step k.
    """
    if not callable(learning_rate):
        raise TypeError(
            "learning_rate must be a schedule (step -> learning rate), got "
            f"{learning_rate!r}; with a constant learning rate, rho is constant too."
        )
    check_number("rho_max", rho_max, at_least=0)
    check_number("rho_min", rho_min, at_least=0)
    check_number("learning_rate_max", learning_rate_max)
    check_number("learning_rate_min", learning_rate_min)
    span = learning_rate_max - learning_rate_min
    if isinstance(span, numbers.Real) and span <= 0:
        raise ValueError(
            "learning_rate_max must be above learning_rate_min, got "
            f"{learning_rate_max} and {learning_rate_min}."
        )

    def schedule(step):
        fraction = (learning_rate(step) - learning_rate_min) / span
        return jnp.maximum(rho_min + (rho_max - rho_min) * fraction, 0.0)

    return schedule
