"""The path of one group of examples, g ↦ ε ↦ gᵃ ↦ d."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sam_optax import _tree
from sam_optax._rounding import Rounding
from sam_optax._step.inputs import UNKNOWN, Choice, Pass, as_choice
from sam_optax._step.parts import climb
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
    """

    ascent: optax.GradientTransformation
    descent: optax.GradientTransformationExtraArgs
    rounding: Rounding
    state: Any
    params: optax.Params
    extra_args: Mapping[str, Any]
    is_measured: bool

    def ascent_step(
        self, g: optax.Updates, passes: Choice, group: Any = None
    ) -> tuple[optax.Updates, optax.OptState, jax.Array | None]:
        """(ε, the ascent's next state, whether g is finite or None)."""
        g = _tree.at_least_float32(g)
        extra_args = self._shared_args(passes.ascent, group) | {"ascent_gradient": g}
        return climb(self.ascent, g, self.state.ascent_state, self.params, extra_args)

    def evaluate(
        self, passes: Choice, perturbation: optax.Updates, group: Any = None
    ) -> AtPerturbed:
        """gᵃ, and what a report measures at w + ε."""
        there = passes.descent(self._perturbed(self.params, perturbation, group))
        if not self.is_measured:
            return AtPerturbed(there.gradient)
        perturbed_loss, unperturbed_loss = (
            jnp.float32(unknown()) if loss is UNKNOWN else _tree.at_least_float32(loss)
            for loss in (there.loss, there.unperturbed_loss)
        )
        return AtPerturbed(
            there.gradient,
            perturbed_loss,
            perturbed_loss - jnp.asarray(unperturbed_loss, perturbed_loss.dtype),
            _tree.norm(perturbation),
        )

    def plain_gradient(self, g: optax.Updates, passes: Choice) -> optax.Updates:
        """The gradient at w of the examples that the step descends on."""
        return passes.descent(self.params).gradient if passes.recompute else g

    def descent_step(
        self,
        descent_gradient: optax.Updates,
        g: optax.Updates,
        passes: Choice,
        perturbation: optax.Updates,
        group: Any = None,
    ) -> tuple[optax.Updates, optax.OptState]:
        """(d, the descent's next state) from gᵃ, and from g on the same examples."""
        return self.descent.update(
            _tree.at_least_float32(descent_gradient),
            self.state.descent_state,
            self.params,
            ascent_gradient=_tree.at_least_float32(g),
            perturbation=perturbation,
            **self._shared_args(passes.descent, group),
        )

    def __call__(
        self, g: optax.Updates, grad_fn: Any, group: Any = None
    ) -> tuple[optax.Updates, AtPerturbed]:
        """(d, what was seen at w + ε) of one group; `per_group` takes their means."""
        passes = as_choice(grad_fn, like=g)
        perturbation, _, _ = self.ascent_step(g, passes, group)
        there = self.evaluate(passes, perturbation, group)
        g_descent = self.plain_gradient(g, passes)
        d, _ = self.descent_step(
            there.descent_gradient, g_descent, passes, perturbation, group
        )
        return d, there

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
        self, evaluate: Callable[[Any], Pass], group: Any
    ) -> dict[str, Any]:
        """The extra arguments that an ascent and a descent both receive."""
        return {
            **self.extra_args,
            "grad_fn": lambda point: evaluate(point).gradient,
            "perturb": lambda params, e: self._perturbed(params, e, group),
            "group": group,
        }
