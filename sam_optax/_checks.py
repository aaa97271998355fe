"""Checks of arguments, each made as soon as the argument is known."""

import math
import numbers
import sys
import types
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sam_optax import _tree

_NOT_THE_USERS = {"sam_optax", "optax", "jax", "flax", "functools"}


def warn(message: str) -> None:
    """A warning that names the user's line, behind the libraries that call us."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _package_of(frame) in _NOT_THE_USERS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _package_of(frame: types.FrameType) -> str:
    return frame.f_globals.get("__name__", "").partition(".")[0]


def check_number(
    name: str,
    value: Any,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
) -> None:
    """Raises for a Python number that is not finite, or outside of these bounds.

    Tracers, JAX arrays and schedules pass: their values are not known when a
    transformation is built, or would have to be fetched from a device.
    """
    if callable(value):
        return
    if isinstance(value, jax.Array) and jnp.ndim(value) == 0:
        return
    if isinstance(value, (np.ndarray, np.generic)) and np.ndim(value) == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"{name} must be a number, a schedule (step -> number) or a scalar array, "
            f"got {value!r}."
        )
    number = float(value)
    if not (at_least <= number < below and above < number <= at_most):
        bounds = []
        if at_least > -math.inf:
            bounds.append(f">= {at_least:g}")
        if above > -math.inf:
            bounds.append(f"> {above:g}")
        if at_most < math.inf:
            bounds.append(f"<= {at_most:g}")
        else:
            bounds.append(f"< {below:g}" if below < math.inf else "finite")
        raise ValueError(f"{name} must be {' and '.join(bounds)}, got {value}.")


def is_infinity(value: Any) -> bool:
    """Whether a Python or NumPy number is +inf, which sets no limit."""
    return isinstance(value, (float, np.floating)) and value == math.inf


def check_transformation(name: str, value: Any) -> None:
    if not isinstance(value, optax.GradientTransformation):
        raise TypeError(
            f"{name} must be an optax.GradientTransformation, got {value!r}."
        )


def check_constant(name: str, value: Any, **bounds: float) -> None:
    """`check_number` for an argument that cannot follow a schedule."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number and (callable(value) or not hasattr(value, "dtype")):
        raise TypeError(
            f"{name} must be a number or a scalar array, and cannot be a schedule; got "
            f"{value!r}."
        )
    check_number(name, value, **bounds)


def is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_positive_integer(name: str, value: Any) -> None:
    """Raises for anything but an integer >= 1."""
    if not is_integer(value) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}.")


def check_static_integer(name: str, value: Any, at_least: int = 1) -> None:
    """Like `check_positive_integer`, for what `optax.inject_hyperparams` may trace."""
    if not is_integer(value) or value < at_least:
        raise ValueError(
            f"{name} must be an integer >= {at_least}, got {value!r}. It chooses code, "
            "so it can be neither traced nor scheduled. Under optax.inject_hyperparams "
            f"pass static_args=('{name}',)."
        )


def check_static_number(name: str, value: Any, **bounds: float) -> None:
    """`check_number` for an argument that decides shapes or counts."""
    if callable(value) or isinstance(value, (jax.Array, np.ndarray)):
        raise TypeError(
            f"{name} must be a Python number, got {value!r}: it decides shapes or "
            "counts, so it can be neither traced nor scheduled. Under "
            f"optax.inject_hyperparams, pass static_args=('{name}',)."
        )
    check_number(name, value, **bounds)


def require_params(params: Any, part: str) -> None:
    if params is None:
        raise ValueError(f"{part} needs the parameters: update(g, state, params).")


def require_grad_fn(grad_fn: Any, part: str) -> None:
    if grad_fn is None:
        raise ValueError(
            f"{part} needs grad_fn= (parameters -> gradient), as sharpness_aware "
            "passes it."
        )


def tree_argument(extra_args: Any, name: str, like: Any, use: str) -> Any:
    """The extra argument of an ascent that must be a tree like another one."""
    value = extra_args.get(name)
    if value is None:
        raise ValueError(
            f"The ascent {use} the extra argument {name!r}, which is missing. Pass "
            f"extra_args={{{name!r}: ...}} to the function that sam_value_and_grad "
            f"returns, or {name}=... to tx.update."
        )
    mismatch = _tree.mismatch(value, like)
    if mismatch:
        raise ValueError(
            f"The extra argument {name!r} must be a tree like the parameters. In it, "
            f"{mismatch}."
        )
    return value


def require_losses(perturbed_loss: Any, value_and_grad_fn: Any, part: str) -> None:
    """For a descent that uses losses, wherever it is called from."""
    if value_and_grad_fn is None or perturbed_loss is None:
        raise ValueError(
            f"{part} needs perturbed_loss= and value_and_grad_fn=, which "
            "sharpness_aware passes where the step takes losses. grad_fn= returns the "
            "gradient alone: take the gradients with sam_optax.sam_value_and_grad, or "
            "pass on the extra arguments of sam_optax.value_and_ascent_grad."
        )
