"""AE-SAM: SAM on the steps whose gradient is large."""

import math
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from sam_optax import _tree
from sam_optax._checks import check_number
from sam_optax._hyperparameters import ScalarOrSchedule, value_at
from sam_optax._step import Cadence, Options, sharpness_aware
from sam_optax.methods._record import record
from sam_optax.methods._sam import sam_ascent


class WhenSteepState(NamedTuple):
    """State of `when_steep`."""

    cadence_step: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32
    squared_norm_mean: jax.Array  # shape=(), dtype=jnp.float32
    squared_norm_variance: jax.Array  # shape=(), dtype=jnp.float32


def when_steep(
    threshold: ScalarOrSchedule, *, decay: ScalarOrSchedule = 0.9
) -> Cadence:
    """Takes the second gradient where ‖g‖² is large compared with recent steps.

    The method `ae_sam` has the equation. On the other steps, d = g.

    Args:
      threshold: c_t, a number, a schedule of the step, or a traced scalar.
      decay: δ in [0, 1). Default 0.9, from AE-SAM's paper.

    Returns:
      A cadence. The compiled program makes the decision, so the second gradient is
      inside a `lax.cond`.

    Raises:
      ValueError: if decay is a Python number outside [0, 1).
    """
    check_number("threshold", threshold)
    check_number("decay", decay, at_least=0, below=1)

    def init(params):
        del params
        # The authors start the standard deviation at exp(-10).
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


@record(
    title="Adaptive policy for SAM",
    equation="SAM where ‖g‖² ≥ mean + c · standard deviation, of its recent past; "
    "else d = g",
    source="Jiang 2023",
    url="https://arxiv.org/abs/2304.14647",
    gradients=math.nan,
    cost="1 to 2",
)
def ae_sam(
    rho: ScalarOrSchedule = 0.05,
    threshold: ScalarOrSchedule = 0.0,
    decay: ScalarOrSchedule = 0.9,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive policy to Employ Sharpness-Aware Minimization (AE-SAM).

    .. math::
      \mu_t = \delta \mu_{t-1} + (1-\delta) \|g_t\|^2, \quad
      \sigma_t^2 = \delta \sigma_{t-1}^2 + (1-\delta) (\|g_t\|^2 - \mu_t)^2, \quad
      \text{SAM where } \|g_t\|^2 \ge \mu_t + c_t \sigma_t

    On the other steps, d = g.

    Args:
      rho: the radius ρ = ‖ε‖. Default 0.05, that of `sam`.
      threshold: c_t, a number or a schedule of the step. Default 0. In the paper it
        goes linearly from λ₂ = 1 to λ₁ = −1:
        `optax.linear_schedule(1.0, -1.0, total_steps)`.
      decay: δ in [0, 1). Default 0.9, from the paper.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0 or decay is outside [0, 1).

    References:
      Jiang et al., `An Adaptive Policy to Employ Sharpness-Aware Minimization
      <https://arxiv.org/abs/2304.14647>`_, ICLR 2023.

    Differences from the authors' code: not checked; the method follows the paper.

    Cost: 1 to 2 gradients a step; no tree is carried.
    """
    cadence = when_steep(threshold, decay=decay)
    return sharpness_aware(sam_ascent(rho), cadence=cadence, **options)
