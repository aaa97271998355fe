"""The table of methods: every contract runs over every row, and a new method is one."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import sam_optax


def norm(tree, p=2):
    """Plain reference norm over all leaves, in float64 numbers of the host."""
    flat = jnp.concatenate(
        [jnp.ravel(x).astype(jnp.float32) for x in jax.tree.leaves(tree)]
    )
    largest = jnp.max(jnp.abs(flat))
    if largest == 0:
        return 0.0
    return float(largest * jnp.linalg.norm(flat / largest, ord=p))


def plain_norm(p=2):
    return lambda perturbation, params, gradient: norm(perturbation, p)


def adaptive_norm(eta, is_adaptive=lambda w: True):
    def scaled(e, w):
        return e / (jnp.abs(w.astype(jnp.float32)) + eta) if is_adaptive(w) else e

    return lambda perturbation, params, gradient: norm(
        jax.tree.map(scaled, perturbation, params)
    )


def is_matrix(w):
    return w.ndim > 1


def matrices(params):
    return jax.tree.map(is_matrix, params)


def relative_norm(perturbation, params, gradient):
    return norm(perturbation) / norm(gradient)


def fisher_norm(perturbation, params, gradient):
    return norm(
        jax.tree.map(lambda e, g: e * jnp.hypot(1.0, g), perturbation, gradient)
    )


def sparse_norm(perturbation, params, gradient):
    """‖ε‖ over the share of ‖g‖ that the mask keeps."""
    kept = jax.tree.map(lambda e, g: jnp.where(e != 0, g, 0), perturbation, gradient)
    return norm(perturbation) * norm(gradient) / norm(kept)


class Row(NamedTuple):
    """A method with its arguments, and what the contracts need to know of it.

    Attributes:
      make: builds the transformation from keyword arguments.
      kwargs: the arguments under test beside rho.
      radius: (ε, params, g) -> the quantity that equals rho, or None if that is random.
      schedulable: hyperparameters that may be schedules, with two values to switch
        between.
      static_args: what `optax.inject_hyperparams` must leave alone.
      carries_floats: whether its state holds floating-point values.
      rho: a radius under which the test problem trains.
      ascent: builds the method's ascent from rho, where that is all of it.
      follows_gradient: whether ε is made of the gradient at w.
      is_exact: whether d = g exactly where gᵃ = g.
      draws: whether it draws random numbers.
      descends_on_ga: whether d = gᵃ on a step that ascends.
      ascends_always: whether every step takes the second gradient.
    """

    make: Callable[..., Any]
    kwargs: dict[str, Any]
    radius: Callable[..., float] | None
    schedulable: dict[str, tuple[float, float]]
    static_args: tuple[str, ...] = ()
    carries_floats: bool = False
    rho: float = 0.1
    ascent: Callable[..., Any] | None = None
    follows_gradient: bool = True
    is_exact: bool = True
    draws: bool = False
    descends_on_ga: bool = True
    ascends_always: bool = True

    def __call__(self, **overrides):
        return self.make(**{"rho": self.rho, **self.kwargs, **overrides})

    def values(self):
        """The value of every hyperparameter that may be a schedule."""
        parameters = inspect.signature(self.make).parameters
        values = {name: parameters[name].default for name in self.schedulable}
        given = {"rho": self.rho, **self.kwargs}
        return values | {name: given[name] for name in values if name in given}


RHO = {"rho": (0.1, 0.3)}
ETA = {"eta": (0.01, 0.1)}
EMA = {"sigma": (1.0, 0.5), "decay": (0.9, 0.5)}
DECAY = {"decay": (0.9, 0.5)}
BOUNDS = {"minimum": (0.0, 0.1), "maximum": (10.0, 5.0)}
ALPHA = {"alpha": (0.4, 0.8)}

TABLE = {
    "sam": Row(sam_optax.sam, {}, plain_norm(), RHO, ascent=sam_optax.sam_ascent),
    "sam_p_inf": Row(
        sam_optax.sam,
        {"p": jnp.inf},
        plain_norm(jnp.inf),
        RHO,
        ("p",),
        rho=0.02,
    ),
    "sam_p_3": Row(sam_optax.sam, {"p": 3}, plain_norm(3), RHO, ("p",)),
    "sam_p_1": Row(sam_optax.sam, {"p": 1}, plain_norm(1), RHO, ("p",)),
    "asam": Row(
        sam_optax.asam,
        {},
        adaptive_norm(0.01),
        RHO | ETA,
        ascent=sam_optax.asam_ascent,
    ),
    "asam_mask": Row(
        sam_optax.asam,
        {"adaptive_mask": matrices},
        adaptive_norm(0.01, is_matrix),
        RHO | ETA,
        ("adaptive_mask",),
    ),
    "fsam": Row(
        sam_optax.fsam,
        {},
        plain_norm(),
        RHO | EMA,
        carries_floats=True,
        ascent=sam_optax.fsam_ascent,
    ),
    "fsam_cosine": Row(
        sam_optax.fsam,
        {"sigma": "cosine", "decay": 0.6},
        plain_norm(),
        RHO | DECAY,
        carries_floats=True,
    ),
    "fsam_as_released": Row(
        sam_optax.fsam,
        {"as_released": True, "sigma": 0.5},
        plain_norm(),
        RHO | EMA,
        carries_floats=True,
    ),
    "fasam": Row(
        sam_optax.fasam,
        {},
        adaptive_norm(0.01),
        RHO | ETA | EMA,
        carries_floats=True,
        ascent=sam_optax.fasam_ascent,
    ),
    "fasam_as_released": Row(
        sam_optax.fasam,
        {"as_released": True, "eta": 0.1},
        adaptive_norm(0.1),
        RHO | ETA | EMA,
        carries_floats=True,
    ),
    "usam": Row(sam_optax.usam, {}, relative_norm, RHO, ascent=sam_optax.usam_ascent),
    "vasso": Row(
        sam_optax.vasso,
        {},
        plain_norm(),
        RHO | {"theta": (0.2, 0.9)},
        carries_floats=True,
        ascent=sam_optax.vasso_ascent,
    ),
    "fisher_sam": Row(
        sam_optax.fisher_sam,
        {},
        fisher_norm,
        RHO | {"eta": (1.0, 0.1)},
        ascent=sam_optax.fisher_sam_ascent,
    ),
    "sam_full": Row(
        sam_optax.sam_full,
        {},
        plain_norm(),
        RHO | DECAY,
        carries_floats=True,
        ascent=sam_optax.sam_full_ascent,
    ),
    "sam_noise": Row(sam_optax.sam_noise, {}, None, RHO | DECAY, carries_floats=True),
    "gsam": Row(sam_optax.gsam, {}, plain_norm(), RHO | ALPHA, descends_on_ga=False),
    "gsam_loss": Row(
        sam_optax.gsam,
        {"minimize": "loss"},
        plain_norm(),
        RHO | ALPHA,
        descends_on_ga=False,
    ),
    "sam_plus_gap": Row(
        sam_optax.sam_plus_gap,
        {},
        plain_norm(),
        RHO | {"lam": (1.0, 0.5)},
        descends_on_ga=False,
    ),
    "stable_sam": Row(
        sam_optax.stable_sam, {}, plain_norm(), RHO | BOUNDS, descends_on_ga=False
    ),
    "stable_asam": Row(
        sam_optax.stable_asam,
        {},
        adaptive_norm(0.01),
        RHO | ETA,
        descends_on_ga=False,
    ),
    "stable_asam_as_released": Row(
        sam_optax.stable_asam,
        {"as_released": True},
        adaptive_norm(0.01),
        RHO | ETA,
        is_exact=False,
        descends_on_ga=False,
    ),
    "stable_usam": Row(
        sam_optax.stable_usam, {}, relative_norm, RHO | BOUNDS, descends_on_ga=False
    ),
    "wsam": Row(
        sam_optax.wsam,
        {"gamma": 0.6},
        plain_norm(),
        RHO | {"gamma": (0.6, 0.4)},
        descends_on_ga=False,
    ),
    "gradient_norm_penalty": Row(
        sam_optax.gradient_norm_penalty,
        {},
        plain_norm(),
        RHO | ALPHA,
        descends_on_ga=False,
    ),
    "look_sam": Row(
        sam_optax.look_sam,
        {"k": 2},
        plain_norm(),
        RHO | ALPHA,
        ("k",),
        carries_floats=True,
        ascends_always=False,
    ),
    "sam_every_k": Row(
        sam_optax.sam_every_k, {"k": 2}, plain_norm(), RHO, ("k",), ascends_always=False
    ),
    "rst": Row(
        sam_optax.rst,
        {"probability": 0.7},
        plain_norm(),
        RHO | {"probability": (0.7, 0.9)},
        draws=True,
        ascends_always=False,
    ),
    "ae_sam": Row(
        sam_optax.ae_sam,
        {},
        plain_norm(),
        RHO | {"threshold": (0.0, 0.5), "decay": (0.9, 0.8)},
        carries_floats=True,
        ascends_always=False,
    ),
    "esam": Row(sam_optax.esam, {}, None, RHO | {"beta": (0.6, 0.8)}, draws=True),
    "ssam": Row(
        sam_optax.ssam,
        {"refresh_every": 2},
        sparse_norm,
        RHO,
        ("sparsity", "drop", "refresh_every"),
    ),
    "ssam_dynamic": Row(
        sam_optax.ssam,
        {"dynamic": True, "refresh_every": 2},
        sparse_norm,
        RHO | {"drop": (0.5, 0.2)},
        ("sparsity", "refresh_every"),
        draws=True,
    ),
    "random_sam": Row(
        sam_optax.random_sam, {}, None, RHO, follows_gradient=False, draws=True
    ),
    "random_sam_normalized": Row(
        sam_optax.random_sam,
        {"normalized": True},
        plain_norm(),
        RHO,
        follows_gradient=False,
        draws=True,
    ),
    "rsam": Row(
        sam_optax.rsam,
        {},
        None,
        RHO | {"sigma": (0.05, 0.2)},
        follows_gradient=False,
        draws=True,
    ),
    "multi_step_sam": Row(
        sam_optax.multi_step_sam, {"steps": 3}, None, RHO, ("steps",)
    ),
}

# Every named method is in the table at least once.
assert {row.make for row in TABLE.values()} == {
    method.make for method in sam_optax.METHODS.values()
}

# Door 1 ends in the update that door 2 is, so one method of each kind is enough to see
# that the contracts hold behind both; that the doors agree is a test over all rows.
BOTH_DOORS = {"sam", "asam", "fsam", "gsam", "look_sam", "esam"}
