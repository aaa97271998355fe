"""The ascent axis: transformations that turn a gradient g into a perturbation ε.

Every part is an ordinary `optax.GradientTransformation`, composed with `optax.chain`.
A part hands on at least float32, so that no digit of ε is lost before w + ε is formed.
Beside g and the parameters, an ascent receives these extra arguments:

  ascent_gradient: g itself, for parts that come later in a chain.
  grad_fn: parameters -> gradient of the loss there, for ascents of several steps.
  group: index of the group of examples whose perturbation is computed, or None. Parts
    that draw random numbers fold it into their key.
"""

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from sam_optax import _tree
from sam_optax._hyperparameters import ScalarOrSchedule, check_number, scheduled

Mask = Any  # a tree of bools, or a function of the parameters that returns one


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


def check_mask(name: str, mask: Mask) -> None:
    """Raises for what is no mask, when building."""
    if isinstance(mask, (bool, np.bool_, str, jax.Array, np.ndarray)):
        raise TypeError(
            f"{name} must be a tree of bools, or a function of the parameters that "
            f"returns one, got {mask!r}. Under optax.inject_hyperparams, a function "
            f"must be among the static_args=('{name}',), or it is taken for a schedule."
        )


def require_params(params: Any, part: str) -> None:
    if params is None:
        raise ValueError(f"{part} needs the parameters: update(g, state, params).")


def scale_by_rho(rho: ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """Multiplies by the radius: u ↦ ρ u.

    Args:
      rho: radius >= 0; a number, a schedule of the step, or a traced scalar.

    Returns:
      A transformation; with a schedule, its state counts the steps.

    Raises:
      ValueError: if rho is a negative or non-finite Python number.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_rho(0.5)
      >>> tx.update(jnp.array([2.0, -4.0]), tx.init(None))[0].tolist()
      [1.0, -2.0]
    """
    check_number("rho", rho, at_least=0)

    def part(rho):
        return optax.stateless(
            lambda updates, _: _tree.scale(rho, _tree.at_least_float32(updates))
        )

    return scheduled(part, rho=rho)


def normalize_by_global_norm(p: Any = 2) -> optax.GradientTransformation:
    r"""Maps g to the unit-norm direction along which the linearised loss rises most.

    .. math::
      u = \frac{\operatorname{sign}(g) |g|^{q-1}}{(\|g\|_q^q)^{1/p}},
      \qquad \tfrac1p + \tfrac1q = 1,

    which is g/‖g‖ for p = 2 and sign(g) for p = ∞. ‖u‖_p is 1 at every scale of g that
    float32 can hold, and u is zero where g is zero. One norm runs over all leaves.

    Args:
      p: order of the norm, a Python number >= 1 or infinity. Default 2. It chooses
        code, so it cannot be traced or scheduled. For p = 1, the whole of u lies on the
        largest entry, and is shared equally where several are largest.

    Returns:
      A stateless transformation. Half-precision leaves come out as float32; a leaf that
      is not finite makes the whole of u NaN.

    Raises:
      ValueError: if p < 1.
      TypeError: if p is traced, as it is under `optax.inject_hyperparams` unless p is
        among its `static_args`.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = normalize_by_global_norm()
      >>> u, _ = tx.update(jnp.array([3.0, 4.0]), tx.init(None))
      >>> [round(x, 6) for x in u.tolist()]
      [0.6, 0.8]
    """
    if isinstance(p, jax.Array):
        raise TypeError(
            "p chooses code, so it must be a Python number, got an array. Under "
            "optax.inject_hyperparams, pass static_args=('p',)."
        )
    if isinstance(p, bool) or not isinstance(p, (int, float, numbers.Real)):
        raise TypeError(f"p must be a number, got {p!r}.")
    if not float(p) >= 1:
        raise ValueError(f"p must be >= 1, got {p}.")
    p = float(p)
    if p == 2:
        return optax.GradientTransformationExtraArgs(optax.init_empty_state, _to_unit)
    return optax.stateless(lambda updates, _: _dual_unit(updates, p))


def _to_unit(updates, state, params=None, *, vouch=None, **extra_args):
    del params, extra_args
    sphere = _tree.measure(updates)
    if vouch is not None:
        vouch(jnp.isfinite(sphere.square))
    return _tree.to_unit(updates, sphere), state


class VouchingAscent(optax.GradientTransformationExtraArgs):
    """An ascent that takes the norm of what is finite only if g is.

    `sharpness_aware` passes it one more argument, `vouch=`, a function that it calls
    with that verdict: the guard then needs no pass over g of its own.
    """


def _vouching(*parts: optax.GradientTransformation) -> VouchingAscent:
    """A chain of a normalisation, and of parts that hand on what is not finite."""
    return VouchingAscent(*optax.chain(*parts))


def _dual_unit(tree: Any, p: float) -> Any:
    """sign(g) |g|^(q−1) / (‖g‖_q^q)^(1/p), on g divided by its largest entry."""
    tree = _tree.at_least_float32(tree)
    largest = _tree.largest_magnitude(tree)
    scaled = _tree.scale(_tree.reciprocal_or_zero(largest), tree)
    if p == jnp.inf:
        # Of g, since a quotient can round a small entry to zero; 0 · x brings in NaN.
        return jax.tree.map(lambda g, x: jnp.sign(g) + 0 * x, tree, scaled)
    if p == 1:
        powers = jax.tree.map(
            lambda g, x: jnp.where(jnp.abs(g) == largest, x, 0 * x), tree, scaled
        )
        total = _tree.sum_leaves(lambda x: jnp.sum(jnp.abs(x)), powers)
        root = total
    else:
        q = p / (p - 1)
        powers = jax.tree.map(lambda x: jnp.sign(x) * jnp.abs(x) ** (q - 1), scaled)
        total = _tree.sum_leaves(lambda x, u: jnp.sum(x * u), scaled, powers)
        root = total ** (1 / p)
    is_zero = total == 0
    return _tree.scale(jnp.where(is_zero, 0, 1 / jnp.where(is_zero, 1, root)), powers)


def scale_by_magnitude(
    eta: ScalarOrSchedule = 0.01, *, adaptive_mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
    """Multiplies by ASAM's normalisation operator: u ↦ T_w u, with T_w = |w| + η.

    Args:
      eta: offset >= 0 that keeps T_w away from zero. Default 0.01, from Kwon et al.
      adaptive_mask: where False, T_w is 1. A tree of bools (or a prefix of one), or a
        function of the parameters that returns one. Default None: True everywhere.

    Returns:
      A transformation that needs the parameters. Half-precision leaves come out as
      float32.

    Raises:
      ValueError: if eta is negative, or, from `update`, if params is None.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx, w = scale_by_magnitude(eta=0.5), jnp.array([1.0, -2.0])
      >>> tx.update(jnp.array([1.0, 1.0]), tx.init(w), w)[0].tolist()
      [1.5, 2.5]
    """
    check_number("eta", eta, at_least=0)
    check_mask("adaptive_mask", adaptive_mask)

    def part(eta):
        def rescale(updates, params):
            require_params(params, "scale_by_magnitude")
            updates = _tree.at_least_float32(updates)

            def by_magnitude(u, w):
                return (jnp.abs(w).astype(u.dtype) + jnp.asarray(eta, u.dtype)) * u

            if adaptive_mask is None:
                return jax.tree.map(by_magnitude, updates, params)
            return jax.tree.map(
                lambda adaptive, u, w: by_magnitude(u, w) if adaptive else u,
                resolve_mask(adaptive_mask, params),
                updates,
                params,
            )

        return optax.stateless(rescale)

    return scheduled(part, eta=eta)


class EmaState(NamedTuple):
    """State of the parts that average the gradient."""

    gradient_ema: Any  # like the parameters, at least float32
    ema_started: jax.Array  # shape=(), dtype=jnp.bool_


def subtract_ema(
    sigma: ScalarOrSchedule | str = 1.0,
    decay: ScalarOrSchedule = 0.9,
    *,
    as_released: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Subtracts an exponential moving average of the gradient, as Friendly SAM does.

    .. math::
      m_t = \lambda m_{t-1} + (1-\lambda) g_t, \quad m_{-1} = 0, \qquad
      h_t = g_t - \sigma m_t

    computed as h = (1−σ) g + σλ (g − m_{t−1}), which is the same, and exactly zero
    when σ = 1 and the gradient equals its average.

    Args:
      sigma: share σ of the average that is subtracted. Default 1, from the paper.
        `"cosine"` is σ_t = cos(m_t, g_t), the paper's equation 11.
      decay: λ in [0, 1). Default 0.9, from the paper.
      as_released: follow the authors' code, where the average starts at the first
        gradient, nothing is subtracted then, and later steps subtract the average
        from before the step: h = g − σ m_{t−1}.

    Returns:
      A transformation that carries m, in at least float32.

    Raises:
      ValueError: if decay is a Python number outside [0, 1), or sigma is negative.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = subtract_ema(sigma=1.0, decay=0.5)
      >>> h, state = tx.update(jnp.array([4.0]), tx.init(jnp.array([0.0])))
      >>> h.tolist(), state.gradient_ema.tolist()
      ([2.0], [2.0])
    """
    check_number("decay", decay, at_least=0, below=1)
    hyperparameters: dict[str, Any] = {"decay": decay}
    if not isinstance(sigma, str):
        check_number("sigma", sigma, at_least=0)
        hyperparameters["sigma"] = sigma
    elif sigma != "cosine":
        raise TypeError(f"sigma must be a number or 'cosine', got {sigma!r}.")

    def part(decay, sigma=None):
        def update_fn(updates, state, params=None):
            del params
            g, m = _tree.at_least_float32(updates), state.gradient_ema
            innovation = _tree.subtract(g, m)
            new_state = _advance(state, innovation, 1 - decay, as_released)
            subtracted = m if as_released else new_state.gradient_ema
            weight = _tree.cosine(subtracted, g) if sigma is None else sigma
            share = weight if as_released else weight * decay
            h = _tree.add_scaled(_tree.scale(1 - weight, g), share, innovation)
            return h, new_state

        return optax.GradientTransformation(_start_ema, update_fn)

    return scheduled(part, **hyperparameters)


def follow_ema(
    theta: ScalarOrSchedule = 0.2, *, as_released: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient by its moving average, as VaSSO does.

    .. math::
      m_t = (1-\theta) m_{t-1} + \theta g_t, \quad m_{-1} = 0

    Args:
      theta: weight θ in (0, 1] of the new gradient. Default 0.2, from the paper.
      as_released: start the average at the first gradient, as the authors' code does.

    Returns:
      A transformation that carries m, in at least float32.

    Raises:
      ValueError: if theta is a Python number outside [0, 1].
    """
    check_number("theta", theta, at_least=0, at_most=1)

    def part(theta):
        def update_fn(updates, state, params=None):
            del params
            g = _tree.at_least_float32(updates)
            innovation = _tree.subtract(g, state.gradient_ema)
            state = _advance(state, innovation, theta, as_released)
            return state.gradient_ema, state

        return optax.GradientTransformation(_start_ema, update_fn)

    return scheduled(part, theta=theta)


def _start_ema(params: Any) -> EmaState:
    return EmaState(_tree.zeros_like(params), jnp.zeros((), jnp.bool_))


def _advance(
    state: EmaState, innovation: Any, step: Any, starts_at_first: bool
) -> EmaState:
    """m + step · (g − m), or g where the average starts at the first gradient."""
    if starts_at_first:
        step = jnp.where(state.ema_started, step, 1)
    m = _tree.add_scaled(state.gradient_ema, step, innovation)
    return EmaState(m, jnp.ones((), jnp.bool_))


def _project(component: Any, decay: ScalarOrSchedule) -> Any:
    check_number("decay", decay, at_least=0, below=1)

    def part(decay):
        def update_fn(updates, state, params=None, *, full_gradient=None, **extra_args):
            del params, extra_args
            g = _tree.at_least_float32(updates)
            innovation = _tree.subtract(g, state.gradient_ema)
            state = _advance(state, innovation, 1 - decay, starts_at_first=False)
            known = state.gradient_ema if full_gradient is None else full_gradient
            # Without this, the noise would be rounding where g is all full gradient.
            return _tree.zero_if_rounding_of(g, component(g, known)), state

        return optax.GradientTransformationExtraArgs(_start_ema, update_fn)

    return scheduled(part, decay=decay)


def project_on_full_gradient(
    decay: ScalarOrSchedule = 0.9,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the projection of g on the full gradient, as in SAM-full.

    Args:
      decay: λ of the average that stands in for the full gradient, unless that is given
        to the update as the extra argument `full_gradient=`. Default 0.9.

    Returns:
      A transformation that carries the average, in at least float32.

    Raises:
      ValueError: if decay is a Python number outside [0, 1).
    """
    return _project(_tree.projection, decay)


def subtract_projection_on_full_gradient(
    decay: ScalarOrSchedule = 0.9,
) -> optax.GradientTransformationExtraArgs:
    """Keeps g minus its projection on the full gradient, as in SAM-noise.

    Arguments, returns and errors are those of `project_on_full_gradient`.
    """
    return _project(_tree.orthogonal, decay)


def scale_by_inverse_root_fisher(
    eta: ScalarOrSchedule = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies by F^(−1/2), with the damped diagonal Fisher matrix F = 1 + η g².

    Args:
      eta: weight η >= 0 of the squared gradient. Default 1.

    Returns:
      A transformation. It takes g from the extra argument `ascent_gradient=`, which
      `sharpness_aware` passes, so that it can come anywhere in a chain.

    Raises:
      ValueError: if eta is negative, or, from `update`, without ascent_gradient.
    """
    check_number("eta", eta, at_least=0)

    def part(eta):
        def update_fn(
            updates, state, params=None, *, ascent_gradient=None, **extra_args
        ):
            del params, extra_args
            if ascent_gradient is None:
                raise ValueError(
                    "scale_by_inverse_root_fisher needs ascent_gradient=, the gradient "
                    "at the parameters; sharpness_aware passes it."
                )

            def divide(u, g):
                # A hypotenuse, because the square of g can leave the range.
                weight = jnp.sqrt(jnp.asarray(eta, u.dtype))
                return u / jnp.hypot(jnp.ones_like(u), weight * g.astype(u.dtype))

            updates = _tree.at_least_float32(updates)
            return jax.tree.map(divide, updates, ascent_gradient), state

        return optax.GradientTransformationExtraArgs(
            lambda params: optax.EmptyState(), update_fn
        )

    return scheduled(part, eta=eta)


def restrict(
    ascent: optax.GradientTransformation, mask: Mask
) -> optax.GradientTransformationExtraArgs:
    """Runs an ascent on the leaves where mask is True, with ε = 0 on the others.

    Norms run over the perturbed leaves only, and state is carried for them only.
    """

    check_mask("mask", mask)

    def inner(mask):
        return optax.masked(ascent, mask, mask_compatible_extra_args=True)

    # The wrapper of Optax's state is left out: its field names are not ours to use.
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
    """grad_fn as the masked ascent sees it: other leaves stay at the parameters."""

    def masked_grad_fn(masked_params):
        point = jax.tree.map(
            lambda keep, q, w: q if keep else w, tree, masked_params, params
        )
        return jax.tree.map(
            lambda keep, g: g if keep else optax.MaskedNode(), tree, grad_fn(point)
        )

    return masked_grad_fn


def sam_ascent(
    rho: ScalarOrSchedule = 0.05, *, p: Any = 2
) -> optax.GradientTransformationExtraArgs:
    """SAM's ascent, ε = ρ g/‖g‖ (for p = 2): the arguments are those of `sam`."""
    return optax.chain(normalize_by_global_norm(p), scale_by_rho(rho))


def asam_ascent(
    rho: ScalarOrSchedule = 0.5,
    eta: ScalarOrSchedule = 0.01,
    *,
    adaptive_mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """ASAM's ascent, ε = ρ T_w (T_w g/‖T_w g‖): the arguments are those of `asam`."""
    rescale = scale_by_magnitude(eta, adaptive_mask=adaptive_mask)
    return _vouching(rescale, normalize_by_global_norm(), rescale, scale_by_rho(rho))


def fsam_ascent(
    rho: ScalarOrSchedule = 0.05,
    sigma: ScalarOrSchedule | str = 1.0,
    decay: ScalarOrSchedule = 0.9,
    *,
    as_released: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """F-SAM's ascent, ε = ρ h/‖h‖, h = g − σm: the arguments are those of `fsam`."""
    return _vouching(
        subtract_ema(sigma, decay, as_released=as_released), sam_ascent(rho)
    )


def fasam_ascent(
    rho: ScalarOrSchedule = 0.5,
    eta: ScalarOrSchedule = 0.01,
    sigma: ScalarOrSchedule | str = 1.0,
    decay: ScalarOrSchedule = 0.9,
    *,
    adaptive_mask: Mask = None,
    as_released: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """F-ASAM's ascent, ε = ρ T_w² h/‖T_w h‖, h = g − σm: the arguments of `fasam`."""
    return _vouching(
        subtract_ema(sigma, decay, as_released=as_released),
        asam_ascent(rho, eta, adaptive_mask=adaptive_mask),
    )


def vasso_ascent(
    rho: ScalarOrSchedule = 0.05,
    theta: ScalarOrSchedule = 0.2,
    *,
    as_released: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """VaSSO's ascent, ε = ρ m/‖m‖: the arguments are those of `vasso`."""
    return _vouching(follow_ema(theta, as_released=as_released), sam_ascent(rho))


def fisher_sam_ascent(
    rho: ScalarOrSchedule = 0.1, eta: ScalarOrSchedule = 1.0
) -> optax.GradientTransformationExtraArgs:
    """Fisher SAM's ascent, ε = ρ F⁻¹g/√(gᵀF⁻¹g): the arguments are those of it."""
    inverse_root = scale_by_inverse_root_fisher(eta)
    return _vouching(
        inverse_root, normalize_by_global_norm(), inverse_root, scale_by_rho(rho)
    )


def sam_full_ascent(
    rho: ScalarOrSchedule = 0.05, decay: ScalarOrSchedule = 0.9
) -> optax.GradientTransformationExtraArgs:
    """SAM-full's ascent: the arguments are those of `sam_full`."""
    return optax.chain(project_on_full_gradient(decay), sam_ascent(rho))


def sam_noise_ascent(
    rho: ScalarOrSchedule = 0.05, decay: ScalarOrSchedule = 0.9
) -> optax.GradientTransformationExtraArgs:
    """SAM-noise's ascent: the arguments are those of `sam_noise`."""
    return optax.chain(subtract_projection_on_full_gradient(decay), sam_ascent(rho))


def usam_ascent(
    rho: ScalarOrSchedule = 0.05,
) -> optax.GradientTransformationExtraArgs:
    """USAM's ascent, ε = ρ g: the argument is that of `usam`."""
    return scale_by_rho(rho)
