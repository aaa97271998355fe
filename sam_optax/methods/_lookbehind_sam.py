"""Lookbehind-SAM: several ascents behind the parameters, and a base step from each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax import _tree
from sam_optax._checks import (
    check_number,
    check_static_integer,
    check_transformation,
    require_grad_fn,
    require_params,
)
from sam_optax._hyperparameters import ScalarOrSchedule, value_at
from sam_optax._masks import Mask, check_selects, restrict
from sam_optax._parts import as_ascent
from sam_optax._random import Key
from sam_optax._rounding import round_to_nearest
from sam_optax._step import sharpness_aware
from sam_optax.methods._record import record_further
from sam_optax.methods._sam import sam_ascent


class PathState(NamedTuple):
    """State of `ascend_and_keep_gradients`."""

    path_ascent_state: optax.OptState
    path_gradients: tuple[optax.Updates, ...]  # those on the way, at least float32
    turn: jax.typing.ArrayLike  # shape=(), dtype=bool: changes unless a step is undone


class LookbehindState(NamedTuple):
    """State of Lookbehind-SAM's optimizer."""

    lookbehind_step: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32
    sharpness_state: Any  # SharpnessAwareState, which holds the gradients on the way
    fast_optimizer_state: optax.OptState


def ascend_and_keep_gradients(
    ascent: optax.GradientTransformation, k: int
) -> optax.GradientTransformationExtraArgs:
    """k ascents, each from where the last one ended, with the gradients on the way.

    Unlike `ascend_repeatedly`, each step has the full radius, and an ascent that scales
    with the parameters sees those where the step begins.
    """
    ascent = optax.with_extra_args_support(ascent)

    def init_fn(params: optax.Params) -> PathState:
        kept = tuple(_tree.zeros_like(params) for _ in range(k - 1))
        return PathState(ascent.init(params), kept, jnp.asarray(False))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        grad_fn: Any = None,
        descent_grad_fn: Any = None,
        perturb: Callable[..., optax.Params] = round_to_nearest,
        group: Any = None,
        **extra: Any,
    ) -> tuple[optax.Updates, PathState]:
        require_params(params, "lookbehind_sam")
        require_grad_fn(grad_fn, "lookbehind_sam")
        if group is not None:
            raise ValueError(
                "lookbehind_sam takes base steps from the gradients on the way, which "
                "are those of the whole batch: it does not go with m= or with a "
                "perturbation per device. Leave out m= and sync_perturbation=False."
            )
        extra |= {"grad_fn": grad_fn, "perturb": perturb}
        step, inner = ascent.update(updates, state.path_ascent_state, params, **extra)
        perturbation, kept = step, []
        for _ in range(k - 1):
            point = perturb(params, perturbation)
            g = _tree.at_least_float32(grad_fn(point))
            extra["ascent_gradient"] = g
            step, _ = ascent.update(g, state.path_ascent_state, point, **extra)
            perturbation = _tree.add_scaled(perturbation, 1, step)
            if descent_grad_fn not in (None, grad_fn):  # the ascent has its own loss
                g = _tree.at_least_float32(descent_grad_fn(point))
            kept.append(g)
        return perturbation, PathState(inner, tuple(kept), ~state.turn)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@record_further(
    title="Lookbehind-SAM",
    equation="k ascents εⱼ, a base step from each ∇L(w+εⱼ), then w + α (w_fast − w)",
    use="`sam, tx = lookbehind_sam(base)`, in place of the chain",
    source="Mordido 2024",
    url="https://arxiv.org/abs/2307.16704",
    cost="k + 1",
)
def lookbehind_sam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.05,
    k: int = 2,
    alpha: ScalarOrSchedule | str = 0.5,
    *,
    ascent: optax.GradientTransformation | None = None,
    mask: Mask = None,
    guard: bool = True,
    stochastic_rounding: Key | None = None,
) -> tuple[
    optax.GradientTransformationExtraArgs, optax.GradientTransformationExtraArgs
]:
    r"""Lookbehind-SAM: k steps back, 1 step forward.

    .. math::
      \varepsilon_j = \varepsilon_{j-1}
        + \rho \frac{\nabla L(w + \varepsilon_{j-1})}
                    {\|\nabla L(w + \varepsilon_{j-1})\|}, \qquad
      u_j = u_{j-1} + \mathrm{base}\big(\nabla L(w + \varepsilon_j)\big), \qquad
      w \leftarrow w + \alpha u_k

    with ε₀ = u₀ = 0 and j from 1 to k. The ascents climb further than one step of SAM,
    the base optimizer takes a step from the gradient at each of them, and the
    interpolation with α reduces the variance of the k steps.

    Args:
      base: the base optimizer, with its learning rate. It takes k steps for each of
        yours, and so count its schedules; the interpolation leaves its momentum alone.
      rho: the length ρ of each ascent. Default 0.05, from the authors' command.
      k: the number of ascents and of base steps, a Python integer >= 1. Default 2, from
        the authors' command.
      alpha: α, the share of the k base steps that is kept: a number in [0, 1] or a
        schedule, or "adaptive": for each tensor (cos(u₁, u_k) + 1)/2. Default 0.5, one
        of the three values that the paper compares; the authors' command has the
        adaptive one.
      ascent: another ascent than `ascents.sam(rho)`, such as `ascents.asam(0.5)`, which
        sees the parameters where each ascent begins. rho is then not used. Default
        None.
      mask, guard, stochastic_rounding: as for `sharpness_aware`. Default None, True and
        None.

    Returns:
      (sam, tx). `sam` is the SAM transformation; pass it to `sam_value_and_grad`, and
      nowhere else. `tx` is the whole optimizer; use it in place of a chain.

    Raises:
      ValueError: if rho < 0, k is not a positive integer, alpha is outside [0, 1] or
        another word than "adaptive", or the ascent does not follow the gradient; from
        update, with groups of examples or a perturbation per device.

    Examples:
      On f(w) = w² from w = 1, the ascents reach 1.5 and 2, where the gradients are 3
      and 4. Half of the two SGD steps, −0.1 · (3 + 4), is kept.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> sam, tx = sam_optax.lookbehind_sam(optax.sgd(0.1), rho=0.5)
      >>> loss_and_grads = sam_optax.sam_value_and_grad(lambda w: w**2, sam)
      >>> w = jnp.array(1.0)
      >>> opt_state = tx.init(w)
      >>> loss, grads = loss_and_grads(w, opt_state=opt_state)
      >>> updates, opt_state = tx.update(grads, opt_state, w)
      >>> print(f"{optax.apply_updates(w, updates):.2f}")
      0.65

    References:
      Mordido et al., `Lookbehind-SAM: k Steps Back, 1 Step Forward
      <https://arxiv.org/abs/2307.16704>`_, ICML 2024.

    Differences from the authors' code, with whose trajectories this was compared:
      1. It takes the gradient at w + ε_j twice, 2k in all. Here it is taken once.
      2. No epsilon is added to norms. Theirs is 1e-16, and 1e-8 in the cosine.

    Do not pass ascend=False: the last base step would follow the plain gradient, and
    the others still the gradients on the way.

    Cost: k + 1 gradients a step, and k − 1 more with ascent_loss_fn=; k − 1 trees are
    carried, in at least float32, because the gradients on the way wait in the state for
    the base optimizer.
    """
    check_static_integer("k", k)
    if isinstance(alpha, str):
        if alpha != "adaptive":
            raise ValueError(f"alpha must be a number or 'adaptive', got {alpha!r}.")
    else:
        check_number("alpha", alpha, at_least=0, at_most=1)
    ascent = sam_ascent(rho) if ascent is None else ascent
    check_transformation("base", base)
    check_transformation("ascent", ascent)
    ascent = as_ascent(ascent)
    if ascent.follow or not ascent.uses_gradient:
        raise ValueError(
            "lookbehind_sam climbs along the gradient at each of its points, and this "
            "ascent follows something else."
        )
    # The gradients on the way are those of all leaves, so the mask is put on each step.
    ascent = ascent if mask is None else restrict(ascent, mask)
    sam = sharpness_aware(
        ascend_and_keep_gradients(ascent, k),
        guard=guard,
        stochastic_rounding=stochastic_rounding,
    )
    base = optax.with_extra_args_support(base)

    def init_fn(params):
        if mask is not None:
            check_selects(mask, params)
        return LookbehindState(
            jnp.zeros((), jnp.int32), sam.init(params), base.init(params)
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, LookbehindState]:
        require_params(params, "lookbehind_sam")
        step, sam_state, base_state = state
        new_sam_state: Any
        last, new_sam_state = sam.update(updates, sam_state, params, **extra_args)
        old, new = sam_state.ascent_state, new_sam_state.ascent_state
        kept = new.path_gradients
        if guard:  # after a bad step, the state still holds the gradients before
            finite = _tree.all_finite(last) & (new.turn != old.turn)
            kept = jax.tree.map(lambda x: jnp.where(finite, x, jnp.nan), kept)
        moved = _tree.zeros_like(params)
        path = []
        for direction in (*kept, last):
            d = _tree.cast_like(direction, last)
            fast = round_to_nearest(params, moved)
            own, base_state = base.update(d, base_state, fast, **extra_args)
            moved = _tree.add_scaled(moved, 1, own)
            path.append(moved)
        if isinstance(alpha, str):
            moved = jax.tree.map(_keep_aligned_share, path[0], moved)
        else:
            moved = _tree.scale(value_at(alpha, step), moved)
        return _tree.cast_like(moved, params), LookbehindState(
            optax.safe_increment(step), new_sam_state, base_state
        )

    return sam, optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _keep_aligned_share(first: jax.Array, whole: jax.Array) -> jax.Array:
    return _tree.scale((_tree.cosine(first, whole) + 1) / 2, whole)
