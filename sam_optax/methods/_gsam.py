"""GSAM: a step also lowers the surrogate gap, L(w + ε) − L(w)."""

from typing import Unpack

import optax

from sam_optax import _tree
from sam_optax._checks import check_number
from sam_optax._hyperparameters import ScalarOrSchedule, map_value, scheduled
from sam_optax._parts import Descent
from sam_optax._step import Options, sharpness_aware
from sam_optax.methods._descent import blend, stateless_descent
from sam_optax.methods._record import record
from sam_optax.methods._sam import sam_ascent


def gsam_descent(
    alpha: ScalarOrSchedule = 0.4, *, minimize: str = "perturbed_loss"
) -> optax.GradientTransformationExtraArgs:
    r"""Descends on one loss, and on the surrogate gap without raising that loss.

    .. math::
      d = g^a - \alpha \, (g - \mathrm{proj}_{g^a}\, g)
      \qquad\text{or, to minimize the loss,}\qquad
      d = g + \alpha \, (g^a - \mathrm{proj}_{g}\, g^a)

    The surrogate gap is L(w + ε) − L(w).

    Args:
      alpha: the weight α of the gap. Default 0.4, the paper's for two of four ViTs
        (Table 4). Its ResNets take 0.005 to 0.01, its Mixers 0.01 to 0.6.
      minimize: the loss to descend on: `"perturbed_loss"` (default) is L(w + ε), as in
        the paper's Algorithm 1; `"loss"` is L(w), the other form of the authors' JAX
        code.

    Returns:
      A descent for `sharpness_aware`.

    Raises:
      ValueError: if minimize is neither of the two.

    Examples:
      The part of g = (1, 1) that is orthogonal to gᵃ = (2, 0) is (0, 1).

      >>> import jax.numpy as jnp
      >>> descent, ga, g = gsam_descent(0.4), jnp.array([2.0, 0.0]), jnp.ones(2)
      >>> d, _ = descent.update(ga, descent.init(g), ascent_gradient=g)
      >>> print(d)
      [ 2.  -0.4]

      With ASAM's ascent, this descent is the paper's "ASAM + ascent":

      >>> import sam_optax
      >>> sam = sam_optax.sharpness_aware(
      ...     sam_optax.ascents.asam(rho=0.5), descent=sam_optax.descents.gsam(0.4))

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, ICLR 2022.
    """
    check_number("alpha", alpha)
    if minimize not in ("perturbed_loss", "loss"):
        raise ValueError(
            f"minimize must be 'perturbed_loss' or 'loss', got {minimize!r}."
        )

    def part(alpha):
        def descend(ga, g, perturbation, params):
            del perturbation, params
            kept = ga if minimize == "perturbed_loss" else g
            # −g and gᵃ − g have the same part orthogonal to gᵃ; gᵃ and gᵃ − g have the
            # same part orthogonal to g. That of gᵃ − g is zero if the gradients agree.
            residual = _tree.orthogonal_difference(ga, g, kept)
            return _tree.add_scaled(kept, alpha, residual)

        return stateless_descent(descend)

    return Descent.of(scheduled(part, alpha=alpha), compares=True)


@record(
    title="Surrogate Gap Guided SAM",
    equation="d = gᵃ − α(g − proj g on gᵃ)",
    source="Zhuang 2022",
    url="https://arxiv.org/abs/2203.08065",
)
def gsam(
    rho: ScalarOrSchedule = 0.05,
    alpha: ScalarOrSchedule = 0.4,
    *,
    minimize: str = "perturbed_loss",
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Surrogate Gap Guided Sharpness-Aware Minimization (GSAM).

    .. math::
      \varepsilon = \rho \frac{g}{\|g\|}, \qquad g^a = \nabla L(w + \varepsilon), \qquad
      d = g^a - \alpha \, (g - \mathrm{proj}_{g^a}\, g)

    The step lowers the perturbed loss L(w + ε), as SAM's step does. It also lowers the
    surrogate gap, L(w + ε) − L(w), along a direction orthogonal to gᵃ, in which the
    perturbed loss does not change to first order.

    Args:
      rho: the radius ρ = ‖ε‖. Default 0.05, that of `sam`. The paper ties it to the
        learning rate; see `rho_from_learning_rate`.
      alpha, minimize: those of `descents.gsam`. Default 0.4 and `"perturbed_loss"`.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0, or minimize is neither of the two.

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, ICLR 2022, Algorithm 1.

    Differences from the authors' code:
      1. No epsilon is added to the norms.
      2. The adaptive perturbation of their JAX code, ρ |w| g/‖g‖, is not offered.
         ASAM's is, as `sharpness_aware(ascents.asam(), descent=descents.gsam())`.

    Cost: 2 gradients a step; no tree is carried.
    """
    descent = gsam_descent(alpha, minimize=minimize)
    return sharpness_aware(sam_ascent(rho), descent=descent, **options)


@record(
    title="SAM with the gap as a penalty",
    equation="d = gᵃ + λ(gᵃ − g)",
    source="Zhuang 2022",
    url="https://arxiv.org/abs/2203.08065",
)
def sam_plus_gap(
    rho: ScalarOrSchedule = 0.05,
    lam: ScalarOrSchedule = 1.0,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""SAM with the surrogate gap as a penalty.

    .. math::
      \varepsilon = \rho \frac{g}{\|g\|}, \qquad
      d = g^a + \lambda \, (g^a - g)

    This is the gradient of L(w + ε) + λ (L(w + ε) − L(w)). The GSAM paper compares GSAM
    with it in section 4.1, and argues that the gradients of the two terms can conflict.

    Args:
      rho: the radius ρ = ‖ε‖. Default 0.05, that of `sam`.
      lam: the weight λ of the gap. Default 1; the paper varies it.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0.

    Examples:
      On f(w) = w² from w = 1, g is 2 and gᵃ is 3, so d = 3 + 1 · (3 − 2).

      >>> import jax, jax.numpy as jnp, sam_optax
      >>> sam, w = sam_optax.sam_plus_gap(rho=0.5), jnp.array(1.0)
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> d, _ = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
      >>> print(f"{d:.2f}")
      4.00

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, ICLR 2022, section 4.1 and Table 2.

    Differences from the authors' code: none is published for this variant.

    Cost: 2 gradients a step; no tree is carried.
    """
    check_number("lam", lam)
    descent = blend(map_value(lambda lam: 1 + lam, lam))
    return sharpness_aware(sam_ascent(rho), descent=descent, **options)
