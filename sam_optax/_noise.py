"""Parts of the ascent axis that draw random numbers.

Each carries a key, which advances on every step. The key of a step is folded with the
extra argument `group`, so that every group of examples draws its own numbers.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax import _tree
from sam_optax._ascent import require_params
from sam_optax._hyperparameters import (
    ScalarOrSchedule,
    check_number,
    check_static_integer,
    scheduled,
)
from sam_optax._perturb import round_to_nearest
from sam_optax._random import Key, key_stream


class NoiseState(NamedTuple):
    """State of the parts that draw random numbers."""

    noise_key: jax.Array  # key data, dtype=jnp.uint32


class SmoothedState(NamedTuple):
    """State of `ascend_from_noise`."""

    noise_key: jax.Array  # key data, dtype=jnp.uint32
    smoothed_state: optax.OptState


def _noisy(key: Key, function: Any) -> optax.GradientTransformationExtraArgs:
    """A part from a function (key, updates) -> updates."""
    keys = key_stream(key)

    def update_fn(updates, state, params=None, *, group=None, **extra_args):
        del params, extra_args
        now, later = keys.next(state.noise_key, group)
        return function(now, _tree.at_least_float32(updates)), NoiseState(later)

    return optax.GradientTransformationExtraArgs(
        lambda params: NoiseState(keys.start()), update_fn
    )


def replace_by_noise(key: Key = 0) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradient by Gaussian noise, N(0, 1/p · I) for p parameters.

    The gradient is not used, so that XLA drops the backward pass that computes it.

    Args:
      key: an int, a typed key or a legacy one. Default 0.

    Returns:
      A transformation whose output has expected squared norm 1. It carries a key.
    """

    def draw(key, updates):
        scale = 1 / math.sqrt(max(_tree.size(updates), 1))
        return _tree.scale(scale, _tree.normal_like(key, updates))

    return _noisy(key, draw)


def mask_at_random(
    keep: ScalarOrSchedule = 0.6, *, key: Key = 0
) -> optax.GradientTransformationExtraArgs:
    """Keeps every entry with probability β, divided by β, so that the mean stays.

    Args:
      keep: β in (0, 1]. Default 0.6, from ESAM's code.
      key: an int, a typed key or a legacy one. Default 0.

    Returns:
      A transformation that carries a key.

    Raises:
      ValueError: if keep is a Python number outside (0, 1].
    """
    check_number("keep", keep, at_least=0, at_most=1)
    if isinstance(keep, (int, float)) and keep == 0:
        raise ValueError("keep must be > 0, got 0: nothing would be perturbed.")

    def part(keep):
        def mask(key, updates):
            drawn = _tree.uniform_like(key, updates)
            return jax.tree.map(
                lambda u, x: jnp.where(x < keep, u / jnp.asarray(keep, u.dtype), 0),
                updates,
                drawn,
            )

        return _noisy(key, mask)

    return scheduled(part, keep=keep)


def ascend_from_noise(
    ascent: optax.GradientTransformation,
    sigma: ScalarOrSchedule = 0.05,
    *,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Smooths with Gaussian noise first, then ascends from there.

    .. math::
      \delta \sim N(0, \sigma^2/p \cdot I), \qquad
      \varepsilon = \delta + \mathrm{ascent}(\nabla L(w + \delta))

    Args:
      ascent: an ascent, such as `sam_ascent(rho)`.
      sigma: root of the expected squared norm of δ. Default 0.05.
      key: an int, a typed key or a legacy one. Default 0.

    Returns:
      A transformation that carries a key, and needs `grad_fn=` and the parameters. The
      gradient at w itself is not used.

    Raises:
      ValueError: if sigma is negative, or, from `update`, without params or grad_fn.
    """
    check_number("sigma", sigma, at_least=0)
    ascent = optax.with_extra_args_support(ascent)
    keys = key_stream(key)

    def part(sigma):
        def init_fn(params):
            return SmoothedState(keys.start(), ascent.init(params))

        def update_fn(
            updates: Any,
            state: Any,
            params: Any = None,
            *,
            grad_fn: Any = None,
            perturb: Callable[[Any, Any], Any] = round_to_nearest,
            group: Any = None,
            **extra: Any,
        ) -> tuple[Any, Any]:
            _require(params, grad_fn, "ascend_from_noise")
            now, later = keys.next(state.noise_key, group)
            share = sigma / math.sqrt(max(_tree.size(updates), 1))
            noise = _tree.scale(share, _tree.normal_like(now, updates))
            g = _tree.at_least_float32(grad_fn(perturb(params, noise)))
            extra_args = {
                **extra,
                "grad_fn": grad_fn,
                "perturb": perturb,
                "group": group,
            }
            step, smoothed_state = ascent.update(
                g, state.smoothed_state, params, **extra_args | {"ascent_gradient": g}
            )
            perturbation = _tree.add_scaled(noise, 1, step)
            return perturbation, SmoothedState(later, smoothed_state)

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return scheduled(part, sigma=sigma)


def ascend_repeatedly(
    ascent: optax.GradientTransformation, steps: int
) -> optax.GradientTransformationExtraArgs:
    r"""Takes an ascent in n steps, each from where the last one led.

    .. math::
      \varepsilon_{i+1} = \varepsilon_i
        + \tfrac1n \mathrm{ascent}(\nabla L(w + \varepsilon_i)), \quad \varepsilon_0 = 0

    Args:
      ascent: an ascent. Its state follows the gradient at w alone.
      steps: number of ascent steps >= 1, a Python integer. The loop is unrolled.

    Returns:
      A transformation that needs `grad_fn=` and the parameters if steps > 1. It takes
      steps − 1 gradients.

    Raises:
      ValueError: if steps is not a positive integer, or, from `update`, without params
        or grad_fn.
    """
    check_static_integer("steps", steps)
    ascent = optax.with_extra_args_support(ascent)

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        grad_fn: Any = None,
        perturb: Callable[[Any, Any], Any] = round_to_nearest,
        **extra: Any,
    ) -> tuple[Any, Any]:
        extra_args = {**extra, "grad_fn": grad_fn, "perturb": perturb}
        step, new_state = ascent.update(updates, state, params, **extra_args)
        perturbation = _tree.scale(1 / steps, step)
        for _ in range(steps - 1):
            _require(params, grad_fn, "ascend_repeatedly")
            g = _tree.at_least_float32(grad_fn(perturb(params, perturbation)))
            extra_args["ascent_gradient"] = g
            step, _ = ascent.update(g, state, params, **extra_args)
            perturbation = _tree.add_scaled(perturbation, 1 / steps, step)
        return perturbation, new_state

    return optax.GradientTransformationExtraArgs(ascent.init, update_fn)


def _require(params: Any, grad_fn: Any, part: str) -> None:
    require_params(params, part)
    if grad_fn is None:
        raise ValueError(
            f"{part} needs grad_fn= (parameters -> gradient), as sharpness_aware "
            "passes it."
        )
