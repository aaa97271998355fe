"""Reports: what a step measures on its way, if somebody asks for it."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax import _sharding as sharding
from sam_optax import _tree


class Report(NamedTuple):
    """Measurements of one step, all scalars.

    Where the step did not ascend, all but `ascent_norm` and `ascended` are NaN; under
    `jax.debug_nans`, which would stop at a NaN, they are 0.

    Attributes:
      perturbed_loss: L(w + ε).
      surrogate_gap: L(w + ε) − L(w).
      ascent_norm: ‖g‖.
      descent_norm: ‖gᵃ‖.
      cosine: of the angle between g and gᵃ.
      perturbation_norm: ‖ε‖; under groups, the mean over them.
      ascended: whether the second gradient was taken.
    """

    perturbed_loss: jax.Array  # shape=(), at least float32
    surrogate_gap: jax.Array  # shape=(), at least float32
    ascent_norm: jax.Array  # shape=(), at least float32
    descent_norm: jax.Array  # shape=(), at least float32
    cosine: jax.Array  # shape=(), at least float32
    perturbation_norm: jax.Array  # shape=(), at least float32
    ascended: jax.Array  # shape=(), dtype=jnp.bool_


def unknown() -> float:
    """What stands in a report for a number that the step did not measure."""
    config: Any = jax.config
    return 0.0 if config.jax_debug_nans else math.nan


class AtPerturbed(NamedTuple):
    """What a group of examples saw at its w + ε, or the mean of it over groups."""

    descent_gradient: Any
    value: Any = ()  # (loss, aux) there; empty unless it is what the helper returns
    loss: Any = None  # unless the descent may use it
    state_floats: Any = None  # of the descent, unless it does not average its state
    perturbed_loss: Any = None  # like the following, unless a report is wanted
    surrogate_gap: Any = None
    perturbation_norm: Any = None


def report_of(g: optax.Updates, there: AtPerturbed, loss: Any) -> Report:
    """The report of a step that ascended; `loss` is the one at w."""
    norm = _tree.norm(g)
    dtype = _loss_dtype(norm, loss)
    report = Report(
        perturbed_loss=jnp.asarray(there.perturbed_loss, dtype),
        surrogate_gap=jnp.asarray(there.surrogate_gap, dtype),
        ascent_norm=norm,
        descent_norm=jnp.asarray(_tree.norm(there.descent_gradient), norm.dtype),
        cosine=jnp.asarray(_tree.cosine(g, there.descent_gradient), norm.dtype),
        perturbation_norm=jnp.asarray(there.perturbation_norm, norm.dtype),
        ascended=jnp.asarray(True),
    )
    return sharding.vary_like(report, g)


def report_without_ascent(g: optax.Updates, loss: Any) -> Report:
    """The report of a step that took no second gradient."""
    norm = _tree.norm(g)
    missing = jnp.asarray(unknown(), norm.dtype)
    missing_loss = jnp.asarray(missing, _loss_dtype(norm, loss))
    report = Report(
        perturbed_loss=missing_loss,
        surrogate_gap=missing_loss,
        ascent_norm=norm,
        descent_norm=missing,
        cosine=missing,
        perturbation_norm=missing,
        ascended=jnp.asarray(False),
    )
    return sharding.vary_like(report, g)


def _loss_dtype(norm: jax.Array, loss: Any) -> Any:
    """The dtype of reported losses: that of the loss, and at least float32."""
    known = norm if loss is None else _tree.at_least_float32(jnp.asarray(loss))
    return known.dtype
