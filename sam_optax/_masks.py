"""Masks: which leaves of the parameters are perturbed."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.core import Tracer

from sam_optax import _tree
from sam_optax._checks import require_params

Mask = Any  # a tree of bools, or a function of the parameters that returns one


def check_mask(name: str, mask: Mask) -> None:
    """Raises, when a method is built, for a value that cannot be a mask."""
    if isinstance(mask, (bool, np.bool_, str, jax.Array, np.ndarray)):
        raise TypeError(
            f"{name} must be a tree of bools, or a function of the parameters that "
            f"returns one, got {mask!r}. Under optax.inject_hyperparams, a function "
            f"must be among the static_args=('{name}',), or it is taken for a schedule."
        )


def resolve_mask(mask: Mask, params: Any) -> Any:
    """A tree of Python bools, one per leaf of params, from a prefix or a function."""
    tree = mask(params) if _is_function(mask) else mask
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree)):
        raise TypeError(
            "A mask chooses code, so its leaves must be Python bools; got traced "
            "values. Build it outside of jit, or from shapes and names only."
        )
    return jax.tree.map(
        lambda keep, subtree: jax.tree.map(lambda _: bool(keep), subtree), tree, params
    )


def _is_function(mask: Mask) -> bool:
    """Whether a mask is a function; a tree of bools may be callable too (Equinox)."""
    return all(callable(leaf) for leaf in jax.tree.leaves(mask)) and callable(mask)


def restrict(
    ascent: optax.GradientTransformation, mask: Mask
) -> optax.GradientTransformationExtraArgs:
    """Runs an ascent on the leaves where mask is True, with ε = 0 on the others.

    Norms run over the perturbed leaves only, and state is carried for them only.
    """
    check_mask("mask", mask)

    def inner(mask):
        return optax.masked(ascent, mask, mask_compatible_extra_args=True)

    # Optax's masked wraps the state. We unwrap it, because a SAM state must not hold
    # field names that Optax looks for.
    def init_fn(params):
        state: Any = inner(lambda tree: resolve_mask(mask, tree)).init(params)
        return state.inner_state

    def update_fn(updates, state, params=None, *, grad_fn=None, **extra_args):
        require_params(params, "An ascent with a mask")
        tree = resolve_mask(mask, params)
        if grad_fn is not None:
            extra_args["grad_fn"] = _on_masked_params(grad_fn, tree, params)
        masked_state: Any
        perturbation, masked_state = inner(tree).update(
            updates, optax.MaskedState(state), params, **extra_args
        )
        perturbation = jax.tree.map(
            lambda keep, e, zero: e if keep else zero,
            tree,
            perturbation,
            _tree.zeros_like(params),
        )
        return perturbation, masked_state.inner_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _on_masked_params(
    grad_fn: Callable[[Any], Any], tree: Any, params: Any
) -> Callable[[Any], Any]:
    """A grad_fn for the masked ascent: the other leaves stay as they are in params."""

    def masked_grad_fn(masked_params):
        point = jax.tree.map(
            lambda keep, q, w: q if keep else w, tree, masked_params, params
        )
        return jax.tree.map(
            lambda keep, g: g if keep else optax.MaskedNode(), tree, grad_fn(point)
        )

    return masked_grad_fn
