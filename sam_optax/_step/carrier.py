"""What `sam_value_and_grad` returns as gradients, and the transformation unpacks."""

import weakref
from typing import Any

import jax
import optax
from jax.core import Tracer
from jax.extend import core as jax_core

from sam_optax import _tree
from sam_optax._step.report import Report


class _Cargo:
    """State and report of one step. Equal to itself only, and never a pytree leaf."""

    def __init__(self, state: Any, report: Report | None, was_traced: bool):
        self.state = state
        self.report = report
        self.was_traced = was_traced
        self.trace = current_traces()[0]


@jax.tree_util.register_pytree_node_class
class SharpnessAwareGradients:
    """The sharpness-aware gradient d, which carries the next SAM state as aux data.

    To everything that handles gradients this is the tree d: norms, `jax.tree.map`,
    `lax.pmean` and unscaling of the loss act on d alone. The SAM transformation in the
    optimizer chain takes d and its own next state out of it. Both must happen in the
    same jitted function.

    Attributes:
      gradients: d, with the structure of the parameters.
      report: a `Report` if `sam_value_and_grad` was built with `report=True`, or None.
    """

    def __init__(
        self, gradients: optax.Updates, state: Any, report: Report | None = None
    ):
        self.gradients = gradients
        self._cargo = _Cargo(state, report, is_traced(gradients))

    @property
    def report(self) -> Report | None:
        report = self._cargo.report
        if is_traced(report) and not is_current(self._cargo.trace):
            raise ValueError(
                "This report belongs to a trace that has ended. Return "
                "gradients.report from the jitted function that computes the "
                "gradients, beside whatever else it returns."
            )
        return report

    def __contains__(self, key: Any) -> bool:
        # Flax asks whether a collection of its own is among the gradients.
        del key
        return False

    def __repr__(self) -> str:
        return f"SharpnessAwareGradients({self.gradients!r})"

    def unpack(self, like: Any) -> tuple[optax.Updates, Any]:
        """(d, next SAM state), for a transformation with a state like this one.

        Raises outside of the trace that computed them, and for the state of another
        method. Two transformations that differ in a number only look alike here.
        """
        cargo = self._cargo
        became_argument = is_traced(self.gradients) and not cargo.was_traced
        if became_argument or not is_current(cargo.trace):
            raise ValueError(
                "These gradients come from another trace: sam_value_and_grad and "
                "tx.update ran in different jitted functions. The gradients carry the "
                "next SAM state, so call both in the same jitted function; do not "
                "return the gradients from one and pass them to another."
            )
        if _tree.outline(cargo.state) != _tree.outline(like):
            raise ValueError(
                "These gradients were made by another SAM transformation than the one "
                "that unpacks them, or for other parameters. Pass the same object to "
                "sam_value_and_grad that starts the optimizer chain."
            )
        return self.gradients, cargo.state

    def tree_flatten(self):
        return (self.gradients,), self._cargo

    @classmethod
    def tree_unflatten(cls, cargo: _Cargo, children):
        gradients = object.__new__(cls)
        (gradients.gradients,) = children
        gradients._cargo = cargo
        return gradients


class ReportSlot:
    """Receives the report of a step from the update, for whoever called it.

    Attributes:
      value: the `Report`, once the update has run, inside the same trace.
    """

    def __init__(self) -> None:
        self._report: Report | None = None
        self._trace: Any = None

    def __call__(self, report: Report) -> None:
        self._report = report
        self._trace = current_traces()[0]

    @property
    def value(self) -> Report:
        if self._report is None:
            raise ValueError(
                "There is no report yet: pass this slot on to tx.update (as the extra "
                "argument report=), and read its value afterwards."
            )
        if is_traced(self._report) and not is_current(self._trace):
            raise ValueError(
                "The report belongs to another trace. Read it in the jitted function "
                "that runs tx.update, and return it from there. If the SAM "
                "transformation is inside of optax.MultiSteps or "
                "optax.apply_if_finite, put it around these, first in the chain."
            )
        return self._report


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
