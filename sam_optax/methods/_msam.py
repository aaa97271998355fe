"""Momentum-SAM: the perturbation follows the steps, and costs no gradient."""

from typing import Any, NamedTuple, Unpack

import optax

from sam_optax import _tree
from sam_optax._checks import check_constant, check_number, tree_argument
from sam_optax._hyperparameters import ScalarOrSchedule, scheduled
from sam_optax._parts import Ascent, chain
from sam_optax._step import Options, sharpness_aware
from sam_optax.methods._record import record
from sam_optax.methods._sam import sam_ascent


class MomentumState(NamedTuple):
    """State of `against_momentum`."""

    negative_momentum: optax.Updates  # −m; like the parameters, at least float32


def against_momentum(
    decay: ScalarOrSchedule = 0.9,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient by −m, where m is the momentum of the directions d.

    .. math::
      u_t = -m_t, \qquad m_{t+1} = \beta m_t + d_t, \quad m_0 = 0

    −m is the direction in which a base optimizer with this momentum moves the
    parameters. The gradient is not used, so none is taken at the parameters.

    Args:
      decay: the weight β of the past, in [0, 1). With 0, m is the last d. Default 0.9,
        that of `msam`.

    Returns:
      An ascent that carries m, in at least float32, and updates it after each step. To
      combine it with other parts, use `ascents.chain`.

    Raises:
      ValueError: if decay is a Python number outside [0, 1).
    """
    check_number("decay", decay, at_least=0, below=1)

    def part(decay):
        def update_fn(updates, state, params=None):
            del updates, params
            return state.negative_momentum, state

        def follow_fn(d, state, params):
            del params
            kept = _tree.scale(decay, state.negative_momentum)
            return MomentumState(_tree.subtract(kept, d))

        return Ascent.of(
            optax.GradientTransformation(_start_momentum, update_fn),
            follow=follow_fn,
            uses_gradient=False,
        )

    momentum = scheduled(part, follows_d=True, uses_gradient=False, decay=decay)
    return Ascent.of(momentum, shows_nonfinite=True)


def _start_momentum(params: optax.Params) -> MomentumState:
    return MomentumState(_tree.zeros_like(params))


def given_direction(name: str = "direction", *, sign: float = 1) -> Ascent:
    r"""Replaces the gradient by a direction that is given to the update.

    The direction is an extra argument of the update, a tree like the parameters. So an
    ascent can follow what is there already, without a copy: the momentum of the base
    optimizer, the last update of a server, or an eigenvector. The gradient is not used,
    so none is taken at the parameters.

    Args:
      name: that of the extra argument. Default "direction".
      sign: the direction is multiplied by it. To go where an optimizer's momentum is
        about to take the parameters, as `msam` does, pass the momentum and sign=-1.
        Default 1.

    Returns:
      A stateless ascent. To combine it with other parts, use `ascents.chain`.

    Raises:
      ValueError: from `update`, if the direction is missing, or is not a tree like the
        parameters.

    Examples:
      Momentum-SAM that borrows the momentum of its base optimizer:

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> from sam_optax import ascents
      >>> sam = sam_optax.sharpness_aware(ascents.chain(
      ...     ascents.given_direction("momentum", sign=-1), ascents.sam(rho=0.5)))
      >>> tx = optax.chain(sam, optax.sgd(0.1, momentum=0.9))
      >>> loss_and_grads = sam_optax.sam_value_and_grad(
      ...     lambda w: w**2, sam, value_at="perturbed")
      >>> @jax.jit
      ... def step(w, opt_state):
      ...     momentum = optax.tree.get(opt_state, "trace")
      ...     loss, grads = loss_and_grads(
      ...         w, opt_state=opt_state, extra_args={"momentum": momentum})
      ...     updates, opt_state = tx.update(grads, opt_state, w)
      ...     return optax.apply_updates(w, updates), opt_state, loss
      >>> w = jnp.array(1.0)
      >>> w, opt_state, loss = step(w, tx.init(w))
      >>> w, opt_state, loss = step(w, opt_state)
      >>> print(f"{loss:.2f} {w:.2f}")
      0.09 0.56
    """
    check_constant("sign", sign)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        direction = tree_argument(extra_args, name, updates, "follows")
        return _tree.scale(sign, _tree.at_least_float32(direction)), state

    return Ascent.of(
        optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn),
        uses_gradient=False,
        shows_nonfinite=True,
    )


def msam_ascent(rho: ScalarOrSchedule = 0.3, decay: ScalarOrSchedule = 0.9) -> Ascent:
    """The ascent of the method `msam`, ε = −ρ m/‖m‖; it takes the same arguments."""
    return chain(against_momentum(decay), sam_ascent(rho))


@record(
    title="Momentum-SAM",
    equation="ε = −ρ m/‖m‖, m ← β m + d",
    source="Becker 2024",
    url="https://arxiv.org/abs/2401.12033",
    gradients=1,
    cost="1 + a forward pass",
)
def msam(
    rho: ScalarOrSchedule = 0.3,
    decay: ScalarOrSchedule = 0.9,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum-SAM (MSAM): sharpness-aware with one gradient a step.

    .. math::
      \varepsilon_t = -\rho \frac{m_t}{\|m_t\|}, \qquad
      d_t = \nabla L(w_t + \varepsilon_t), \qquad
      m_{t+1} = \beta m_t + d_t, \quad m_0 = 0

    The momentum m points where the parameters come from, so w + ε lies ahead of them,
    where the next steps lead. No gradient is taken at w. To the rest of the program the
    parameters are the unperturbed w, in evaluation and in checkpoints too.

    Args:
      rho: the radius ρ = ‖ε‖. Default 0.3, that of the class in the authors' code. It
        is larger than SAM's: the commands in their README have 3 where those of SAM
        have 0.2.
      decay: the weight β of the past in m, in [0, 1). With 0, ε follows the last step
        alone. Default 0.9, the momentum of SGD in the authors' code, and the same as β₁
        of Adam.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0 or decay is outside [0, 1).

    Examples:
      On f(w) = w² from w = 1, the first step has no momentum: d = 2, and w becomes
      1 − 0.1 · 2. The second looks 0.5 ahead, so d = 2 · (0.8 − 0.5). With
      value_at="perturbed", the loss comes from the same pass as the gradient.

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> sam = sam_optax.msam(rho=0.5)
      >>> tx = optax.chain(sam, optax.sgd(0.1))
      >>> loss_and_grads = sam_optax.sam_value_and_grad(
      ...     lambda w: w**2, sam, value_at="perturbed")
      >>> @jax.jit
      ... def step(w, opt_state):
      ...     loss, grads = loss_and_grads(w, opt_state=opt_state)
      ...     updates, opt_state = tx.update(grads, opt_state, w)
      ...     return optax.apply_updates(w, updates), opt_state, loss
      >>> w = jnp.array(1.0)
      >>> opt_state = tx.init(w)
      >>> for _ in range(2):
      ...     w, opt_state, loss = step(w, opt_state)
      ...     print(f"{loss:.2f} {w:.2f}")
      1.00 0.80
      0.09 0.74

    References:
      Becker et al., `Momentum-SAM: Sharpness Aware Minimization without Computational
      Overhead <https://arxiv.org/abs/2401.12033>`_, 2024.

    Differences from the authors' code:
      1. Theirs is an optimizer, and m is its momentum, to which weight decay at w + ε
         adds. Here m is made of d alone. To have decay in it, add it to the loss. To
         use the base optimizer's own momentum, take `ascents.given_direction`.
      2. No epsilon is added to the norm. Theirs is 1e-12.
      3. Their parameters are the perturbed ones between the steps, so they have to be
         moved back before an evaluation. Here nothing is to be done.

    Cost: 1 gradient a step, and a forward pass more if the loss or the auxiliary output
    at w is used, which value_at="perturbed" avoids; one tree is carried, in at least
    float32.
    """
    return sharpness_aware(msam_ascent(rho, decay), **options)
