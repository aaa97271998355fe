"""Masks: which leaves of the parameters are perturbed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from sam_optax import _tree
from sam_optax._checks import require_params
from sam_optax._parts import Ascent, as_ascent, follow

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
    _check_leaves(tree, params)
    try:
        return jax.tree.map(
            lambda keep, subtree: jax.tree.map(lambda _: bool(keep), subtree),
            tree,
            params,
        )
    except ValueError as error:
        raise ValueError(
            "The mask must be built as the parameters are, or as a prefix of them: of "
            "the same containers (a dict is not a FrozenDict), with an entry for each "
            "part, empty ones too."
        ) from error


def _check_leaves(tree: Any, params: Any) -> None:
    """Refuses a tree that is not one of bools, or does not fit the parameters."""
    entries = jax.tree_util.tree_leaves_with_path(tree)
    for path, leaf in entries:
        if not _is_bool(leaf):
            raise TypeError(
                "A mask chooses whole arrays, so each of its leaves must be True or "
                f"False; mask{jax.tree_util.keystr(path)} is {leaf!r}."
            )
    places = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_empty)
    # An entry of the mask stands for all parameters whose paths begin with its own.
    starts = {path: {path[:n] for n in range(len(path) + 1)} for path, _ in places}
    known = set().union(*starts.values(), {()})
    for path, _ in entries:
        if path not in known:
            name = jax.tree_util.keystr(path)
            remedy = (
                " If it is a mask of NNX variables, it does not fit the arrays of an "
                "update: pass a function of the parameters."
            )
            raise ValueError(
                f"The mask has {name}, and the parameters do not."
                + (remedy if name.endswith(".value") else "")
            )
    chosen = {path for path, _ in entries}
    for path, leaf in places:
        if not _is_empty(leaf) and not starts[path] & chosen:
            raise ValueError(
                f"The mask says nothing of params{jax.tree_util.keystr(path)}: it "
                "needs True or False for each array of the parameters, or for a part "
                "of the tree that holds it."
            )


def _is_empty(node: Any) -> bool:
    """Whether a place of the parameters holds no array, of which a mask may speak."""
    return not jax.tree.leaves(node)


def _is_function(mask: Mask) -> bool:
    """Whether a mask is a function; a tree of bools may be callable too (Equinox)."""
    return callable(mask) and not all(map(_is_bool, jax.tree.leaves(mask)))


def _is_bool(leaf: Any) -> bool:
    if isinstance(leaf, (np.ndarray, jax.Array)):
        return leaf.shape == () and leaf.dtype == jnp.bool_
    return isinstance(leaf, (bool, np.bool_))


def check_selects(mask: Mask, params: Any) -> None:
    """Refuses a mask that leaves no parameter to perturb."""
    chosen = jax.tree.leaves(resolve_mask(mask, params))
    if chosen and not any(chosen):
        raise ValueError(
            "The mask leaves no parameter to perturb: it is False for every one. A "
            "step would be that of the base optimizer, and take two gradients."
        )


def masks_leaves(params: Any) -> bool:
    """Whether `optax.masked`, or a mask of ours, has put placeholders into a tree."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    return any(isinstance(leaf, optax.MaskedNode) for leaf in leaves)


def restrict(ascent: optax.GradientTransformation, mask: Mask) -> Ascent:
    """Runs an ascent on the leaves where mask is True, with ε = 0 on the others.

    Norms run over the perturbed leaves only, and state is carried for them only.
    """
    check_mask("mask", mask)
    whole = as_ascent(ascent)

    def init_fn(params):
        return whole.init(masked(resolve_mask(mask, params), params))

    def climb_fn(updates, state, params=None, /, **extra_args):
        require_params(params, "An ascent with a mask")
        tree = resolve_mask(mask, params)
        perturbation, state, finite = whole.climb(
            masked(tree, updates),
            state,
            masked(tree, params),
            **_masked_extra_args(extra_args, tree, params),
        )
        perturbation = jax.tree.map(
            lambda keep, e, zero: e if keep else zero,
            tree,
            perturbation,
            _tree.zeros_like(params),
        )
        return perturbation, state, finite

    def follow_fn(d, state, params):
        tree = resolve_mask(mask, params)
        return follow(whole, masked(tree, d), state, masked(tree, params))

    return Ascent.from_climb(
        init_fn,
        climb_fn,
        follow=follow_fn if whole.follow else None,
        uses_gradient=whole.uses_gradient,
    )


def masked(tree: Any, values: Any) -> Any:
    """What `optax.masked` shows of values where the mask is `tree`."""
    return jax.tree.map(lambda keep, x: x if keep else optax.MaskedNode(), tree, values)


def zero_where_masked(
    tree: optax.Updates, mask: Mask, params: optax.Params
) -> optax.Updates:
    """The tree, with zeros on the leaves that a mask of the parameters leaves out.

    A descent that moves the parameters itself needs it: `sharpness_aware` restricts the
    ascent alone.
    """
    if mask is None:
        return tree
    return jax.tree.map(
        lambda keep, x: x if keep else jnp.zeros_like(x),
        resolve_mask(mask, params),
        tree,
    )


def _masked_extra_args(
    extra_args: dict[str, Any], tree: Any, params: Any
) -> dict[str, Any]:
    """The extra arguments of an ascent, for one that sees the masked leaves alone.

    Trees that are built as the parameters are, such as `ascent_gradient`, are masked.
    Functions of a point take and return masked trees; the other leaves of the point are
    as in params.
    """
    structure = jax.tree.structure(params)

    def mask_gradient(gradient):
        return masked(tree, gradient)

    def mask_value_and_gradient(there):
        return there[0], masked(tree, there[1])

    def on_masked_params(function, mask_result):
        def masked_function(masked_params):
            point = jax.tree.map(
                lambda keep, q, w: q if keep else w, tree, masked_params, params
            )
            return mask_result(function(point))

        return masked_function

    results = {
        "grad_fn": mask_gradient,
        "descent_grad_fn": mask_gradient,
        "value_and_grad_fn": mask_value_and_gradient,
    }
    made, shown = {}, {}
    for name, value in extra_args.items():
        if name in results and value is not None:
            # Each function once: an ascent may ask whether two are the same.
            value = made.setdefault(value, on_masked_params(value, results[name]))
        elif jax.tree.structure(value) == structure:
            value = masked(tree, value)
        shown[name] = value
    return shown
