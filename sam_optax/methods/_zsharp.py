"""ZSharp: only gradient entries far from the mean of their layer are ascended along."""

from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from sam_optax import _tree
from sam_optax._checks import check_number
from sam_optax._hyperparameters import ScalarOrSchedule, scheduled
from sam_optax._parts import Ascent, chain
from sam_optax._step import Options, sharpness_aware
from sam_optax.methods._order import above_quantile
from sam_optax.methods._record import record
from sam_optax.methods._sam import sam_ascent, scale_by_rho


def keep_large_z_scores(
    quantile: ScalarOrSchedule = 0.95,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps, in each leaf, the entries of g that are farthest from their mean.

    .. math::
      u_j = g_j \text{ if } |z_j| > Q(|z|), \text{ else } 0, \qquad
      z = \frac{g - \mathrm{mean}(g)}{\mathrm{std}(g)}

    mean, std and the quantile Q are those of each leaf by itself.

    Args:
      quantile: the share of the entries that is set to zero, in [0, 1): a number, a
        schedule of the step, or a traced scalar. Default 0.95, that of `zsharp`.

    Returns:
      A transformation. A leaf whose entries are all equal is set to zero. If nothing is
      left of the whole tree, u = g. It returns half-precision leaves as float32.

    Raises:
      ValueError: if quantile is a Python number outside [0, 1).

    Examples:
      >>> import jax.numpy as jnp
      >>> from sam_optax import ascents
      >>> tx = ascents.keep_large_z_scores(0.5)
      >>> g = jnp.array([1.0, 2.0, 3.0, 10.0])
      >>> tx.update(g, tx.init(g))[0].tolist()
      [1.0, 0.0, 0.0, 10.0]
    """
    check_number("quantile", quantile, at_least=0, below=1)

    def part(quantile):
        def keep(updates, params):
            del params
            updates = _tree.at_least_float32(updates)
            kept = jax.tree.map(lambda g: _keep_largest_scores(g, quantile), updates)
            is_empty = _tree.largest_magnitude(kept) == 0
            return jax.tree.map(lambda k, g: jnp.where(is_empty, g, k), kept, updates)

        return optax.stateless(keep)

    return scheduled(part, quantile=quantile)


def _keep_largest_scores(g: jax.Array, quantile: ScalarOrSchedule) -> jax.Array:
    # The standard deviation divides the scores and their quantile alike, so it makes no
    # difference to which of them are larger.
    if not g.size:
        return g
    scores = jnp.abs(g - jnp.mean(g))
    is_kept = above_quantile(scores, jnp.asarray(quantile, scores.dtype))
    return jnp.where(is_kept, g, 0 * g)  # not finite where g is not


def _normalize_as_released(
    quantile: ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    """Filtered matrices over norms of their own, other leaves over that of all of g."""
    check_number("quantile", quantile, at_least=0, below=1)

    def part(quantile):
        def climb(updates, state, params=None, **extra_args):
            del params, extra_args
            norm = _tree.scaled_norm(updates)

            def direction(g, whole):
                if g.ndim < 2:
                    return whole
                kept = _keep_largest_scores(g, quantile)
                own = _tree.scaled_norm(kept)
                return jnp.where(own.square == 0, whole, _tree.to_unit(kept, own))

            directions = jax.tree.map(
                direction,
                _tree.at_least_float32(updates),
                _tree.to_unit(updates, norm),
            )
            return directions, state, norm.is_finite

        return Ascent.from_climb(optax.init_empty_state, climb)

    return scheduled(part, quantile=quantile)


def zsharp_ascent(
    rho: ScalarOrSchedule = 0.05,
    quantile: ScalarOrSchedule = 0.95,
    *,
    as_released: bool = False,
) -> Ascent:
    """The ascent of the method `zsharp`; it takes the same arguments."""
    if as_released:
        return chain(_normalize_as_released(quantile), scale_by_rho(rho))
    return chain(keep_large_z_scores(quantile), sam_ascent(rho))


@record(
    title="ZSharp",
    equation="ε = ρ u/‖u‖, u the entries of g with z-scores above a quantile",
    source="Yun 2025",
    url="https://arxiv.org/abs/2505.02369",
)
def zsharp(
    rho: ScalarOrSchedule = 0.05,
    quantile: ScalarOrSchedule = 0.95,
    *,
    as_released: bool = False,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Sharpness-Aware Minimization with Z-Score Gradient Filtering (ZSharp).

    .. math::
      \varepsilon = \rho \frac{u}{\|u\|}, \qquad
      u_j = g_j \text{ if } |z_j| > Q(|z|), \text{ else } 0, \qquad
      d = \nabla L(w + \varepsilon)

    z are the z-scores of the entries of g in their layer, and Q is their quantile. So ε
    follows the few entries that stand out, 5 % of each layer by default.

    Args:
      rho: the radius ρ = ‖ε‖. Default 0.05, from the paper and the authors' code.
      quantile: the share of the entries of each leaf that are not perturbed, in [0, 1).
        Default 0.95, from the paper and the authors' code.
      as_released: whether to follow the authors' code, where it differs from the
        paper's equation (see below). Then ‖ε‖ is longer than ρ. Default False.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0 or quantile is outside [0, 1).

    Examples:
      Of the gradient (2, 4, 6, 20), half of the entries are kept: the first and the
      last, whose distances from the mean 8 are largest.

      >>> import jax, jax.numpy as jnp, sam_optax
      >>> sam = sam_optax.zsharp(rho=1.0, quantile=0.5)
      >>> w = jnp.array([1.0, 2.0, 3.0, 10.0])
      >>> grad_fn = jax.grad(lambda w: jnp.sum(w**2))
      >>> d, _ = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
      >>> print(d.round(2))
      [ 2.2   4.    6.   21.99]

    References:
      Yun, `Sharpness-Aware Minimization with Z-Score Gradient Filtering
      <https://arxiv.org/abs/2505.02369>`_, 2025. The equation was checked against a
      rendering of the paper's algorithm, not its own text.

    Differences from the authors' code:
      1. There, each matrix is divided by its own norm after the filter, so it has a
         perturbation of length ρ of its own. Vectors are not filtered, and are divided
         by the norm of the whole gradient. as_released=True does the same. Here, as in
         the paper, every leaf is filtered, and one norm runs over all leaves.
      2. No epsilon is added to the norms and the standard deviations. Theirs is 1e-12.

    Cost: 2 gradients a step; no tree is carried. The quantile of a leaf is found by
    counting its entries 32 times, once for each bit of a float32 (64 times in float64).
    Nothing is sorted, so no entry leaves its device.
    """
    ascent = zsharp_ascent(rho, quantile, as_released=as_released)
    return sharpness_aware(ascent, **options)
