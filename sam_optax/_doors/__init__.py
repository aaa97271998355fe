"""The doors: from loss_fn to g, and through the update of a transformation."""

from sam_optax._doors.value_and_grad import sam_value_and_grad as sam_value_and_grad
from sam_optax._doors.value_and_grad import (
    value_and_ascent_grad as value_and_ascent_grad,
)
