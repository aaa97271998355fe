"""The options that say which examples and devices share a perturbation."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sam_optax._checks import check_positive_integer
from sam_optax._doors.batch import Batch, DataRule, choose
from sam_optax._doors.devices import Axis, over_devices
from sam_optax._doors.groups import (
    MAPS,
    PerGroup,
    default_map,
    number_of_groups,
    over_groups,
)
from sam_optax._sharding import is_spread
from sam_optax._step.inputs import Choice


class Grouping(NamedTuple):
    """Which examples and devices share a perturbation; built by `make_grouping`."""

    m: int | None
    map_groups: str | None
    axis: Axis | None

    @property
    def is_one_group(self) -> bool:
        """Whether all examples share a perturbation, on all devices."""
        return self.m is None and (self.axis is None or self.axis.is_one_group)

    def _map_of(self, groups: int, params_are_spread: bool) -> str:
        if self.map_groups == "vmap" and params_are_spread:
            raise ValueError(
                "map_groups='vmap' does not work with parameters that are spread over "
                "a mesh of explicit axes: each group would need a layout of its own. "
                "Leave map_groups= out, or make the mesh with axis_types= "
                "jax.sharding.AxisType.Auto."
            )
        alone = self.axis is not None or params_are_spread
        return self.map_groups or default_map(groups, is_alone=alone)

    def choose(
        self, rule: DataRule, batch: Batch, params: Any
    ) -> tuple[Choice, PerGroup | None]:
        """The means over all groups, and the map over groups if there are several."""
        axis, groups = self.axis, 1
        if axis is not None:
            axis.check()
            axis.check_params(params)
            params = axis.vary(params)
        if self.m is None:
            choice, per_group = choose(rule, batch, params), None
        else:
            groups = number_of_groups(batch, self.m)
            how = self._map_of(groups, is_spread(params))
            vary = (lambda tree: tree) if axis is None else axis.vary
            choice, per_group = over_groups(batch, params, rule, self.m, how, vary)
        if axis is None:
            return choice, per_group
        return over_devices(axis, choice, per_group, groups)


def make_grouping(
    m: int | None = None,
    map_groups: str | None = None,
    axis_name: str | Sequence[str] | None = None,
    sync_perturbation: bool | str | Sequence[str] = True,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Grouping | None:
    """Checks the options; None if the whole batch on one device is the only group."""
    if map_groups is not None and map_groups not in MAPS:
        listed = ", ".join(map(repr, MAPS))
        raise ValueError(f"map_groups must be one of {listed}, got {map_groups!r}.")
    if m is None:
        if map_groups is not None:
            raise ValueError(
                "map_groups says how groups of m examples run: pass m= too."
            )
    else:
        check_positive_integer("m", m)
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())
    if not names:
        if sync_perturbation is not True or axis_index_groups is not None:
            raise ValueError(
                "sync_perturbation and axis_index_groups say which devices share a "
                "perturbation, along the mapped axis of a pmap or shard_map: pass its "
                "axis_name= too. Under jit with sharded arrays there is no such axis, "
                "and m= makes groups of examples."
            )
        return None if m is None else Grouping(m, map_groups, None)
    return Grouping(
        m, map_groups, _make_axis(m, names, sync_perturbation, axis_index_groups)
    )


def _make_axis(
    m: int | None,
    names: tuple[str, ...],
    sync_perturbation: Any,
    axis_index_groups: Any,
) -> Axis:
    index_groups = None
    if axis_index_groups is not None:
        index_groups = tuple(tuple(group) for group in axis_index_groups)
        devices = sorted(device for group in index_groups for device in group)
        if devices != list(range(len(devices))) or len(set(map(len, index_groups))) > 1:
            raise ValueError(
                "axis_index_groups must be lists of one length that hold every index "
                f"of the axis once, got {axis_index_groups!r}."
            )
        if len(names) > 1 or sync_perturbation is not True:
            raise ValueError(
                "axis_index_groups are groups of devices along one axis_name, which "
                "share a perturbation; it does not go with sync_perturbation."
            )
        shared = names
    elif isinstance(sync_perturbation, bool):
        shared = names if sync_perturbation else ()
    else:
        wanted = sync_perturbation
        wanted = (wanted,) if isinstance(wanted, str) else tuple(wanted)
        if not set(wanted) <= set(names):
            raise ValueError(
                "sync_perturbation must be True, False, or some of the names in "
                f"axis_name, {names}, got {sync_perturbation!r}."
            )
        shared = tuple(name for name in names if name in wanted)
    if m is not None and shared:
        raise ValueError(
            "m= gives groups of examples their own perturbations, and devices are to "
            "share theirs: pass sync_perturbation=False with m= and axis_name=."
        )
    return Axis(names, shared, index_groups)
