"""What `sam_value_and_grad` returns as gradients, and the transformation unpacks."""

import weakref
from typing import Any

import jax
import optax
from jax.core import Tracer
from jax.extend import core as jax_core

from sam_optax import _tree
from sam_optax._step.report import Report
from sam_optax._step.sameness import HandedOut, Recipe, first_difference

_handed_out = HandedOut()


class _Cargo:
    """What the gradients of one step carry.

    Attributes:
      recipe: of the transformation that made the gradients.
      before: the SAM state that it was given.
      state: the next SAM state.
      report: a `Report`, or None.
      was_traced: whether the gradients are values of a jitted function.
      trace: the trace that they belong to.
    """

    def __init__(
        self, recipe: Recipe, before: Any, state: Any, report: Report | None, was_traced
    ):
        self.recipe, self.before, self.state, self.report = (
            recipe,
            before,
            state,
            report,
        )
        self.was_traced = was_traced
        self.trace = current_traces()[0]
        self.label = _Label(self)


class _Label:
    """Stands for a cargo in the structure of its gradients. Equal to itself only.

    JAX's caches keep structures, and a cargo holds values of a trace, which must not
    outlive it. So the gradients hold the cargo, and the structure refers to it weakly.
    """

    def __init__(self, cargo: _Cargo):
        self.cargo = weakref.ref(cargo)

    def __repr__(self) -> str:
        # JAX shows this where gradients of two steps are taken together.
        return (
            "<the next SAM state of one step: take grads.gradients from each, and put "
            "the result back by grads.replace>"
        )


@jax.tree_util.register_pytree_with_keys_class
class SharpnessAwareGradients:
    """The sharpness-aware gradient d, which carries the next SAM state as aux data.

    To what takes a tree of gradients alone, such as norms and `jax.tree.map`, this is
    the tree d, with its leaves and their paths. The SAM transformation in the optimizer
    chain takes d and its own next state out of it. Both must happen in the same jitted
    function. The SAM state, such as an average of the gradient, is made already, and is
    not changed with d: means over devices are taken by `axis_name=`, and with a scaled
    loss the step calls the update itself (`value_and_ascent_grad`).

    Attributes:
      gradients: d, with the structure of the parameters.
      report: a `Report` if `sam_value_and_grad` was built with `report=True`, or None.
    """

    def __init__(
        self,
        gradients: optax.Updates,
        *,
        recipe: Recipe,
        before: Any,
        state: Any,
        report: Report | None = None,
    ):
        self.gradients = gradients
        self._cargo: _Cargo | None = _Cargo(
            recipe, before, state, report, is_traced(gradients)
        )

    @property
    def report(self) -> Report | None:
        cargo = self._cargo
        report = None if cargo is None else cargo.report
        if cargo is None or (is_traced(report) and not is_current(cargo.trace)):
            raise ValueError(
                "This report belongs to a trace that has ended. Return "
                "gradients.report from the jitted function that computes the "
                "gradients, beside whatever else it returns."
            )
        return report

    def replace(self, gradients: optax.Updates) -> "SharpnessAwareGradients":
        """The same with another tree in the place of d, of the same structure.

        This is the way back from `gradients`, for what `jax.tree.map` over one tree
        cannot do, such as a sum of d and another tree.
        """
        mismatch = _tree.mismatch(gradients, self.gradients)
        if mismatch:
            raise ValueError(
                "The gradients must keep their structure and shapes. In the new ones, "
                f"{mismatch}."
            )
        return self._with(gradients, self._cargo)

    def __contains__(self, key: Any) -> bool:
        # Flax asks whether a collection of its own is among the gradients.
        del key
        return False

    def __getitem__(self, key: Any) -> Any:
        raise TypeError(
            f"These gradients carry more than the tree: take grads.gradients[{key!r}]."
        )

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"SharpnessAwareGradients have no {name!r}. The tree of gradients itself "
            "is grads.gradients."
        )

    def __repr__(self) -> str:
        return f"SharpnessAwareGradients({self.gradients!r})"

    def unpack(self, recipe: Recipe, state: Any) -> tuple[optax.Updates, Any]:
        """(d, next SAM state), for a transformation of this recipe in this state.

        Raises outside of the trace that computed them, for another transformation, and
        for another state than they were computed for.
        """
        cargo = self._cargo
        if cargo is None or not is_current(cargo.trace):
            raise ValueError(
                "These gradients come from another trace: sam_value_and_grad and "
                "tx.update ran in different jitted functions. The gradients carry the "
                "next SAM state, so call both in the same jitted function; do not "
                "return the gradients from one and pass them to another. (If you have "
                "rebuilt them from leaves and structure, keep the gradients themselves "
                "until then.)"
            )
        difference = first_difference(cargo.recipe, recipe)
        mismatch = _tree.mismatch(cargo.before, state)
        if difference or mismatch:
            remedy = (
                ". Pass the same object to sam_value_and_grad that starts the chain."
            )
            if any(word in str(difference) for word in ("traced value", "Array(")):
                remedy += (
                    " If optax.inject_hyperparams builds the whole chain, inject the "
                    "SAM transformation by itself: sam = "
                    "optax.inject_hyperparams(sam_optax.sam)(rho=0.05)."
                )
            raise ValueError(
                "These gradients were made by another SAM transformation than the one "
                "that takes them in tx.update. The two differ in "
                + (difference or f"their state, where {mismatch}")
                + remedy
            )
        if _handed_out.is_another(state, cargo.before):
            raise ValueError(
                "These gradients were computed for another optimizer state than the "
                "one that tx.update was given. Pass the current state both as "
                "opt_state= and to tx.update, and use the gradients of a step for one "
                "update only."
            )
        _handed_out.add(cargo.state)
        return self.gradients, cargo.state

    # The children are those of d's first node, so that paths are those of d.

    def _is_child(self, node: Any) -> bool:
        return node is not self.gradients

    def tree_flatten(self):
        children, structure = jax.tree.flatten(self.gradients, is_leaf=self._is_child)
        return children, (self._label, structure)

    def tree_flatten_with_keys(self):
        pairs, structure = jax.tree_util.tree_flatten_with_path(
            self.gradients, is_leaf=self._is_child
        )
        array = jax.tree_util.GetAttrKey("gradients")
        keyed = [(path[0] if path else array, child) for path, child in pairs]
        return keyed, (self._label, structure)

    @property
    def _label(self) -> _Label | None:
        return None if self._cargo is None else self._cargo.label

    @classmethod
    def tree_unflatten(cls, aux: tuple[_Label | None, Any], children):
        label, structure = aux
        cargo = None if label is None else label.cargo()
        return cls._with(structure.unflatten(children), cargo)

    @classmethod
    def _with(cls, gradients: Any, cargo: _Cargo | None) -> "SharpnessAwareGradients":
        if cargo is not None and is_traced(gradients) and not cargo.was_traced:
            raise ValueError(
                "These gradients were computed outside of a jitted function (or of "
                "jax.lax.cond, jax.lax.scan, jax.vmap and the like) and handed to it. "
                "They carry the next SAM state, which is not an argument of that "
                "function. Call sam_value_and_grad and tx.update in the same function; "
                "to pass on the values alone, pass grads.gradients."
            )
        carrier = object.__new__(cls)
        carrier.gradients, carrier._cargo = gradients, cargo
        return carrier


class ReportSlot:
    """Receives the report of a step from the update, for whoever called it.

    Attributes:
      value: the `Report`, once the update has run, inside the same trace.
    """

    _subject = "report"

    def __init__(self) -> None:
        self._value: Any = None
        self._is_filled = False
        self._trace: Any = None

    def __call__(self, value: Any) -> None:
        self._value, self._is_filled = value, True
        self._trace = current_traces()[0]

    @property
    def value(self) -> Any:
        if not self._is_filled:
            raise ValueError(
                f"There is no {self._subject} yet: pass the extra arguments on to "
                "tx.update, and read it afterwards."
            )
        if is_traced(self._value) and not is_current(self._trace):
            raise ValueError(
                f"The {self._subject} belongs to another trace. Read it in the jitted "
                "function that runs tx.update, and return it from there. If the SAM "
                "transformation is inside of optax.MultiSteps or "
                "optax.apply_if_finite, put it around these, first in the chain."
            )
        return self._value


class ValueSlot(ReportSlot):
    """Receives the loss at the perturbed point from the update.

    Attributes:
      value: the loss, or (loss, aux), once the update has run, inside the same trace.
    """

    _subject = "loss"

    def __init__(self, has_aux: bool) -> None:
        super().__init__()
        self._has_aux = has_aux

    def __call__(self, value: Any) -> None:
        super().__call__(value if self._has_aux else value[0])


# --- Whether a tracer that is kept in Python still belongs to the current trace.


def is_traced(tree: Any) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def current_traces() -> list[weakref.ref]:
    """The current trace and those it is nested in, innermost first."""
    with jax_core.take_current_trace() as trace:
        traces = []
        while trace is not None:
            traces.append(weakref.ref(trace))
            trace = getattr(trace, "parent_trace", None)
        return traces


def is_current(trace: weakref.ref) -> bool:
    """Whether a trace is the current one, or one that it is nested in."""
    return any(now() is trace() for now in current_traces())
