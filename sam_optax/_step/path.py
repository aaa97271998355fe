"""The path of one group of examples, g ↦ ε ↦ gᵃ ↦ d."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sam_optax import _tree
from sam_optax._parts import Ascent, Descent
from sam_optax._rounding import Rounding
from sam_optax._step.inputs import Choice, Pass, as_choice
from sam_optax._step.report import AtPerturbed, unknown


@dataclasses.dataclass(frozen=True, eq=False)
class Path:
    """Everything that one step's ascent and descent need beside a group's gradients.

    Attributes:
      ascent: g ↦ ε.
      descent: gᵃ ↦ d.
      rounding: of w + ε.
      state: the `SharpnessAwareState` from before the step.
      params: w.
      extra_args: those of the update, which ascent and descent receive.
      is_measured: whether a report is wanted.
      compares: whether a descent or a cadence may compare gᵃ with g.
    """

    ascent: Ascent
    descent: Descent
    rounding: Rounding
    state: Any
    params: optax.Params
    extra_args: Mapping[str, Any]
    is_measured: bool
    compares: bool

    def ascent_step(
        self, g: optax.Updates, passes: Choice, group: Any = None
    ) -> tuple[optax.Updates, optax.OptState, jax.Array | None]:
        """(ε, the ascent's next state, whether its source is finite or None)."""
        g = _tree.at_least_float32(g)
        extra_args = self._shared_args(passes, passes.ascent, group)
        descent_grad_fn = extra_args["grad_fn"]
        if not passes.sees_one_loss:
            descent_grad_fn = _gradient_of(passes.descent, passes.averaged_over)
        extra_args |= {"ascent_gradient": g, "descent_grad_fn": descent_grad_fn}
        if self.descent.for_ascent is not None:
            extra_args |= self.descent.for_ascent(self.state.descent_state)
        return self.ascent.climb(g, self.state.ascent_state, self.params, **extra_args)

    def evaluate(
        self, passes: Choice, perturbation: optax.Updates, group: Any = None
    ) -> AtPerturbed:
        """gᵃ, and what a report measures at w + ε."""
        there = passes.descent(self._perturbed(self.params, perturbation, group))
        value = (there.loss, there.aux) if passes.value_slot is not None else ()
        loss = self.loss_for_descent(there)
        if not self.is_measured:
            return AtPerturbed(there.gradient, value, loss)
        perturbed_loss, unperturbed_loss = (
            jnp.float32(unknown()) if loss is None else _tree.at_least_float32(loss)
            for loss in (there.loss, there.unperturbed_loss)
        )
        return AtPerturbed(
            there.gradient,
            value,
            loss,
            perturbed_loss=perturbed_loss,
            surrogate_gap=perturbed_loss
            - jnp.asarray(unperturbed_loss, perturbed_loss.dtype),
            perturbation_norm=_tree.norm(perturbation),
        )

    def compared_gradient(self, g: optax.Updates, passes: Choice) -> optax.Updates:
        """The gradient at w that a descent and a cadence may compare gᵃ with."""
        if not self.compares:
            return g
        return self.plain_pass_of_branch(g, passes).gradient

    def plain_pass_of_branch(self, g: optax.Updates, passes: Choice) -> Pass:
        """The same as `plain_pass`, for a branch of the program.

        Where the ascent does not use g, the pass is taken here, so that the other
        branch does not take it.
        """
        if self.ascent.uses_gradient:
            return self.plain_pass(g, passes)
        return passes.descent(self.params)

    def plain_pass(self, g: optax.Updates, passes: Choice) -> Pass:
        """The pass at w over the examples that the step descends on."""
        if passes.recompute:
            return passes.descent(self.params)
        if passes.seen is None:
            return Pass(None, g)
        return passes.seen._replace(gradient=g)

    def loss_for_descent(self, there: Pass) -> Any:
        """The loss of a pass for the descent, or None if it uses none."""
        if self.descent.uses_loss:
            _check_has_loss(there)
        if self.descent.uses_loss is False or there.loss is None:
            return None
        return _tree.at_least_float32(jnp.asarray(there.loss))

    def descent_step(
        self,
        there: AtPerturbed,
        g: optax.Updates,
        passes: Choice,
        perturbation: optax.Updates,
        group: Any = None,
    ) -> tuple[optax.Updates, optax.OptState]:
        """(d, the descent's next state) from what was seen at w + ε, and from g.

        g is that of the examples that the step descends on.
        """
        extra_args = self._shared_args(passes, passes.descent, group)
        # The same function shows that both gradients see the same examples.
        ascent_grad_fn = None
        if not passes.sees_one_loss:
            ascent_grad_fn = _gradient_of(passes.ascent, passes.averaged_over)
        return self.descent.update(
            _tree.at_least_float32(there.descent_gradient),
            self.state.descent_state,
            self.params,
            ascent_gradient=_tree.at_least_float32(g),
            perturbation=perturbation,
            perturbed_loss=there.loss,
            ascent_grad_fn=ascent_grad_fn or extra_args["grad_fn"],
            **extra_args,
        )

    def __call__(
        self, g: optax.Updates, grad_fn: Any, group: Any = None
    ) -> tuple[optax.Updates, AtPerturbed]:
        """(d, what was seen at w + ε) of one group; `per_group` takes their means."""
        passes = as_choice(grad_fn, like=g)
        perturbation, _, _ = self.ascent_step(g, passes, group)
        g_descent = self.compared_gradient(g, passes)
        there = self.evaluate(passes, perturbation, group)
        d, state = self.descent_step(there, g_descent, passes, perturbation, group)
        if self.descent.averages_state:
            there = there._replace(state_floats=_floats(state))
        return d, there

    def with_averages(
        self, state: optax.OptState, there: AtPerturbed
    ) -> optax.OptState:
        """The descent's state, with the means over groups where it asks for them."""
        if not self.descent.averages_state:
            return state
        leaves, structure = jax.tree.flatten(state)
        means = iter(there.state_floats)
        return structure.unflatten(
            [next(means) if _tree.is_inexact(x) else x for x in leaves]
        )

    def with_gradient(
        self, g: optax.Updates, grad_fn: Any, group: Any = None
    ) -> tuple[tuple[optax.Updates, AtPerturbed], optax.Updates]:
        """The same together with the group's g, if the mean of g is wanted as well."""
        return self(g, grad_fn, group), g

    def _perturbed(
        self, params: optax.Params, perturbation: optax.Updates, group: Any
    ) -> optax.Params:
        """w + ε, rounded; of some of the parameters if the ascent has a mask."""
        key_data = self.state.rounding_key
        return self.rounding.perturb(params, perturbation, key_data, group)

    def _shared_args(
        self, passes: Choice, evaluate: Callable[[Any], Pass], group: Any
    ) -> dict[str, Any]:
        """The extra arguments that an ascent and a descent both receive."""
        return {
            **self.extra_args,
            "grad_fn": _gradient_of(evaluate, passes.averaged_over),
            "value_and_grad_fn": _value_and_gradient_of(evaluate),
            "perturb": lambda params, e: self._perturbed(params, e, group),
            "group": group,
        }


def _floats(state: optax.OptState) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(state) if _tree.is_inexact(leaf)]


def _gradient_of(
    evaluate: Callable[[Any], Pass], averaged_over: tuple[str, ...] = ()
) -> Callable[[Any], Any]:
    def gradient(point):
        return evaluate(point).gradient

    function: Any = gradient
    function.averaged_over = averaged_over
    return function


def _value_and_gradient_of(evaluate: Callable[[Any], Pass]) -> Callable[[Any], Any]:
    def value_and_gradient(point):
        there = evaluate(point)
        _check_has_loss(there)
        return there.loss, there.gradient

    return value_and_gradient


def _check_has_loss(there: Pass) -> None:
    """Refuses a pass of which the caller of an update gave the gradient alone."""
    if there.loss is None:
        raise ValueError(
            "This method needs the loss beside each gradient, and grad_fn= returns the "
            "gradient alone. Take the gradients with sam_optax.sam_value_and_grad, or "
            "pass on the extra arguments that sam_optax.value_and_ascent_grad returns."
        )
