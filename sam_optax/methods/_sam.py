"""SAM: the norm, the radius, and the method."""

import numbers
from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from sam_optax import _tree
from sam_optax._checks import check_number
from sam_optax._hyperparameters import (
    ScalarOrSchedule,
    nan_if_negative,
    scheduled,
)
from sam_optax._parts import Ascent, chain
from sam_optax._step import Options, sharpness_aware
from sam_optax.methods._record import record


def scale_by_rho(rho: ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """Multiplies by the radius: u ↦ ρ u.

    Args:
      rho: the radius, >= 0: a number, a schedule of the step, or a traced scalar.

    Returns:
      A transformation. With a schedule, its state counts the steps. Where a schedule
      or a traced rho turns out to be negative, the result is NaN.

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
        check_number("rho", rho, at_least=0)  # also what a schedule returns
        rho = nan_if_negative(rho)
        return optax.stateless(
            lambda updates, _: _tree.scale(rho, _tree.at_least_float32(updates))
        )

    return scheduled(part, rho=rho)


def normalize_by_global_norm(p: float = 2) -> optax.GradientTransformation:
    r"""Maps g to the direction, of p-norm 1, in which the linearised loss rises most.

    .. math::
      u = \frac{\operatorname{sign}(g) |g|^{q-1}}{(\|g\|_q^q)^{1/p}},
      \qquad \tfrac1p + \tfrac1q = 1

    This is g/‖g‖ for p = 2 and sign(g) for p = ∞. One norm runs over all leaves. ‖u‖_p
    is 1 however small or large g is, short of subnormal numbers. If g is zero, so is u.

    Args:
      p: the order of the norm, a Python number >= 1 or infinity. Default 2. It decides
        which program is compiled, so it cannot be traced or scheduled. For p = 1, u is
        zero except on the largest entry of g; if several entries are equally large,
        they share it.

    Returns:
      A stateless transformation. It returns half-precision leaves as float32. If an
      entry of g is not finite, the whole of u is NaN.

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
    if isinstance(p, bool) or not isinstance(p, numbers.Real):
        raise TypeError(f"p must be a number, got {p!r}.")
    p = float(p)
    if not p >= 1:
        raise ValueError(f"p must be >= 1, got {p}.")
    if p == 2:
        return Ascent.from_climb(optax.init_empty_state, _to_unit)
    return optax.stateless(lambda updates, _: _dual_unit(updates, p))


def _to_unit(updates, state, params=None, **extra_args):
    del params, extra_args
    norm = _tree.scaled_norm(updates)
    return _tree.to_unit(updates, norm), state, norm.is_finite


def _dual_unit(tree: optax.Updates, p: float) -> optax.Updates:
    """sign(g) |g|^(q−1) / (‖g‖_q^q)^(1/p), computed on g over its largest entry."""
    tree = _tree.at_least_float32(tree)
    largest = _tree.largest_magnitude(tree)
    scaled = _tree.scale(_tree.reciprocal_or_zero(largest), tree)
    if p == jnp.inf:
        # We take the sign of g, because a small entry of the quotient x can be rounded
        # to zero. Adding 0 · x makes the result NaN where x is NaN.
        return jax.tree.map(lambda g, x: jnp.sign(g) + 0 * x, tree, scaled)
    if p == 1:
        powers = jax.tree.map(
            lambda g, x: jnp.where(jnp.abs(g) == largest, x, 0 * x), tree, scaled
        )
        total = _tree.sum_leaves(lambda x: jnp.sum(jnp.abs(x)), powers)
        root = total
    else:
        q = p / (p - 1)
        powers = jax.tree.map(lambda x: _signed_power(x, q - 1), scaled)
        total = _tree.sum_leaves(lambda x, u: jnp.sum(x * u), scaled, powers)
        # Powers of zero have no finite derivative. Zero is excluded below as well.
        root = jnp.where(total == 0, 1, total) ** (1 / p)
    is_zero = total == 0
    return _tree.scale(jnp.where(is_zero, 0, 1 / jnp.where(is_zero, 1, root)), powers)


def _signed_power(x: jax.Array, exponent: float) -> jax.Array:
    """sign(x) |x|^exponent, with a derivative of zero at zero."""
    magnitude = jnp.where(x == 0, 1, jnp.abs(x))
    return jnp.sign(x) * magnitude**exponent


def sam_ascent(rho: ScalarOrSchedule = 0.05, *, p: float = 2) -> Ascent:
    """The ascent of the method `sam`, ε = ρ g/‖g‖.

    It takes the same arguments, but p is always a number here, 2 by default.
    """
    return chain(normalize_by_global_norm(p), scale_by_rho(rho))


@record(
    title="SAM",
    equation="ε = ρ g/‖g‖",
    source="Foret 2021",
    url="https://arxiv.org/abs/2010.01412",
)
def sam(
    rho: ScalarOrSchedule = 0.05, *, p: float | None = None, **options: Unpack[Options]
) -> optax.GradientTransformationExtraArgs:
    r"""Sharpness-Aware Minimization (SAM).

    .. math::
      \varepsilon = \rho \frac{g}{\|g\|}, \qquad d = \nabla L(w + \varepsilon)

    With a norm of another order p, the perturbation is

    .. math::
      \varepsilon = \rho \, \frac{\operatorname{sign}(g) |g|^{q-1}}{(\|g\|_q^q)^{1/p}},
      \qquad \tfrac1p + \tfrac1q = 1

    Args:
      rho: the radius ρ = ‖ε‖_p: a number, a schedule of the step, or a traced scalar.
        Default 0.05, from the paper's experiments.
      p: the order of the norm, a Python number from 1 to infinity. Default None, which
        means the 2-norm. If you set p under `optax.inject_hyperparams`, pass that
        function `static_args=("p",)`, because it would turn the number into an array.
        It leaves None as it is.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0 or p < 1.

    Examples:
      On f(w) = w² from w = 1, ε is 0.5, so d = 2 · 1.5 and w becomes 1 − 0.1 · 3.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.sam(rho=0.5), optax.sgd(0.1))
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> w = jnp.array(1.0)
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
      ...     w = optax.apply_updates(w, updates)
      ...     print(f"{w:.2f}")
      0.70
      0.46

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, ICLR 2021.

    Differences from the authors' code, which is written in JAX:
      1. If g is zero, so is the perturbation. Theirs divides by zero, and gets NaN.
         (The epsilon that PyTorch versions of SAM add to ‖g‖ is not in theirs either.)
      2. Their loss includes an L2 penalty on the parameters, so both gradients do. Here
         the loss is yours, and weight decay that follows in the chain is not part of
         either gradient.
      3. Here one perturbation is made from the whole gradient that is given. Theirs has
         one per device, unless it is started with --sync_perturbations.
      4. Their training metrics are those at w + ε. Here `sam_value_and_grad` returns
         the loss and the auxiliary output at w.

    Cost: 2 gradients a step; no tree is carried.
    """
    return sharpness_aware(sam_ascent(rho, p=2 if p is None else p), **options)
