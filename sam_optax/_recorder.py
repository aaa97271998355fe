"""A record of training: what `report=True` measures, kept step after step."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sam_optax._checks import is_integer
from sam_optax._step import Report

_KEPT_ON_DEVICE = 1000


class Recorder:
    """Keeps the losses and reports of training steps, or hands them to a logger.

    The reports come from `sam_value_and_grad(..., report=True)`. They stay on the
    device at first, so that adding one does not wait for the step to end. They come to
    the host when you call `arrays`, or after a thousand or more later steps. If a
    jitted step does not return its report, the report costs nothing: the compiled step
    is then the same as without `report=True`.

    Args:
      log: a function that is called for each step with its number and a dict of floats,
        for example `lambda step, values: writer.write_scalars(step, values)`. With it,
        `add` waits for the step to end. Default None: nothing is called.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> sam = sam_optax.sam(rho=0.1)
      >>> tx = optax.chain(sam, optax.sgd(0.1))
      >>> loss_and_grads = sam_optax.sam_value_and_grad(
      ...     lambda w: jnp.sum(w**2), sam, report=True)
      >>> @jax.jit
      ... def step(w, opt_state):
      ...     loss, grads = loss_and_grads(w, opt_state=opt_state)
      ...     updates, opt_state = tx.update(grads, opt_state, w)
      ...     return optax.apply_updates(w, updates), opt_state, loss, grads.report
      >>> w = jnp.array([3.0, 4.0])
      >>> opt_state, recorder = tx.init(w), sam_optax.Recorder()
      >>> for _ in range(3):
      ...     w, opt_state, loss, report = step(w, opt_state)
      ...     recorder.add(loss, report)
      >>> print(recorder.arrays()["surrogate_gap"].round(3))
      [1.01  0.806 0.643]

      Columns of your own have the names that you give them:

      >>> recorder = sam_optax.Recorder()
      >>> recorder.add(loss, report, learning_rate=0.1, accuracy=jnp.float32(0.9))
      >>> print(recorder.arrays()["learning_rate"])
      [0.1]
    """

    def __init__(self, log: Callable[[int, dict[str, float]], Any] | None = None):
        if log is not None and not callable(log):
            raise TypeError(
                f"log must be a function of the step and a dict, got {log!r}."
            )
        self._log = log
        self._steps: list[np.ndarray] = []
        self._values: list[dict[str, Any]] = []
        self._next_step = 0
        self._pending = 0  # how many of the values may be on the device
        self._columns: tuple[str, ...] | None = None  # the user's, from the first step

    def add(
        self,
        loss: Any,
        report: Report,
        *,
        step: int | jax.Array | None = None,
        **columns: Any,
    ) -> None:
        """Records a step, or several that a `jax.lax.scan` has stacked.

        Args:
          loss: the loss at the parameters; shape (), or (steps,) from a scan.
          report: `grads.report` of the step, with leaves of the same shape.
          step: the number of the step, or of the first of several. A JAX integer waits
            for the step that computes it. Default None: one more than the last.
          columns: further numbers of the step by name, such as `accuracy=accuracy`, of
            the same shape as the loss. Every step must have the same columns.

        Raises:
          TypeError: if report is not a `Report`, which happens without `report=True`,
            or a column does not hold real numbers.
          ValueError: if loss, report and columns do not hold the same number of steps;
            if they hold a value for each device, as `pmap` returns them; if a column
            has the name of a field, or the columns differ from those of earlier steps.
        """
        if not isinstance(report, Report):
            raise TypeError(
                "report must be the report of a step; got "
                f"{report!r}. Build the step with sam_value_and_grad(..., report=True) "
                "and return grads.report from it."
            )
        values = {"loss": loss, **report._asdict()}
        self._check_columns(columns, values)
        values |= columns
        shape = _shape_of_steps(values)
        step = None if step is None else _as_integer(step)
        self._columns = tuple(columns)
        first = self._next_step if step is None else step
        steps = np.arange(first, first + math.prod(shape))
        self._next_step = first + len(steps)
        self._keep(steps, values)
        if self._log is not None:
            rows = {name: np.atleast_1d(x) for name, x in values.items()}
            for i, number in enumerate(steps):
                self._log(int(number), {name: float(x[i]) for name, x in rows.items()})

    def _keep(self, steps: np.ndarray, values: dict[str, Any]) -> None:
        self._steps.append(steps)
        self._values.append(values)
        self._pending += 1
        if self._pending == 2 * _KEPT_ON_DEVICE:
            # The older half has long been computed, so this does not wait.
            old = slice(-2 * _KEPT_ON_DEVICE, -_KEPT_ON_DEVICE)
            self._values[old] = jax.device_get(self._values[old])
            self._pending = _KEPT_ON_DEVICE

    def _check_columns(self, columns: dict[str, Any], values: dict[str, Any]) -> None:
        for name in columns:
            if name in values:
                raise ValueError(
                    f"A column cannot be called {name!r}: that is a field of the "
                    "record. Give it another name."
                )
        if self._columns is None:
            return
        missing = [name for name in self._columns if name not in columns]
        unknown = [name for name in columns if name not in self._columns]
        if missing or unknown:
            raise ValueError(
                "Every step must have the same columns, those of the first: "
                f"{list(self._columns)}. Here {missing} are missing, and {unknown} are "
                "new. Where a step has no value, pass float('nan')."
            )

    def __len__(self) -> int:
        return sum(map(len, self._steps))

    def arrays(self) -> dict[str, np.ndarray]:
        """What was recorded: "step", "loss", the fields of `Report`, and the columns.

        Each has shape (steps,). A field is NaN for a step that did not ascend, and so
        could not measure it; the field "ascended" says which steps these are.
        """

        def join(parts):
            return np.concatenate([np.atleast_1d(part) for part in parts] or [[]])

        self._values, self._pending = jax.device_get(self._values), 0
        names = ("loss", *Report._fields, *(self._columns or ()))
        return {"step": join(self._steps)} | {
            name: join(values[name] for values in self._values) for name in names
        }


_REMEDY_FOR_DEVICES = (
    " If the first axis is that of the devices of a pmap, record the values of one "
    "device: recorder.add(*jax.tree.map(lambda x: x[0], (loss, report)))."
)


def _as_integer(step: Any) -> int:
    """A number of a step, also as the JAX array that a training state has."""
    if is_integer(step):
        return int(step)
    is_array = isinstance(step, jax.Array) and not isinstance(step, Tracer)
    if not is_array or step.shape or not jnp.issubdtype(step.dtype, jnp.integer):
        raise TypeError(f"step must be an integer, got {step!r}.")
    return int(step)


def _shape_of_steps(values: dict[str, Any]) -> tuple[int, ...]:
    """The shape that all values have, () or (steps,), after checks that they do."""
    if any(isinstance(value, Tracer) for value in values.values()):
        raise TypeError(
            "A Recorder keeps values, not tracers: return the loss and "
            "grads.report from the jitted function, and add them outside of it."
        )
    for name, value in values.items():
        _check_numbers(name, value)
    shapes = {np.shape(value) for value in values.values()}
    shape = max(shapes, key=len)
    if len(shapes) > 1 or len(shape) > 1:
        remedy = _REMEDY_FOR_DEVICES if len(shape) > 1 else ""
        raise ValueError(
            "The loss, the report and the columns must be of one step, all of "
            f"shape (), or of as many steps each; their shapes are {sorted(shapes)}."
            f"{remedy}"
        )
    return shape


def _check_numbers(name: str, value: Any) -> None:
    """Raises for what is not real numbers, and for one number for each device."""
    dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    is_real = jnp.issubdtype(dtype, jnp.number) or dtype == np.bool_
    if not is_real or jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"{name} must hold real numbers, got {value!r}.")
    if not isinstance(value, jax.Array) or value.ndim == 0:
        return
    if value.sharding.shard_shape(value.shape)[0] < len(value):
        raise ValueError(
            f"The first axis of {name} is spread over devices, as pmap returns it. It "
            f"holds a value for each device, not for each step.{_REMEDY_FOR_DEVICES}"
        )
