"""Several solutions, measured in the same way and shown side by side."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from sam_optax.sharpness._ball import Sharpness
from sam_optax.sharpness._estimate import Estimate
from sam_optax.sharpness._printing import number, table
from sam_optax.sharpness._spectrum import Eigenpairs


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison:
    """What several measures say of several solutions; it prints as a table.

    Attributes:
      values: `values[solution][measure]`, by name: a float, or an `Estimate` of floats
        for a measure that is a mean of random samples.
    """

    values: dict[str, dict[str, float | Estimate]]

    def __repr__(self) -> str:
        measures = list(next(iter(self.values.values())))
        cells = [["", *self.values]]
        for measure in measures:
            cells.append(
                [measure, *(_text(row[measure]) for row in self.values.values())]
            )
        return table(cells)


def compare(
    solutions: Mapping[str, Any], measures: Mapping[str, Callable[[Any], Any]]
) -> Comparison:
    r"""Applies every measure to every solution, and shows the results side by side.

    .. math::
      t_{ij} = \mathrm{measure}_i(w_j)

    Args:
      solutions: the parameters w_j by name.
      measures: functions of the parameters by name. Each returns one number or a result
        of this module. Of a `Sharpness`, its `sharpness` is taken, and of `Eigenpairs`
        the first eigenvalue. An `Estimate` is shown with its standard error.

    Returns:
      A `Comparison`. Its `values` are plain floats, or `Estimate`s where a measure
      returns one. `pandas.DataFrame(comparison.values)` makes a table of them.

    Raises:
      ValueError: if there are no solutions or no measures.
      TypeError: if a measure is not a function, or returns something else.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sam_optax import sharpness
      >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> def loss_fn(w, x):
      ...     return jnp.mean((x @ w) ** 2)
      >>> sharpness.compare(
      ...     {"start": jnp.ones(2), "end": jnp.array([1.0, 0.0])},
      ...     {
      ...         "loss": lambda w: loss_fn(w, x),
      ...         "worst case": lambda w: sharpness.worst_case(loss_fn, w, x, rho=0.1),
      ...         "trace": lambda w: sharpness.trace(sharpness.hessian(loss_fn, w, x)),
      ...     },
      ... )
                   start     end
      loss             5     0.5
      worst case  0.9501   0.105
      trace       10 ± 0  10 ± 0

    Cost: that of each measure, for each solution.
    """
    if not solutions or not measures:
        raise ValueError("There must be at least one solution and one measure.")
    for name, measure in measures.items():
        if not callable(measure):
            raise TypeError(
                f"The measure {name!r} must be a function of the parameters, got "
                f"{measure!r}. For example: lambda w: sharpness.worst_case(loss_fn, w, "
                "data, rho=0.1)."
            )
    return Comparison(
        {
            solution: {
                name: _one_number(name, measure(params))
                for name, measure in measures.items()
            }
            for solution, params in solutions.items()
        }
    )


def _one_number(name: str, result: Any) -> float | Estimate:
    if isinstance(result, Estimate):
        numbers: Any = map(float, result)
        return Estimate(*numbers)
    if isinstance(result, Sharpness):
        result = result.sharpness
    elif isinstance(result, Eigenpairs):
        result = result.values[0]
    is_number = isinstance(result, (int, float, jax.Array, np.ndarray, np.generic))
    if not is_number or np.ndim(result) != 0:
        raise TypeError(
            f"The measure {name!r} must return one number, or a Sharpness, an Estimate "
            f"or Eigenpairs; it returned {result!r}."
        )
    return float(result)


def _text(value: Any) -> str:
    if isinstance(value, Estimate):
        error = number(value.standard_error, digits=2)
        return f"{number(value.mean, digits=4)} ± {error}"
    return number(value, digits=4)
