"""Unified SAM and Monge SAM: the length of ε depends on the length of g."""

from typing import Unpack

import jax.numpy as jnp
import optax

from sam_optax import _tree
from sam_optax._checks import check_number
from sam_optax._hyperparameters import ScalarOrSchedule, scheduled
from sam_optax._parts import Ascent, chain
from sam_optax._step import Options, sharpness_aware
from sam_optax.methods._record import record
from sam_optax.methods._sam import scale_by_rho


def normalize_partly(lam: ScalarOrSchedule = 0.5) -> optax.GradientTransformation:
    r"""Maps g to a mean of itself and its direction.

    .. math::
      u = (1 - \lambda)\, g + \lambda \frac{g}{\|g\|}

    Args:
      lam: λ in [0, 1], the share of the direction. Default 0.5, that of `unified_sam`.

    Returns:
      A transformation. It returns half-precision leaves as float32. If g is zero, so is
      u. If an entry of g is not finite, the whole of u is NaN.

    Raises:
      ValueError: if lam is a Python number outside [0, 1].

    Examples:
      >>> import jax.numpy as jnp
      >>> from sam_optax import ascents
      >>> tx = ascents.normalize_partly(0.5)
      >>> u, _ = tx.update(jnp.array([30.0, 40.0]), tx.init(None))
      >>> print(u)
      [15.3 20.4]
    """
    check_number("lam", lam, at_least=0, at_most=1)

    def part(lam):
        def climb(updates, state, params=None, **extra_args):
            del params, extra_args
            norm = _tree.scaled_norm(updates)
            unit = _tree.to_unit(updates, norm)
            plain = _tree.scale(1 - lam, _tree.at_least_float32(updates))
            mixed = _tree.add_scaled(plain, lam, unit)
            return mixed, state, norm.is_finite

        return Ascent.from_climb(optax.init_empty_state, climb)

    return scheduled(part, lam=lam)


def unified_sam_ascent(
    rho: ScalarOrSchedule = 0.1, lam: ScalarOrSchedule = 0.5
) -> Ascent:
    """The ascent of the method `unified_sam`; it takes the same arguments."""
    return chain(normalize_partly(lam), scale_by_rho(rho))


@record(
    title="Unified SAM",
    equation="ε = ρ (1−λ + λ/‖g‖) g",
    radius="‖ε‖/((1−λ)‖g‖ + λ)",
    source="Oikonomou 2025",
    url="https://arxiv.org/abs/2503.02225",
)
def unified_sam(
    rho: ScalarOrSchedule = 0.1,
    lam: ScalarOrSchedule = 0.5,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Unified SAM, between SAM and unnormalised SAM.

    .. math::
      \varepsilon = \rho \Big(1 - \lambda + \frac{\lambda}{\|g\|}\Big) g, \qquad
      d = \nabla L(w + \varepsilon)

    λ = 1 gives `sam`, and λ = 0 gives `usam`.

    Args:
      rho: ρ, by which the mean of g and its direction is multiplied, so that
        ‖ε‖ = ρ ((1 − λ)‖g‖ + λ). Default 0.1, from the example in the authors' README.
      lam: λ in [0, 1]: a number, a schedule of the step, or a traced scalar. Default
        0.5, one of the values that the paper compares. The authors' code has no
        default.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0 or lam is outside [0, 1].

    Examples:
      On f(w) = w² from w = 1, g is 2, so ε = 0.5 · (0.5 · 2 + 0.5 · 1) and
      d = 2 · 1.75.

      >>> import jax, jax.numpy as jnp, sam_optax
      >>> sam, w = sam_optax.unified_sam(rho=0.5, lam=0.5), jnp.array(1.0)
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> d, _ = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
      >>> print(f"{d:.2f}")
      3.50

      The paper's schedules, λ = 1/t, from SAM to unnormalised SAM, and λ = 1 − 1/t, the
      other way. There t counts from 1, and here steps count from 0:

      >>> sam = sam_optax.unified_sam(lam=lambda step: 1 / (step + 1))
      >>> sam = sam_optax.unified_sam(lam=lambda step: step / (step + 1))

    References:
      Oikonomou and Loizou, `Sharpness-Aware Minimization: General Analysis and Improved
      Rates <https://arxiv.org/abs/2503.02225>`_, ICLR 2025.

    Differences from the authors' code, the package unifiedsam:
      1. No epsilon is added to the norm. Theirs is 1e-12.
      2. Their schedules are the strings '1/t' and '1-1/t'; here they are functions.

    Cost: 2 gradients a step; no tree is carried.
    """
    return sharpness_aware(unified_sam_ascent(rho, lam), **options)


def shorten_by_slope() -> Ascent:
    r"""Maps g to its direction, divided by the slope of the loss surface.

    .. math::
      u = \frac{1}{\sqrt{1 + \|g\|^2}} \frac{g}{\|g\|}

    A step of length ‖u‖ along the parameters has length one on the graph of the loss,
    if the graph is as steep as at w.

    Returns:
      A stateless transformation. It returns half-precision leaves as float32. If g is
      zero, so is u. If an entry of g is not finite, the whole of u is NaN.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sam_optax import ascents
      >>> tx = ascents.shorten_by_slope()
      >>> u, _ = tx.update(jnp.array(0.75), tx.init(None))
      >>> print(u)
      0.8
    """

    def climb(updates, state, params=None, **extra_args):
        del params, extra_args
        norm = _tree.scaled_norm(updates)
        slope = _tree.length(norm)
        unit = _tree.to_unit(updates, norm)
        shortened = _tree.scale(1 / jnp.hypot(jnp.ones_like(slope), slope), unit)
        return shortened, state, norm.is_finite

    return Ascent.from_climb(optax.init_empty_state, climb)


def monge_sam_ascent(rho: ScalarOrSchedule = 0.05) -> Ascent:
    """The ascent of the method `monge_sam`; it takes the same argument."""
    return chain(shorten_by_slope(), scale_by_rho(rho))


@record(
    title="Monge SAM",
    equation="ε = ρ g/(‖g‖ √(1 + ‖g‖²))",
    radius="‖ε‖ √(1 + ‖g‖²)",
    source="Jacobsen 2025",
    url="https://arxiv.org/abs/2502.08448",
)
def monge_sam(
    rho: ScalarOrSchedule = 0.05, **options: Unpack[Options]
) -> optax.GradientTransformationExtraArgs:
    r"""Monge SAM (M-SAM): SAM with distances measured on the graph of the loss.

    .. math::
      \varepsilon = \frac{\rho}{\sqrt{1 + \|g\|^2}} \frac{g}{\|g\|}, \qquad
      d = \nabla L(w + \varepsilon)

    ε solves SAM's inner problem in the metric I + g gᵀ, which the graph of the loss
    induces on the parameters. Where the loss is steep, ε is short, and the step is like
    the base optimizer's; where it is flat, the step is SAM's.

    Args:
      rho: the radius ρ = ‖ε‖ √(1 + ‖g‖²), which is the length of ε in that metric.
        Default 0.05, that of `sam`.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0.

    Examples:
      On f(w) = w² from w = 0.375, the slope is 0.75, so ε = 0.5 / 1.25 and
      d = 2 · (0.375 + 0.4).

      >>> import jax, jax.numpy as jnp, sam_optax
      >>> sam, w = sam_optax.monge_sam(rho=0.5), jnp.array(0.375)
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> d, _ = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
      >>> print(f"{d:.2f}")
      1.55

    References:
      Jacobsen and Arvanitidis, `Monge SAM: Robust Reparameterization-Invariant
      Sharpness-Aware Minimization Based on Loss Geometry
      <https://arxiv.org/abs/2502.08448>`_, 2025. The equation was checked against a
      summary of the paper that quotes it; we have not read the paper's own text.

    Differences from the authors' code: we know of none that is published.

    Cost: 2 gradients a step; no tree is carried.
    """
    return sharpness_aware(monge_sam_ascent(rho), **options)
