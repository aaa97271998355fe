"""The table of methods: a new method is one row, and the contracts run over all rows.

What tests the core or the doors runs over KINDS alone, one method of each kind.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sam_optax

# Two values of every hyperparameter that may be a schedule. With the first, d = g where
# both gradients agree; the second makes a difference that can be seen.
VALUES = {
    "rho": (0.1, 0.3),
    "eta": (0.01, 0.1),
    "sigma": (1.0, 0.1),
    "decay": (0.9, 0.5),
    "theta": (0.2, 0.9),
    "alpha": (0.4, 0.8),
    "lam": (1.0, 0.5),
    "gamma": (0.6, 0.4),
    "minimum": (0.0, 1.5),
    "maximum": (10.0, 0.5),
    "probability": (0.0, 1.0),
    "threshold": (9.0, -9.0),
    "beta": (0.6, 0.8),
    "drop": (0.5, 0.2),
    "tilt": (1.0, 20.0),
    "learning_rate": (0.1, 0.4),
    "quantile": (0.9, 0.5),
    "inner_rho": (0.05, 0.2),
}


# --- What equals rho: functions of (ε, w, g) and of the hyperparameters of the step.


def norm(tree, p=2):
    """Plain reference norm over all leaves, in float64 numbers of the host."""
    leaves = [jnp.ravel(x).astype(jnp.float32) for x in jax.tree.leaves(tree)]
    flat = jnp.concatenate(leaves)
    largest = jnp.max(jnp.abs(flat))
    if largest == 0:
        return 0.0
    return float(largest * jnp.linalg.norm(flat / largest, ord=p))


def plain_norm(epsilon, w, g, **values):
    return norm(epsilon)


def norm_of_order(p):
    return lambda epsilon, w, g, **values: norm(epsilon, p)


def adaptive_norm(epsilon, w, g, *, eta, is_adaptive=lambda w: True, **values):
    def scaled(e, w):
        return e / (jnp.abs(w.astype(jnp.float32)) + eta) if is_adaptive(w) else e

    return norm(jax.tree.map(scaled, epsilon, w))


def relative_norm(epsilon, w, g, **values):
    return norm(epsilon) / norm(g)


def norm_along_g(epsilon, w, g, **values):
    """Of ε, where the rest lies across g."""
    flat = [
        np.concatenate(
            [np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(t)]
        )
        for t in (epsilon, g)
    ]
    return float(flat[0] @ flat[1] / np.linalg.norm(flat[1]))


def fisher_norm(epsilon, w, g, *, eta, **values):
    def weigh(e, g):
        return e * jnp.hypot(1.0, eta**0.5 * g.astype(jnp.float32))

    return norm(jax.tree.map(weigh, epsilon, g))


def sparse_norm(epsilon, w, g, **values):
    """‖ε‖ over the share of ‖g‖ that the mask keeps."""
    kept = jax.tree.map(lambda e, g: jnp.where(e != 0, g, 0), epsilon, g)
    return norm(epsilon) * norm(g) / norm(kept)


def unified_norm(epsilon, w, g, *, lam, **values):
    return norm(epsilon) / ((1 - lam) * norm(g) + lam)


def loss_norm(epsilon, w, g, *, rho, sigma, **values):
    return rho * norm(epsilon) / min(rho, sigma / norm(g))


def monge_norm(epsilon, w, g, **values):
    return norm(epsilon) * float(jnp.hypot(jnp.float32(1), jnp.float32(norm(g))))


def is_matrix(w):
    return w.ndim > 1


def matrices(params):
    return jax.tree.map(is_matrix, params)


def norm_of_matrices(epsilon, w, g, **values):
    return adaptive_norm(epsilon, w, g, is_adaptive=is_matrix, **values)


def by_names(params):
    """All that has a name, so that the same radius is seen as without a mask."""
    if not (isinstance(params, dict) and "a" in params):
        return True
    return sam_optax.methods.mask_by_name("a", "b")(params)


# --- The table.


@dataclasses.dataclass(frozen=True)
class Row:
    """A method with its arguments, and what the contracts need to know of it.

    Attributes:
      name: that of the method.
      others: names of the hyperparameters beside rho that may be schedules.
      kwargs: arguments under test that may not.
      radius: the quantity that equals rho, or None if that is random or not known.
      rho: a radius under which the test problem trains.
      follows: what ε is made of: "g", "noise", "further" gradients on the way too, or
        the "steps" before, and not g.
      since: the first step that has a perturbation.
      point: which of the points of a step, in their order, is w + ε.
      is_exact: whether d = g exactly where gᵃ = g.
      draws: whether it draws random numbers.
      descends_on_ga: whether d = gᵃ on a step that ascends.
      ascends_always: whether every step takes the second gradient.
      needs_loss: whether it needs the loss beside each gradient.
      own_values: the two values of hyperparameters for which those of VALUES do not do.
      counts_products: whether the record counts products with the Hessian as well.
      length: that of d over that of g, where gᵃ = g.
      zero: the hyperparameters without which it is the base optimizer.
      bad: values that raise an error, where others do than those of most methods.
    """

    name: str
    others: str = ""
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    radius: Callable[..., float] | None = plain_norm
    rho: float = 0.1
    follows: str = "g"
    since: int = 0
    point: int = -1
    is_exact: bool = True
    draws: bool = False
    descends_on_ga: bool = True
    ascends_always: bool = True
    needs_loss: bool = False
    own_values: dict[str, Any] = dataclasses.field(default_factory=dict)
    counts_products: bool = False
    length: float = 1.0
    zero: str = "rho"
    bad: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def uses_gradient(self):
        """Whether ε is made of the gradient at w, among others."""
        return self.follows in ("g", "further")

    @property
    def make(self):
        return sam_optax.METHODS[self.name].make

    def __call__(self, **overrides):
        return self.make(**{"rho": self.rho, **self.kwargs, **overrides})

    def values(self, which=0):
        """One of the two values of every hyperparameter that may be a schedule."""
        known = VALUES | self.own_values
        return {name: known[name][which] for name in ("rho", *self.others.split())}

    def static_args(self):
        """What `optax.inject_hyperparams` must leave alone."""
        counts = {"k", "steps", "sparsity", "drop", "refresh_every", "ramp_steps"}
        counts |= {"momentum", "weight_decay", "samples", "half_width", *self.kwargs}
        counts &= set(inspect.signature(self.make).parameters)
        return sorted(counts - set(self.others.split()))


COMPARES = {"descends_on_ga": False}
SKIPS = {"ascends_always": False}
STEPS = {"follows": "steps", "since": 1}
MOMENTUM = {"momentum": 0.9, "weight_decay": 0.1}
NOISE = {"follows": "noise", "draws": True}
# The sharpness is divided by powers of rho, and its gradient is large.
UNIVERSAL = {"radius": None, "point": 0, "own_values": {"lam": (1e-4, 3e-4)}}
UNIVERSAL |= NOISE | COMPARES
LOSS = {"needs_loss": True}
ADAPTIVE = {"radius": adaptive_norm}
RELEASED = {"as_released": True}
STABLE_ASAM = ADAPTIVE | COMPARES

TABLE = {
    "sam": Row("sam"),
    "sam_p_inf": Row("sam", "", {"p": jnp.inf}, norm_of_order(jnp.inf), rho=0.02),
    "sam_p_3": Row("sam", "", {"p": 3}, norm_of_order(3)),
    "sam_p_1": Row("sam", "", {"p": 1}, norm_of_order(1)),
    "asam": Row("asam", "eta", **ADAPTIVE),
    "asam_mask": Row("asam", "eta", {"adaptive_mask": matrices}, norm_of_matrices),
    "fsam": Row("fsam", "sigma decay"),
    "fsam_cosine": Row("fsam", "decay", {"sigma": "cosine"}),
    "fsam_as_released": Row("fsam", "sigma decay", RELEASED),
    "fasam": Row("fasam", "eta sigma decay", **ADAPTIVE),
    "fasam_as_released": Row("fasam", "eta sigma decay", RELEASED, **ADAPTIVE),
    "usam": Row("usam", radius=relative_norm),
    "unified_sam": Row("unified_sam", "lam", radius=unified_norm),
    "monge_sam": Row("monge_sam", radius=monge_norm),
    "le_sam": Row("le_sam", "sigma", {"sigma": 1.0}, loss_norm),
    "zsharp": Row("zsharp", "quantile"),
    "zsharp_as_released": Row("zsharp", "quantile", RELEASED, radius=None),
    "vasso": Row("vasso", "theta"),
    "fisher_sam": Row("fisher_sam", "eta", radius=fisher_norm),
    "sam_full": Row("sam_full", "decay"),
    "sam_noise": Row("sam_noise", "decay", radius=None),
    "gsam": Row("gsam", "alpha", **COMPARES),
    "gsam_loss": Row("gsam", "alpha", {"minimize": "loss"}, **COMPARES),
    "sam_plus_gap": Row("sam_plus_gap", "lam", **COMPARES),
    "stable_sam": Row("stable_sam", "minimum maximum", **COMPARES),
    "stable_asam": Row("stable_asam", "eta", **STABLE_ASAM),
    "stable_asam_as_released": Row(
        "stable_asam", "eta", RELEASED, is_exact=False, **STABLE_ASAM
    ),
    "stable_usam": Row(
        "stable_usam", "minimum maximum", radius=relative_norm, **COMPARES
    ),
    "wsam": Row("wsam", "gamma", {"gamma": 0.6}, **COMPARES),
    "gradient_norm_penalty": Row("gradient_norm_penalty", "alpha", **COMPARES),
    "sagm": Row(
        "sagm",
        "alpha",
        radius=None,
        length=2.0,
        zero="rho alpha",
        **COMPARES,
    ),
    "sagm_as_released": Row(
        "sagm", "alpha", RELEASED, None, zero="rho alpha", **COMPARES
    ),
    "cr_sam": Row("cr_sam", "gamma beta", point=0, bad={"gamma": -0.1}, **COMPARES),
    "gam": Row(
        "gam",
        "inner_rho alpha beta gamma",
        radius=None,
        point=0,
        zero="rho inner_rho",
        bad={"gamma": -0.1},
        **COMPARES,
    ),
    "look_sam": Row("look_sam", "alpha", {"k": 2}, **SKIPS),
    "sam_every_k": Row("sam_every_k", "", {"k": 2}, **SKIPS),
    "rst": Row("rst", "probability", {"probability": 0.7}, draws=True, **SKIPS),
    "rst_general": Row(
        "rst",
        "probability alpha",
        {"probability": 0.7, "alpha": 1.5},
        draws=True,
        **SKIPS | COMPARES,
    ),
    "ae_sam": Row("ae_sam", "threshold decay", {"threshold": 0.0}, **SKIPS),
    "ae_look_sam": Row("ae_look_sam", "decay alpha", {"threshold": 0.0}, **SKIPS),
    "esam": Row("esam", "beta", radius=None, draws=True),
    # With the key 0, one of the first steps leaves out all tensors.
    "esam_as_released": Row(
        "esam", "beta", RELEASED | {"key": 1}, radius=None, draws=True
    ),
    "ssam": Row("ssam", "", {"refresh_every": 2}, sparse_norm),
    "ssam_dynamic": Row(
        "ssam", "drop", {"dynamic": True, "refresh_every": 2}, sparse_norm, draws=True
    ),
    "msam": Row("msam", "decay", **STEPS),
    "late_sam": Row("late_sam", "", {"start": 2}, **SKIPS),
    "late_sam_ramp": Row(
        "late_sam", "", {"start": 1, "ramp_steps": 3}, radius=None, **SKIPS
    ),
    "sampa": Row("sampa", "learning_rate lam", point=0, **STEPS | COMPARES),
    "sampa_momentum": Row(
        "sampa", "learning_rate lam", MOMENTUM, point=0, **STEPS | COMPARES
    ),
    # Its radius vanishes with the weights, which are zero where contracts look at it.
    "layerwise_sam": Row("layerwise_sam", "eta", radius=None),
    "sam_on": Row("sam_on", "", {"mask": by_names}),
    "random_sam": Row("random_sam", radius=None, **NOISE),
    "random_sam_normalized": Row("random_sam", "", {"normalized": True}, **NOISE),
    "rsam": Row("rsam", "sigma", radius=None, **NOISE),
    "lpf_sgd": Row("lpf_sgd", radius=None, **NOISE),
    "tsam": Row("tsam", "sigma tilt", radius=None, point=1, **NOISE | COMPARES | LOSS),
    "universal_trace": Row("universal_sam", "lam", **UNIVERSAL),
    "universal_determinant": Row(
        "universal_sam", "lam", {"kind": "determinant"}, **UNIVERSAL | LOSS
    ),
    "universal_frobenius": Row(
        "universal_sam", "lam", {"kind": "frobenius", "samples": 3}, **UNIVERSAL | LOSS
    ),
    "universal_as_released": Row(
        "universal_sam", "lam", RELEASED | {"kind": "determinant"}, **UNIVERSAL | LOSS
    ),
    "eigen_sam": Row(
        "eigen_sam", "alpha", {"k": 2}, norm_along_g, counts_products=True
    ),
    "eigen_sam_as_released": Row(
        "eigen_sam", "alpha", RELEASED | {"k": 2}, radius=None, counts_products=True
    ),
    "multi_step_sam": Row(
        "multi_step_sam", "", {"steps": 3}, radius=None, follows="further"
    ),
}

# Every named method is in the table at least once.
assert {row.make for row in TABLE.values()} == {
    method.make for method in sam_optax.METHODS.values()
}

# Nothing carried, a carried average, a descent that compares the two gradients, a
# cadence, and an ascent that follows d.
KINDS = ("sam", "fsam", "gsam", "look_sam", "msam")

# The rows whose contracts run without -m slow: a part in each of them is in no other.
FAST = (
    *KINDS,
    *(
        "asam_mask",
        "esam",
        "sam_p_3",
        "fisher_sam",
        "stable_sam",
        "rst",
        "ssam_dynamic",
    ),
    *("sampa_momentum", "multi_step_sam"),
)

# The first row of each method.
FIRST = tuple({row.name: name for name, row in reversed(TABLE.items())}.values())
