"""LookSAM, and the method that its paper compares it with: SAM on every k-th step."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from sam_optax import _tree
from sam_optax._checks import check_number, check_static_integer
from sam_optax._hyperparameters import ScalarOrSchedule, value_at
from sam_optax._parts import Cadence
from sam_optax._step import Options, sharpness_aware
from sam_optax.methods._record import record
from sam_optax.methods._sam import sam_ascent


class EveryKState(NamedTuple):
    """State of `every_k`."""

    cadence_step: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32


def every_k(k: int) -> Cadence:
    """Takes the second gradient on steps 0, k, 2k, ...; in between, d = g.

    Args:
      k: the period, a Python integer >= 1.

    Returns:
      A cadence. The compiled program makes the decision, so the second gradient is
      inside a `lax.cond`. To compile one program for each kind of step instead, pass
      `ascend=step % k == 0` as a Python bool.

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


class ReusingState(NamedTuple):
    """State of `reusing`."""

    timing_state: Any  # that of the cadence which decides
    reusing_step: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32
    kept_direction: Any  # like the parameters, at least float32; v/‖v‖, or zero


def reusing(
    cadence: Cadence, alpha: ScalarOrSchedule = 0.7, *, per_tensor: bool = False
) -> Cadence:
    r"""Decides as another cadence does, and reuses the second gradient in between.

    A step that takes the second gradient keeps the part of d that is orthogonal to g,
    as LookSAM does, and the steps without one follow it:

    .. math::
      v = d - \mathrm{proj}_g\, d \ \text{ is kept}, \qquad
      d = g + \alpha \frac{\|g\|}{\|v\|} v \ \text{ in between}

    Before the first step that takes the second gradient, d = g.

    Args:
      cadence: decides which steps take the second gradient. What it would itself put in
        the place of d on the other steps is not used.
      alpha, per_tensor: those of the method `look_sam`. Default 0.7 and False.

    Returns:
      A cadence that carries v/‖v‖, in at least float32, and the state of the other one.

    Raises:
      ValueError: if alpha is not finite.
      TypeError: if cadence is not a `Cadence`.

    Examples:
      LookSAM with a random rhythm:

      >>> import sam_optax
      >>> from sam_optax import ascents, cadences
      >>> sam = sam_optax.sharpness_aware(
      ...     ascents.sam(rho=0.1), cadence=cadences.reusing(cadences.at_random(0.2)))
    """
    if not isinstance(cadence, Cadence):
        raise TypeError(
            "cadence must be a sam_optax.cadences.Cadence, such as "
            f"cadences.at_random(0.2), got {cadence!r}."
        )
    check_number("alpha", alpha)

    def each(function, *trees):
        return jax.tree.map(function, *trees) if per_tensor else function(*trees)

    def direction_of(d, g):
        # gᵃ − g and gᵃ have the same part orthogonal to g; computed from gᵃ − g, it
        # loses fewer digits. It counts as zero if it is only rounding error of gᵃ.
        return _tree.unit_unless_rounding_of(d, _tree.orthogonal_difference(d, g, g))

    def init(params):
        step = jnp.zeros((), jnp.int32)
        return ReusingState(cadence.init(params), step, _tree.zeros_like(params))

    def decide(g, state):
        decision, timing = cadence.decide(g, state.timing_state)
        step = optax.safe_increment(state.reusing_step)
        return decision, ReusingState(timing, step, state.kept_direction)

    def remember(d, g, state):
        timing = cadence.remember(d, g, state.timing_state)
        d, g = _tree.at_least_float32(d), _tree.at_least_float32(g)
        return ReusingState(timing, state.reusing_step, each(direction_of, d, g))

    def substitute(g, state):
        weight = value_at(alpha, state.reusing_step - 1)  # decide has counted this step
        return each(
            lambda g, v: _tree.add_scaled(g, weight * _tree.norm(g), v),
            _tree.at_least_float32(g),
            state.kept_direction,
        )

    return Cadence(init, decide, remember, substitute)


def every_k_reusing(
    k: int, alpha: ScalarOrSchedule = 0.7, *, per_tensor: bool = False
) -> Cadence:
    """Takes the second gradient on every k-th step, and reuses it in between.

    It is `reusing(every_k(k), ...)`, the cadence of the method `look_sam`.

    Args:
      k: the period, a Python integer >= 1.
      alpha, per_tensor: those of the method `look_sam`. Default 0.7 and False.

    Returns:
      A cadence that carries v/‖v‖, in at least float32. The compiled program makes the
      decision; see `every_k`.

    Raises:
      ValueError: if k is not a positive integer, or alpha is not finite.
    """
    return reusing(every_k(k), alpha, per_tensor=per_tensor)


@record(
    title="LookSAM",
    equation="every k-th step SAM, and v = gᵃ − proj gᵃ on g is kept; "
    "else d = g + α‖g‖ v/‖v‖",
    source="Liu 2022",
    url="https://arxiv.org/abs/2203.02714",
    gradients=lambda k: 1 + 1 / k,
    cost="1 + 1/k",
)
def look_sam(
    rho: ScalarOrSchedule = 0.05,
    k: int = 5,
    alpha: ScalarOrSchedule = 0.7,
    *,
    per_tensor: bool = False,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""LookSAM: SAM on every k-th step, and reuse of its direction in between.

    .. math::
      v = g^a - \mathrm{proj}_g\, g^a \ \text{ every k-th step}, \qquad
      d = g + \alpha \frac{\|g\|}{\|v\|} v \ \text{ in between}

    Args:
      rho: the radius ρ = ‖ε‖. Default 0.05, from the paper's experiments.
      k: the period, a Python integer >= 1. Default 5, from the paper.
      alpha: the weight α of the kept direction. Default 0.7, from the paper.
      per_tensor: whether projections and norms are taken leaf by leaf, as third-party
        code does. Default False: over all leaves, as in the paper.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0 or k is not a positive integer.

    Examples:
      Look-LayerSAM, the variant of the paper for large batches, is this cadence after
      an ascent with a radius for each layer, ‖ε_l‖ = ρ ‖w_l‖. Here the two layers have
      the norms 5 and 1, and gᵃ = w + ε = w + 0.1 w on the first step.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> from sam_optax import ascents, cadences
      >>> layer_sam = optax.chain(
      ...     ascents.normalize_by_leaf_norm(),
      ...     ascents.scale_by_leaf_norm(),
      ...     ascents.scale_by_rho(0.1))
      >>> look_layer_sam = sam_optax.sharpness_aware(
      ...     layer_sam, cadence=cadences.every_k_reusing(k=5, alpha=0.7))
      >>> w = {"body": jnp.array([3.0, 4.0]), "head": jnp.array([-1.0])}
      >>> grad_fn = jax.grad(lambda w: optax.tree.norm(w, squared=True) / 2)
      >>> d, _ = look_layer_sam.update(
      ...     grad_fn(w), look_layer_sam.init(w), w, grad_fn=grad_fn)
      >>> print(d["body"], d["head"])
      [3.3 4.4] [-1.1]

    References:
      Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.02714>`_, CVPR 2022.
      We could not read the paper's formula of Look-LayerSAM, and implementations by
      others disagree. The example has the factor ‖w_l‖/‖g_l‖ that two of three have for
      a layer l. They also divide by a norm of g; then ε depends on the scale of the
      loss.

    Differences from third-party code:
      1. It takes norms per tensor, as per_tensor=True does here.
      2. It adds an epsilon of 1e-8. Here v counts as zero if it is only rounding error.

    Cost: 1 + 1/k gradients a step; one tree is carried, in at least float32.
    """
    cadence = every_k_reusing(k, alpha, per_tensor=per_tensor)
    return sharpness_aware(sam_ascent(rho), cadence=cadence, **options)


@record(
    title="SAM every k",
    equation="every k-th step SAM; else d = g",
    source="Liu 2022",
    url="https://arxiv.org/abs/2203.02714",
    gradients=lambda k: 1 + 1 / k,
    cost="1 + 1/k",
)
def sam_every_k(
    rho: ScalarOrSchedule = 0.05, k: int = 5, **options: Unpack[Options]
) -> optax.GradientTransformationExtraArgs:
    r"""SAM on every k-th step, and the base optimizer alone in between.

    .. math::
      d = \nabla L(w + \rho g/\|g\|) \ \text{ every k-th step}, \qquad
      d = g \ \text{ in between}

    Args:
      rho: the radius ρ = ‖ε‖. Default 0.05, that of `sam`.
      k: the period, a Python integer >= 1. Default 5, that of `look_sam`.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0 or k is not a positive integer.

    Examples:
      On f(w) = w², the first step from w = 1 is SAM's, 1 − 0.1 · 3, and the second one
      SGD's, 0.7 − 0.1 · 1.4.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.sam_every_k(rho=0.5, k=2), optax.sgd(0.1))
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> w = jnp.array(1.0)
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
      ...     w = optax.apply_updates(w, updates)
      ...     print(f"{w:.2f}")
      0.70
      0.56

    References:
      Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.02714>`_, CVPR 2022.
      The paper compares LookSAM with this method.

    Differences from the authors' code: none is published for this variant.

    Cost: 1 + 1/k gradients a step; no tree is carried.
    """
    return sharpness_aware(sam_ascent(rho), cadence=every_k(k), **options)
