"""Checks of the parameters that the measures of sharpness are given."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from sam_optax import _tree


def check_params(params: Any, name: str = "params") -> Any:
    """Checks the parameters, and casts them to at least float32.

    In a narrower dtype, w + ε would be rounded to w for a small ε.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in leaves:
        kind = type(leaf).__name__
        if isinstance(leaf, (int, float, np.generic)) or hasattr(leaf, "dtype"):
            kind = jnp.result_type(leaf)
        if isinstance(kind, str) or not jnp.issubdtype(kind, jnp.floating):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} is {kind}: only real "
                "floating-point parameters can be measured. Separate the others, for "
                "example with eqx.partition or nnx.split, and bind them to the loss."
            )
    if not optax.tree.size(params):
        raise ValueError(f"{name} holds no numbers.")
    finite = _all_finite(params)
    if not isinstance(finite, Tracer) and not finite:
        bad = [jax.tree_util.keystr(p) for p, x in leaves if not jnp.isfinite(x).all()]
        raise ValueError(
            f"{name} is not finite at {', '.join(path or 'its root' for path in bad)}."
        )
    return _tree.at_least_float32(jax.tree.map(jnp.asarray, params))


_all_finite = jax.jit(_tree.all_finite)


def check_same_outline(name: str, tree: Any, params: Any) -> None:
    difference = _tree.mismatch(tree, params)
    if difference is not None:
        raise ValueError(
            f"{name} must have the structure and shapes of the parameters, but "
            f"{difference}."
        )
