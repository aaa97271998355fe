"""Random SAM and R-SAM: the perturbation is Gaussian noise, or starts from it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax import _tree
from sam_optax._checks import (
    check_constant,
    check_number,
    require_grad_fn,
    require_params,
)
from sam_optax._hyperparameters import ScalarOrSchedule, scheduled
from sam_optax._masks import Mask
from sam_optax._parts import Ascent, as_ascent, chain
from sam_optax._random import Key, key_stream
from sam_optax._rounding import round_to_nearest
from sam_optax._step import sharpness_aware
from sam_optax.methods._noise import noisy
from sam_optax.methods._record import record
from sam_optax.methods._sam import (
    normalize_by_global_norm,
    sam_ascent,
    scale_by_rho,
)


def replace_by_noise(key: Key = 0) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradient by Gaussian noise, N(0, 1/p · I) for p parameters.

    The gradient is not used, so XLA can drop the backward pass that computes it.

    Args:
      key: an int, a typed key or a legacy one. Default 0.

    Returns:
      A transformation whose output has an expected squared norm of 1. It carries a key.
    """

    def draw(key, updates):
        scale = 1 / math.sqrt(max(optax.tree.size(updates), 1))
        return _tree.scale(scale, _tree.normal_like(key, updates))

    noise = noisy(key, draw, name="replace_by_noise")
    return Ascent.of(noise, uses_gradient=False, shows_nonfinite=True)


class SmoothedState(NamedTuple):
    """State of `ascend_from_noise`."""

    noise_key: jax.Array  # key data, dtype=jnp.uint32
    smoothed_state: optax.OptState


def ascend_from_noise(
    ascent: optax.GradientTransformation,
    sigma: ScalarOrSchedule = 0.05,
    *,
    radius: float | None = None,
    key: Key = 0,
    name: str = "",
) -> optax.GradientTransformationExtraArgs:
    r"""Adds Gaussian noise to the parameters, and ascends from there.

    .. math::
      \delta \sim N(0, \sigma^2/p \cdot I), \qquad
      \varepsilon = \delta + \mathrm{ascent}(\nabla L(w + \delta))

    for p parameters. With a radius, longer δ are cut to it.

    Args:
      ascent: an ascent, such as `ascents.sam(rho)`.
      sigma: σ, the root of the expected squared norm of δ. Default 0.05.
      radius: the largest ‖δ‖. Default None: there is none.
      key: an int, a typed key or a legacy one. Default 0.
      name: two parts with the same key draw other numbers if their names differ.
        Default "".

    Returns:
      A transformation that carries a key, and needs `grad_fn=` and the parameters. It
      does not use the gradient at w.

    Raises:
      ValueError: if sigma or radius is negative, or, from `update`, if params or
        grad_fn is missing.
    """
    check_number("sigma", sigma, at_least=0)
    if radius is not None:
        check_constant("radius", radius, at_least=0)
    ascent = as_ascent(ascent)
    if ascent.follow or not ascent.uses_gradient:
        raise ValueError(
            "ascend_from_noise gives the ascent the gradient at a random point, and "
            "this ascent follows something else than the gradient."
        )
    keys = key_stream(key, f"ascend_from_noise {name}".strip())

    def part(sigma):
        def init_fn(params):
            return SmoothedState(keys.start(), ascent.init(params))

        def update_fn(
            updates: optax.Updates,
            state: Any,
            params: optax.Params | None = None,
            *,
            grad_fn: Any = None,
            perturb: Callable[..., optax.Params] = round_to_nearest,
            group: Any = None,
            **extra: Any,
        ) -> tuple[optax.Updates, SmoothedState]:
            require_params(params, "ascend_from_noise")
            require_grad_fn(grad_fn, "ascend_from_noise")
            now, later = keys.next(state.noise_key, group)
            share = sigma / math.sqrt(max(optax.tree.size(updates), 1))
            noise = _cut(_tree.scale(share, _tree.normal_like(now, updates)), radius)
            g = _tree.at_least_float32(grad_fn(perturb(params, noise)))
            extra |= {"grad_fn": grad_fn, "perturb": perturb, "group": group}
            extra["ascent_gradient"] = g
            step, inner = ascent.update(g, state.smoothed_state, params, **extra)
            return _tree.add_scaled(noise, 1, step), SmoothedState(later, inner)

        noisy_ascent = optax.GradientTransformationExtraArgs(init_fn, update_fn)
        return Ascent.of(noisy_ascent, uses_gradient=False)

    return scheduled(part, sigma=sigma, uses_gradient=False)


def _cut(tree: optax.Updates, radius: float | None) -> optax.Updates:
    """The tree, or what lies in its direction at the radius if it is longer."""
    if radius is None:
        return tree
    size = _tree.norm(tree)
    is_longer = size > radius
    shrink = jnp.where(is_longer, radius / jnp.where(is_longer, size, 1), 1)
    return _tree.scale(shrink, tree)


@record(
    title="Random SAM",
    equation="ε random, N(0, ρ²/n), n parameters",
    radius="√(E‖ε‖²)",
    source="Ujváry 2022",
    url="https://arxiv.org/abs/2210.10452",
    gradients=1,
    cost="1 + a forward pass",
)
def random_sam(
    rho: ScalarOrSchedule = 0.05,
    *,
    normalized: bool = False,
    key: Key = 0,
    mask: Mask = None,
    guard: bool = False,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Descent at a random point of the neighbourhood, the average case of SAM.

    .. math::
      \varepsilon \sim N(0, \tfrac{\rho^2}{p} I), \qquad
      d = \nabla L(w + \varepsilon)

    for p parameters.

    Args:
      rho: ρ, the root of the expected squared norm: E‖ε‖² = ρ². Default 0.05, that of
        `sam`. The loss hardly rises along a random direction: to raise it as much as
        SAM does, ρ must grow with √p.
      normalized: whether to put ε on the sphere, ‖ε‖ = ρ. Default False.
      key: an int, a typed key or a legacy one. Default 0.
      guard: passed on to `sharpness_aware`. Default False: the method carries nothing
        that needs a guard.
      mask, stochastic_rounding: passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0.

    References:
      Ujváry et al., `Rethinking Sharpness-Aware Minimization as Variational Inference
      <https://arxiv.org/abs/2210.10452>`_, 2022, which calls it Random SAM.

    Differences from the authors' code: there is none.

    Cost: 1 gradient a step, and a forward pass more if the loss or the auxiliary output
    at w is used, which value_at="perturbed" avoids; a key is carried.
    """
    ascent = chain(
        replace_by_noise(key),
        normalize_by_global_norm() if normalized else optax.identity(),
        scale_by_rho(rho),
    )
    return sharpness_aware(
        ascent, mask=mask, guard=guard, stochastic_rounding=stochastic_rounding
    )


@record(
    title="R-SAM",
    equation="ε = δ + ρ g(w+δ)/‖g(w+δ)‖, δ random, N(0, σ²/n)",
    radius="‖ε − δ‖",
    source="Liu 2022",
    url="https://openreview.net/forum?id=htUvh7xPoa",
    gradients=2,
    cost="2 + a forward pass",
)
def rsam(
    rho: ScalarOrSchedule = 0.05,
    sigma: ScalarOrSchedule = 0.05,
    *,
    key: Key = 0,
    mask: Mask = None,
    guard: bool = False,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Random Sharpness-Aware Minimization (R-SAM).

    .. math::
      \delta \sim N(0, \tfrac{\sigma^2}{p} I), \qquad
      \varepsilon = \delta
        + \rho \frac{\nabla L(w + \delta)}{\|\nabla L(w + \delta)\|}, \qquad
      d = \nabla L(w + \varepsilon)

    for p parameters.

    Args:
      rho: the radius ρ = ‖ε − δ‖. Default 0.05, that of `sam`.
      sigma: σ, the root of the expected squared norm of δ. Default 0.05, like rho.
      key: an int, a typed key or a legacy one. Default 0.
      guard: passed on to `sharpness_aware`. Default False, as for `random_sam`.
      mask, stochastic_rounding: passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0 or sigma < 0.

    References:
      Liu et al., `Random Sharpness-Aware Minimization
      <https://openreview.net/forum?id=htUvh7xPoa>`_, NeurIPS 2022.

    Differences from the paper: its noise is scaled with the weights, filter by filter.
    Here all entries have the same variance.

    Cost: 2 gradients a step, and a forward pass for the loss; a key is carried.
    """
    ascent = ascend_from_noise(sam_ascent(rho), sigma, key=key)
    return sharpness_aware(
        ascent, mask=mask, guard=guard, stochastic_rounding=stochastic_rounding
    )
