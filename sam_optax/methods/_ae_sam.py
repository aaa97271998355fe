"""AE-SAM and AE-LookSAM: SAM on the steps whose gradient is large."""

import math
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from sam_optax import _tree
from sam_optax._checks import check_number, check_static_integer
from sam_optax._hyperparameters import ScalarOrSchedule, value_at
from sam_optax._parts import Cadence
from sam_optax._step import Options, sharpness_aware
from sam_optax.methods._look_sam import reusing
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
      threshold: c_t, a number, a schedule of the step, or a traced scalar. The paper's
        is the schedule `optax.linear_schedule(1.0, -1.0, total_steps)`: at first, few
        steps ascend, and in the end most do.
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


def _schedule(
    threshold: ScalarOrSchedule | None, total_steps: int | None
) -> ScalarOrSchedule:
    """c_t: as given, or the paper's for a number of steps; 0 if there is neither."""
    if total_steps is None:
        return 0.0 if threshold is None else threshold
    check_static_integer("total_steps", total_steps)
    if threshold is not None:
        raise ValueError(
            "Pass either total_steps, for the paper's schedule of the threshold, or a "
            "threshold of your own, not both."
        )
    return optax.linear_schedule(1.0, -1.0, total_steps)


@record(
    title="Adaptive policy for SAM",
    equation="SAM where ‖g‖² ≥ mean + c · standard deviation, of its recent past; "
    "else d = g. c goes from 1 to −1",
    source="Jiang 2023",
    url="https://arxiv.org/abs/2304.14647",
    gradients=math.nan,
    cost="1 to 2",
)
def ae_sam(
    rho: ScalarOrSchedule = 0.05,
    threshold: ScalarOrSchedule | None = None,
    decay: ScalarOrSchedule = 0.9,
    *,
    total_steps: int | None = None,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive policy to Employ Sharpness-Aware Minimization (AE-SAM).

    .. math::
      \mu_t = \delta \mu_{t-1} + (1-\delta) \|g_t\|^2, \quad
      \sigma_t^2 = \delta \sigma_{t-1}^2 + (1-\delta) (\|g_t\|^2 - \mu_t)^2, \quad
      \text{SAM where } \|g_t\|^2 \ge \mu_t + c_t \sigma_t

    .. math::
      c_t = \lambda_2 + \frac{t}{T} (\lambda_1 - \lambda_2), \qquad
      \lambda_2 = 1, \quad \lambda_1 = -1

    with μ₋₁ = 0 and σ₋₁ = e⁻¹⁰. On the other steps, d = g. As c_t falls over the T
    steps of the training, more and more of them take the second gradient.

    Args:
      rho: the radius ρ = ‖ε‖. Default 0.05, that of `sam`.
      threshold: c_t, a number, a schedule of the step, or a traced scalar, in place of
        the paper's schedule. Default None.
      decay: δ in [0, 1). Default 0.9, from the paper.
      total_steps: T, the number of steps of the training, a Python integer >= 1. With
        it, c_t is the paper's schedule. Default None: c_t is the threshold; if there is
        none either, it is 0 on all steps. That is a policy, but not the paper's.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0, decay is outside [0, 1), total_steps is not a positive
        integer, or both total_steps and threshold are given.

    Examples:
      Descent on f(w) = w², where the gradient shrinks. It is soon below its recent
      mean, so the steps take one gradient. From step 15 on they take two again, because
      c_t has fallen.

      >>> import jax, jax.numpy as jnp, sam_optax
      >>> sam, grad_fn, w = sam_optax.ae_sam(total_steps=20), jax.grad(jnp.square), 1.0
      >>> state, one_gradient = sam.init(w), []
      >>> for t in range(20):
      ...     g = grad_fn(w)
      ...     d, state = sam.update(g, state, w, grad_fn=grad_fn)
      ...     one_gradient += [t] if d == g else []
      ...     w = w - 0.1 * d
      >>> one_gradient
      [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]

    References:
      Jiang et al., `An Adaptive Policy to Employ Sharpness-Aware Minimization
      <https://arxiv.org/abs/2304.14647>`_, ICLR 2023.

    Differences from the authors' code: not checked, as we found none. The method
    follows the paper.

    Cost: 1 to 2 gradients a step; no tree is carried.
    """
    cadence = when_steep(_schedule(threshold, total_steps), decay=decay)
    return sharpness_aware(sam_ascent(rho), cadence=cadence, **options)


@record(
    title="Adaptive policy for LookSAM",
    equation="`ae_sam`, and where it is d = g there, `look_sam`'s d = g + α‖g‖ v/‖v‖",
    source="Jiang 2023",
    url="https://arxiv.org/abs/2304.14647",
    gradients=math.nan,
    cost="1 to 2",
)
def ae_look_sam(
    rho: ScalarOrSchedule = 0.05,
    threshold: ScalarOrSchedule | None = None,
    decay: ScalarOrSchedule = 0.9,
    alpha: ScalarOrSchedule = 0.7,
    *,
    total_steps: int | None = None,
    per_tensor: bool = False,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""AE-LookSAM: AE-SAM decides when, and LookSAM's direction is reused in between.

    .. math::
      v = g^a - \mathrm{proj}_g\, g^a \ \text{ where AE-SAM takes a step of SAM}, \qquad
      d = g + \alpha \frac{\|g\|}{\|v\|} v \ \text{ on the other steps}

    `ae_sam` has the equation of the decision.

    Args:
      rho: the radius ρ = ‖ε‖. Default 0.05, that of `sam`.
      threshold, decay, total_steps: those of `ae_sam`. Default None, 0.9 and None; pass
        total_steps to follow the paper.
      alpha, per_tensor: those of `look_sam`. Default 0.7 and False.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: as `ae_sam`.

    References:
      Jiang et al., `An Adaptive Policy to Employ Sharpness-Aware Minimization
      <https://arxiv.org/abs/2304.14647>`_, ICLR 2023.

    Differences from the authors' code: not checked, as we found none. We know the two
    methods that are combined, and the paper's abstract, which names the combination.

    Cost: 1 to 2 gradients a step; one tree is carried, in at least float32.
    """
    policy = when_steep(_schedule(threshold, total_steps), decay=decay)
    cadence = reusing(policy, alpha, per_tensor=per_tensor)
    return sharpness_aware(sam_ascent(rho), cadence=cadence, **options)
