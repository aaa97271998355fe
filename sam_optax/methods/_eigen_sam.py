"""Eigen-SAM: the perturbation leans towards the leading eigenvector of the Hessian."""

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from sam_optax import _tree
from sam_optax._checks import (
    check_number,
    check_static_integer,
    require_grad_fn,
    require_params,
)
from sam_optax._hyperparameters import ScalarOrSchedule, scheduled
from sam_optax._parts import Ascent, chain
from sam_optax._random import Key, key_stream
from sam_optax._step import Options, sharpness_aware
from sam_optax.methods._record import record
from sam_optax.methods._sam import scale_by_rho


class EigenvectorState(NamedTuple):
    """State of `lean_to_eigenvector`."""

    eigenvector_step: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32
    eigenvector: optax.Updates  # v, like the parameters; zero until it is found
    eigenvector_key: jax.Array  # key data, dtype=jnp.uint32


def lean_to_eigenvector(
    alpha: ScalarOrSchedule = 0.2,
    k: int = 100,
    steps: int = 5,
    *,
    as_released: bool = False,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Turns the direction of g towards the leading eigenvector of the Hessian.

    .. math::
      u = \hat g + \alpha \operatorname{sign}\langle g, v \rangle
        \big(v - \langle v, \hat g \rangle \hat g\big), \qquad
      \hat g = g/\|g\|

    On every k-th step, v is found anew by power iteration, which starts from the last
    v: v ← Hv/‖Hv‖, with the Hessian H of the loss at the parameters. Hv is the
    derivative of the gradient along v, so H itself is never computed.

    Args:
      alpha, k, steps, as_released, key: those of the method `eigen_sam`. Default 0.2,
        100, 5, False and 0.

    Returns:
      An ascent that needs `grad_fn=` and the parameters. It carries v, in at least
      float32, a counter and a key.

    Raises:
      ValueError: if alpha is not finite, k or steps is not a positive integer, or, from
        `update`, if params or grad_fn is missing.
    """
    check_number("alpha", alpha)
    check_static_integer("k", k)
    check_static_integer("steps", steps)
    keys = key_stream(key, "lean_to_eigenvector")

    def init_fn(params: optax.Params) -> EigenvectorState:
        return EigenvectorState(
            jnp.zeros((), jnp.int32), _tree.zeros_like(params), keys.start()
        )

    def part(alpha):
        def update_fn(
            updates: optax.Updates,
            state: Any,
            params: optax.Params | None = None,
            *,
            grad_fn: Any = None,
            group: Any = None,
            **extra_args: Any,
        ) -> tuple[optax.Updates, EigenvectorState]:
            del extra_args
            require_params(params, "lean_to_eigenvector")
            require_grad_fn(grad_fn, "lean_to_eigenvector")
            step, v = state.eigenvector_step, state.eigenvector
            now, later = keys.next(state.eigenvector_key)
            # The Hessian is that of the whole batch. A group takes the v that is
            # carried; the next one is found beside the groups, once for all.
            if group is None:
                is_due = step % k == 0
                if as_released:
                    is_due &= step > 0
                else:  # a search that found nothing finite is made again
                    is_due |= _is_missing(v)
                v = jax.lax.cond(
                    is_due,
                    lambda v: _power_iteration(
                        grad_fn, params, _or_random(now, v), steps
                    ),
                    lambda v: v,
                    v,
                )
            leaning = _lean(updates, v, alpha)
            if as_released:  # without v, theirs does not divide by the norm
                is_missing = _is_missing(v)
                leaning = jax.tree.map(
                    lambda g, u: jnp.where(is_missing, g, u),
                    _tree.at_least_float32(updates),
                    leaning,
                )
            return leaning, EigenvectorState(optax.safe_increment(step), v, later)

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return scheduled(part, alpha=alpha)


def _lean(g: optax.Updates, v: optax.Updates, alpha: Any) -> optax.Updates:
    unit = _tree.unit(g)
    overlap = _tree.dot(unit, v)
    across = _tree.add_scaled(v, -overlap, unit)
    return _tree.add_scaled(unit, alpha * jnp.sign(overlap), across)


def _or_random(key: jax.Array, v: optax.Updates) -> optax.Updates:
    """v, or a random direction while there is none."""
    is_missing = _is_missing(v)
    random = _tree.unit(_tree.normal_like(key, v))
    # As a sum, so that the random numbers are divided over devices as v is.
    return jax.tree.map(lambda r, x: x + jnp.where(is_missing, r, 0), random, v)


def _is_missing(v: optax.Updates) -> jax.Array:
    return _tree.largest_magnitude(v) == 0


def _power_iteration(
    grad_fn: Callable[[Any], Any], params: Any, v: optax.Updates, steps: int
) -> optax.Updates:
    def body(_: Any, v: optax.Updates) -> optax.Updates:
        direction = _tree.cast_like(v, params)
        _, product = jax.jvp(grad_fn, (params,), (direction,))
        return _tree.cast_like(_tree.unit(product), v)

    return jax.lax.fori_loop(0, steps, body, v)


def eigen_sam_ascent(
    rho: ScalarOrSchedule = 0.1,
    alpha: ScalarOrSchedule = 0.2,
    k: int = 100,
    *,
    steps: int = 5,
    as_released: bool = False,
    key: Key = 0,
) -> Ascent:
    """The ascent of the method `eigen_sam`; same arguments."""
    lean = lean_to_eigenvector(alpha, k, steps, as_released=as_released, key=key)
    return chain(lean, scale_by_rho(rho))


@record(
    title="Eigen-SAM",
    equation="ε = ρ(ĝ + α sign⟨g,v⟩(v − ⟨v,ĝ⟩ĝ)), v the leading eigenvector",
    radius="the part of ε along g",
    source="Luo 2024",
    url="https://arxiv.org/abs/2501.12666",
    gradients=lambda k, steps: 2 + 2 * steps / k,
    cost="2 + 2n/k",
)
def eigen_sam(
    rho: ScalarOrSchedule = 0.1,
    alpha: ScalarOrSchedule = 0.2,
    k: int = 100,
    *,
    steps: int = 5,
    as_released: bool = False,
    key: Key = 0,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Eigen-SAM: explicit eigenvalue regularization.

    .. math::
      \varepsilon = \rho \big(\hat g + \alpha \operatorname{sign}\langle g, v \rangle
        (v - \langle v, \hat g \rangle \hat g)\big), \qquad
      d = \nabla L(w + \varepsilon)

    with ĝ = g/‖g‖ and the eigenvector v of the Hessian whose eigenvalue is largest in
    magnitude. The gradient hardly points along v by itself; with the part of v that is
    orthogonal to g, the perturbation sees the largest eigenvalue.

    Args:
      rho: ρ, the length of ε along g. With the part along v,
        ‖ε‖² = ρ² (1 + α² ‖v − ⟨v,ĝ⟩ĝ‖²). Default 0.1, from the authors' logs.
      alpha: α, the weight of the eigenvector. Default 0.2, from the authors' logs.
      k: v is found anew on every k-th step, a Python integer >= 1. Default 100, from
        the authors' logs.
      steps: the number n of power iterations then, a Python integer >= 1. Each starts
        where the last one ended. Default 5, from the authors' code.
      as_released: whether v is missing on the first k steps, where ε is then ρ g, not
        divided by the norm. Default False: it is found on the first step.
      key: an int, a typed key or a legacy one, for the first start of the power
        iteration. Default 0.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.
        With a mask, the Hessian is that of the perturbed leaves.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.
      `grad_fn` must be differentiable in forward mode.

    Raises:
      ValueError: if rho < 0, alpha is not finite, or k or steps is not a positive
        integer.

    Examples:
      On f(w) = (8 x² + y²)/2 from (0, 1), g is (0, 1) and v = (±1, 0), so that SAM
      would never see the large eigenvalue. From a point beside it:

      >>> import jax, jax.numpy as jnp, sam_optax
      >>> grad_fn = jax.grad(lambda w: (8 * w[0] ** 2 + w[1] ** 2) / 2)
      >>> w = jnp.array([1e-4, 1.0])
      >>> sam = sam_optax.eigen_sam(rho=0.1, alpha=0.2)
      >>> d, _ = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
      >>> print(d.round(2))
      [0.16 1.1 ]

    References:
      Luo et al., `Explicit Eigenvalue Regularization Improves Sharpness-Aware
      Minimization <https://arxiv.org/abs/2501.12666>`_, NeurIPS 2024.

    Differences from the authors' code, with whose trajectories as_released=True was
    compared:
      1. Theirs has no v on the first k steps, as as_released=True says.
      2. No epsilon is added to norms. Theirs is 1e-12.
      3. With groups of examples (m=, or a perturbation per device) all groups share v,
         that of the whole batch; they use a new one from the next step on.
      4. They take the Hessian with the model in evaluation mode, without dropout and
         with the running statistics. Here it is that of the loss of the training.

    Cost: 2 + 2n/k gradients a step, as every k-th step takes n products with the
    Hessian, of about 2 gradients each; one tree is carried, in at least float32.
    """
    ascent = eigen_sam_ascent(
        rho, alpha, k, steps=steps, as_released=as_released, key=key
    )
    return sharpness_aware(ascent, **options)
