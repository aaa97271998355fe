"""Groups of devices: the mapped axes of a pmap or shard_map."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sam_optax import _sharding as sharding
from sam_optax._doors.groups import PathOfGroup, PerGroup
from sam_optax._step.inputs import Choice, Pass


class Axis(NamedTuple):
    """The mapped axes of the devices, and over which of them a perturbation is shared.

    Attributes:
      names: all of them.
      shared: those along which devices have one perturbation.
      index_groups: along a single axis, the devices that have one; or None.
    """

    names: tuple[str, ...]
    shared: tuple[str, ...]
    index_groups: tuple[tuple[int, ...], ...] | None

    @property
    def is_one_group(self) -> bool:
        """Whether all devices share a perturbation."""
        return self.shared == self.names and self.index_groups is None

    def check(self) -> None:
        """What can be known of the axis only where it is mapped."""
        for name in self.names:
            try:
                jax.lax.axis_size(name)
            except NameError as error:
                raise ValueError(
                    f"axis_name={name!r} is not an axis of the pmap or shard_map that "
                    "this runs in. Pass the name that is given there; under jit with "
                    "sharded arrays, and on one device, leave axis_name= out."
                ) from error
        if self.index_groups is None:
            return
        size, grouped = jax.lax.axis_size(self.names), sum(map(len, self.index_groups))
        if size != grouped:
            raise ValueError(
                f"axis_index_groups must hold every index of the axis: it has {size}, "
                f"and the lists {grouped}."
            )

    def check_params(self, params: Any) -> None:
        """Refuses parameters of which each device has a part, where types say so."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            different = sorted(sharding.varying_axes(leaf) & set(self.names))
            if different:
                raise ValueError(
                    f"params{jax.tree_util.keystr(path)} differs along the axis "
                    f"{different[0]!r}, over which axis_name= averages gradients, so "
                    "those of different parts of the parameters would be mixed. Give "
                    "each device of this axis whole parameters (in_specs P()), or "
                    "shard them under jit, without axis_name=. If they are whole and "
                    "equal, take the mark away: jax.lax.pmean(params, axis)."
                )

    def vary(self, tree: Any) -> Any:
        """Marks values that are equal on all devices as if they were not.

        Under `shard_map` with its check of varying axes, the gradient of parameters
        that are known to be equal arrives summed over the axis. We need each device's
        own.
        """

        return sharding.vary(tree, self.names)

    def mean(self, tree: Any) -> Any:
        """Over all devices."""
        return self._mean(tree, self.names, None)

    def shared_mean(self, tree: Any) -> Any:
        """Over the devices that share a perturbation."""
        if self.index_groups is not None:
            return self._mean(tree, self.names, self.index_groups)
        return self._mean(tree, self.shared, None) if self.shared else tree

    def _mean(self, tree, names, index_groups):
        # JAX refuses a mean over several axes if the value varies over some of them
        # only.
        return jax.lax.pmean(self.vary(tree), names, axis_index_groups=index_groups)

    def group(self) -> jax.Array:
        """The number of this device's group."""
        if self.index_groups is not None:
            group_of = np.empty(sum(map(len, self.index_groups)), np.int32)
            for group, devices in enumerate(self.index_groups):
                group_of[list(devices)] = group
            return jnp.asarray(group_of)[jax.lax.axis_index(self.names)]
        own = tuple(name for name in self.names if name not in self.shared)
        return jax.lax.axis_index(own)


def check_loss_is_averaged_once(axis: Axis, loss: jax.Array) -> None:
    """Refuses a loss that is averaged over the axis already.

    Parameters that vary over an axis make a loss that does so too, unless loss_fn takes
    a mean over it. Types say what varies under `shard_map` with its check of varying
    axes, and nothing elsewhere.
    """
    seen_by_types = sharding.varying_axes(axis.vary(jnp.zeros(())))
    averaged = sorted(seen_by_types - sharding.varying_axes(loss))
    if averaged:
        raise ValueError(
            f"loss_fn returns a loss that is equal along the axis {averaged[0]!r}, as "
            "after jax.lax.pmean, and axis_name= averages over that axis as well: the "
            "gradient would come out too small. Return the loss of the device's own "
            "examples."
        )


def check_loss_is_averaged(loss: jax.Array, params: optax.Params) -> None:
    """Refuses a loss that nobody averages over an axis of a `shard_map`.

    JAX sums the gradients of replicated parameters over the axes along which the loss
    varies. The sum of means is too large by the number of devices.
    """
    kept = [sharding.varying_axes(leaf) for leaf in jax.tree.leaves(params)]
    summed = sharding.varying_axes(loss).difference(*kept)
    if summed:
        raise ValueError(
            f"The loss differs along the axis {min(summed)!r} of a shard_map, and the "
            "parameters do not: JAX would sum their gradients over it. Pass "
            f"axis_name={min(summed)!r}, beside any other axis. Or let loss_fn return "
            "what is equal on all devices: jax.lax.pmean of the loss, or jax.lax.psum "
            "of each device's share of it."
        )


def over_devices(
    axis: Axis, here: Choice, per_group_here: PerGroup | None, groups_here: int
) -> tuple[Choice, PerGroup | None]:
    """What the devices of an axis see together, from what one of them sees."""
    check_loss_is_averaged_once(axis, here.seen.loss)
    own = here.map(lambda evaluate: lambda point: evaluate(axis.vary(point)))

    def averaged(mean: Callable[[Any], Any]) -> Choice:
        def mean_pass(there: Pass) -> Pass:
            # The auxiliary output stays that of the device.
            return mean(there._replace(aux=None))._replace(aux=there.aux)

        return own.map(lambda evaluate: lambda point: mean_pass(evaluate(point)))

    def per_group(path: PathOfGroup) -> Any:
        def follow(g, choice, index):
            return path(g, choice, axis.group() * groups_here + index)

        if per_group_here is not None:
            return axis.mean(per_group_here(follow))
        shared_g = axis.shared_mean(own.seen.gradient)
        return axis.mean(follow(shared_g, averaged(axis.shared_mean), 0))

    seen = own.seen._replace(
        loss=axis.mean(own.seen.loss), gradient=axis.mean(own.seen.gradient)
    )
    choice = averaged(axis.mean).replace(seen=seen, averaged_over=axis.names)
    return choice, None if axis.is_one_group else per_group
