"""Functional SAM: only the network moves to w + ε, the loss's own gradient stays."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sam_optax import _tree
from sam_optax._checks import check_number, tree_argument
from sam_optax._doors.batch import Batch
from sam_optax._hyperparameters import ScalarOrSchedule, scheduled
from sam_optax._step.inputs import Choice, Pass
from sam_optax.methods._record import record_further


@record_further(
    title="Functional SAM",
    equation="gᵃ = J(w+ε)ᵀ ∇ℓ(f(w)), J the Jacobian of f",
    use="`data=`, and its `loss_fn`",
    source="Singh 2025",
    url="https://arxiv.org/abs/2502.02407",
    cost="2",
)
def functional(
    outputs_fn: Callable[..., Any], outputs_loss: Callable[..., Any]
) -> "FunctionalRule":
    r"""Descends through the network at w + ε, with the loss's gradient at f(w).

    .. math::
      L(w) = \ell(f(w)), \qquad
      g^a = J_f(w + \varepsilon)^\top \, \nabla \ell\,(f(w))

    f is the network with all its outputs, J its Jacobian, and ℓ the loss of the
    outputs. SAM's gᵃ has ∇ℓ(f(w + ε)) in the place of ∇ℓ(f(w)), which also rewards
    smaller outputs. Its authors found that in language models this part is the larger
    one, and flattens the loss without improving the network.

    Args:
      outputs_fn: f, the parameters and any further arguments -> the outputs of the
        network, a floating-point array or a tree of such arrays.
      outputs_loss: ℓ, these outputs and the same further arguments -> the loss, or
        (loss, aux) with has_aux=True. If the loss has a shape, its mean is taken.

    Returns:
      A rule for the `data=` argument of the helpers. Its attribute `loss_fn` is the
      loss as a function of the parameters, outputs_loss(outputs_fn(w, ...), ...): pass
      it as the loss_fn of the helper. Any ascent goes with the rule. Where the outputs
      are linear in the parameters, gᵃ = g. A descent that takes gradients of its own
      takes those of the rule.

    Raises:
      TypeError: if one of the two is not a function.
      ValueError: when traced, if the loss_fn of the helper is another one, or the
        outputs at w + ε have other shapes than those at w.

    Examples:
      f(w) = w² and ℓ(f) = f²/2. From w = 1, ε = 0.5: f' is 2 · 1.5 there, and ℓ' stays
      f(1) = 1.

      >>> import jax.numpy as jnp, sam_optax
      >>> rule = sam_optax.data.functional(lambda w, x: w**2, lambda f, x: f**2 / 2)
      >>> sam = sam_optax.sam(rho=0.5)
      >>> loss_and_grads = sam_optax.sam_value_and_grad(rule.loss_fn, sam, data=rule)
      >>> w = jnp.array(1.0)
      >>> loss, grads = loss_and_grads(w, jnp.zeros(4), opt_state=sam.init(w))
      >>> print(loss, grads.gradients)
      0.5 3.0

    References:
      Singh et al., `Avoiding spurious sharpness minimization broadens applicability of
      SAM <https://arxiv.org/abs/2502.02407>`_, ICML 2025. The equation was checked
      against the abstract and a rendering of the algorithm, not against code, of which
      none was found.

    Cost: 2 gradients a step. ∇ℓ(f(w)) is kept until the second pass: an array as large
    as the outputs, which are batch × length × vocabulary in a language model.
    """
    return FunctionalRule(outputs_fn, outputs_loss)


class FunctionalRule:
    """The rule that `functional` returns.

    Attributes:
      loss_fn: the loss as a function of the parameters.
    """

    def __init__(
        self, outputs_fn: Callable[..., Any], outputs_loss: Callable[..., Any]
    ) -> None:
        for name, function in (
            ("outputs_fn", outputs_fn),
            ("outputs_loss", outputs_loss),
        ):
            if not callable(function):
                raise TypeError(f"{name} must be a function, got {function!r}.")

        def loss_fn(params, /, *args, **kwargs):
            outputs = outputs_fn(params, *args, **kwargs)
            return outputs_loss(outputs, *args, **kwargs)

        self.loss_fn = loss_fn
        self._outputs_fn, self._outputs_loss = outputs_fn, outputs_loss

    def __call__(self, batch: Batch, params: optax.Params) -> Choice:
        if batch.user_loss_fn is not self.loss_fn:
            raise ValueError(
                "data.functional takes the loss apart, so the helper must be given its "
                "own: rule = data.functional(outputs_fn, outputs_loss), and "
                "sam_value_and_grad(rule.loss_fn, sam, data=rule). With an NNX model, "
                "split it, and merge it in outputs_fn: sam_optax.nnx wraps the loss."
            )
        ell = batch.with_loss(self._outputs_loss)

        def network(point: Any) -> Any:
            return batch.call(self._outputs_fn, point)

        at_w, pull_back_at_w = jax.vjp(network, params)
        _check_outputs(at_w)
        here = ell.gradient(at_w)
        cotangent = here.gradient
        (g,) = pull_back_at_w(cotangent)

        def descent(point: Any) -> Pass:
            outputs, pull_back = jax.vjp(network, point)
            mismatch = _tree.mismatch(outputs, at_w)
            if mismatch:
                raise ValueError(
                    "outputs_fn must return outputs of the same shapes at every point. "
                    f"In those at w + ε, {mismatch}."
                )
            (gradient,) = pull_back(cotangent)
            there = ell.forward(outputs)
            return there._replace(gradient=gradient, batch=batch)

        seen = here._replace(gradient=g, batch=batch)
        return Choice(seen, batch.gradient, descent)


def _check_outputs(outputs: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(outputs):
        if not _tree.is_inexact(leaf):
            raise TypeError(
                "outputs_fn must return floating-point arrays, because the loss is "
                f"differentiated by them. Its output{jax.tree_util.keystr(path)} has "
                f"dtype {jnp.result_type(leaf)}: compute it in outputs_loss, or pass "
                "it there as an argument of the loss."
            )


def divide_by_root_of(
    name: str = "second_moment", eps: ScalarOrSchedule = 1e-8
) -> optax.GradientTransformationExtraArgs:
    r"""Divides by √ν + eps, for a second moment ν that is given to the update.

    .. math::
      u = \frac{g}{\sqrt{\nu} + \mathrm{eps}}

    This is Adam's preconditioner, so with ν from Adam's state, ε follows the direction
    in which Adam would move for this gradient.

    Args:
      name: that of the extra argument that holds ν, a tree like the parameters. Default
        "second_moment".
      eps: a number >= 0. Default 1e-08, that of `optax.adam`.

    Returns:
      A stateless transformation. Before the first step of Adam, ν is zero, and u is g
      divided by eps, of which a norm that follows keeps the direction.

    Raises:
      ValueError: if eps is negative; from `update`, if ν is missing, or is not a tree
        like the parameters.

    Examples:
      >>> import jax.numpy as jnp, optax, sam_optax
      >>> from sam_optax import ascents
      >>> sam = sam_optax.sharpness_aware(
      ...     ascents.chain(ascents.divide_by_root_of("nu"), ascents.sam(rho=0.5)))
      >>> tx = optax.chain(sam, optax.adam(0.1))
      >>> w = jnp.ones(2)
      >>> state = tx.init(w)
      >>> d, _ = sam.update(w, state[0], w, grad_fn=lambda point: point,
      ...     nu=optax.tree.get(state, "nu"))
      >>> print(d.round(3))
      [1.354 1.354]

    References:
      Singh et al., `Avoiding spurious sharpness minimization broadens applicability of
      SAM <https://arxiv.org/abs/2502.02407>`_, ICML 2025.
    """
    check_number("eps", eps, at_least=0)

    def part(eps):
        def update_fn(updates, state, params=None, **extra_args):
            del params
            nu = tree_argument(extra_args, name, updates, "divides by the root of")
            g = _tree.at_least_float32(updates)
            return jax.tree.map(
                lambda g, v: g / (jnp.sqrt(v.astype(g.dtype)) + eps), g, nu
            ), state

        return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)

    return scheduled(part, eps=eps)
