"""Randomized SAM training: each step is SAM's with a given probability."""

import math
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from sam_optax._checks import check_number
from sam_optax._hyperparameters import ScalarOrSchedule, value_at
from sam_optax._parts import Cadence
from sam_optax._random import Key, key_stream
from sam_optax._step import Options, sharpness_aware
from sam_optax.methods._descent import blend
from sam_optax.methods._record import record
from sam_optax.methods._sam import sam_ascent


class AtRandomState(NamedTuple):
    """State of `at_random`."""

    cadence_step: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32
    cadence_key: jax.Array  # key data, dtype=jnp.uint32


def at_random(probability: ScalarOrSchedule, *, key: Key = 0) -> Cadence:
    """Takes the second gradient on each step with a given probability; else d = g.

    Args:
      probability: a number from 0 to 1, a schedule of the step, or a traced scalar.
      key: an int, a typed key or a legacy one. Default 0.

    Returns:
      A cadence. The compiled program makes the decision, so the second gradient is
      inside a `lax.cond`. To compile one program for each kind of step instead, draw in
      Python and pass the result as `ascend=`.

    Raises:
      ValueError: if probability is a Python number outside [0, 1].
    """
    check_number("probability", probability, at_least=0, at_most=1)
    keys = key_stream(key, "at_random")

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


@record(
    title="Randomized SAM training",
    equation="SAM, or d = g + α(gᵃ − g), with probability p; else d = g",
    source="Zhao 2022",
    url="https://arxiv.org/abs/2203.09962",
    gradients=lambda probability: (
        math.nan if callable(probability) else 1 + probability
    ),
    cost="1 + p",
)
def rst(
    rho: ScalarOrSchedule = 0.05,
    probability: ScalarOrSchedule = 0.5,
    *,
    alpha: ScalarOrSchedule | None = None,
    key: Key = 0,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Randomized Sharpness-Aware Training (RST), and its general form G-RST.

    .. math::
      d = \nabla L(w + \rho g/\|g\|) \ \text{ with probability } p_t, \qquad
      d = g \ \text{ otherwise}

    G-RST mixes the two gradients of a step that ascends, with a weight α:

    .. math::
      d = g + \alpha_t \, \big(\nabla L(w + \rho g/\|g\|) - g\big)
      \ \text{ with probability } p_t, \qquad d = g \ \text{ otherwise}

    The expectation of d is g + p α (gᵃ − g). With α = 1/p, it is SAM's gᵃ.

    Args:
      rho: the radius ρ = ‖ε‖. Default 0.05, that of `sam`.
      probability: p_t, a number from 0 to 1 or a schedule of the step. Default 0.5, the
        paper's constant.
      alpha: α_t, the weight of gᵃ in G-RST: a number, a schedule of the step, or a
        traced scalar. Default None: RST, which is α = 1.
      key: an int, a typed key or a legacy one. Default 0.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0 or probability is outside [0, 1].

    Examples:
      On f(w) = w² from w = 1, g is 2 and gᵃ is 3. This step ascends for certain, and
      d = 2 + 2 · (3 − 2).

      >>> import jax, jax.numpy as jnp, sam_optax
      >>> sam = sam_optax.rst(rho=0.5, probability=1.0, alpha=2.0)
      >>> grad_fn, w = jax.grad(lambda w: w**2), jnp.array(1.0)
      >>> d, _ = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
      >>> print(f"{d:.2f}")
      4.00

    References:
      Zhao et al., `Randomized Sharpness-Aware Training for Boosting Computational
      Efficiency in Deep Learning <https://arxiv.org/abs/2203.09962>`_, 2022.

    Differences from the authors' code: not checked, as we found none. Of G-RST we know
    what the paper's abstract says: it adjusts how strongly sharpness is penalised, for
    any p_t. Its mixture here is the one that the same authors use for the gradient-norm
    penalty.

    Cost: 1 + p gradients a step; no tree is carried.
    """
    if alpha is not None:
        check_number("alpha", alpha)
    descent = None if alpha is None else blend(alpha)
    cadence = at_random(probability, key=key)
    return sharpness_aware(sam_ascent(rho), descent=descent, cadence=cadence, **options)
