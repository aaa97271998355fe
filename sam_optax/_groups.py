"""Groups of examples and of devices: what a step sees, and what is averaged when.

One group of examples has one perturbation. A `Look` is all that a step knows of its
examples; it begins on one group, and is widened to groups of m examples on a device
and then over the devices of an axis. The core sees the result: a mean gradient, a
function for further ones, and the map that runs the path from g to d once per group.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sam_optax import _tree
from sam_optax._batch import Batch
from sam_optax._core import Evaluation
from sam_optax._data import DataRule
from sam_optax._hyperparameters import check_positive_integer

Path = Callable[[Any, Callable[[Any], Evaluation], Any], Any]


class Grouping(NamedTuple):
    """Which examples and devices share a perturbation; built by `make_grouping`."""

    m: int | None
    how: str | None
    axis: "Axis | None"

    def look(self, batch: Batch, params: Any, rule: DataRule) -> "Look":
        """What a step sees of its examples."""
        if self.axis is None:
            return self._look_here(batch, params, rule, lambda tree: tree)
        own = self.axis.vary(params)
        here = self._look_here(batch, own, rule, self.axis.vary)
        return look_across(self.axis, here)

    def _look_here(self, batch, params, rule, vary):
        if self.m is None:
            return look_at(batch, params, rule)
        return look_in_groups(batch, params, rule, self.m, self.how, vary)


def make_grouping(
    m: Any,
    map_groups: Any,
    axis_name: Any,
    sync_perturbation: Any,
    axis_index_groups: Any,
) -> Grouping:
    """Checks what does not go together."""
    if map_groups is not None and map_groups not in _MAPS:
        listed = ", ".join(map(repr, _MAPS))
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
        return Grouping(m, map_groups, None)
    return Grouping(
        m, map_groups, _make_axis(m, names, sync_perturbation, axis_index_groups)
    )


def _make_axis(m, names, sync_perturbation, axis_index_groups) -> "Axis":
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


class Look(NamedTuple):
    """What a step sees of its examples.

    Attributes:
      loss: at the parameters.
      aux: auxiliary output there.
      gradient: g there.
      evaluate: point -> gradient and losses for the descent.
      recompute: whether g is not the gradient to descend on; see `Choice`.
      per_group: path -> the mean of `path(g_i, evaluate_i, i)` over groups, or None if
        there is but one.
      groups: how many there are.
    """

    loss: jax.Array
    aux: Any
    gradient: Any
    evaluate: Callable[[Any], Evaluation]
    recompute: bool
    per_group: Callable[[Path], Any] | None = None
    groups: int = 1


def look_at(batch: Batch, params: Any, rule: DataRule) -> Look:
    """All examples as one group."""
    choice = rule(batch, params)

    def evaluate(point):
        chosen = choice.descent(point)
        there, seen = chosen.gradient(point), choice.seen
        here = seen if seen.batch is chosen else chosen.forward(params)
        return Evaluation(there.gradient, there.loss, here.loss)

    seen = choice.seen
    return Look(seen.loss, seen.aux, choice.ascent_gradient, evaluate, choice.recompute)


# --- Groups of m examples on one device.


def look_in_groups(
    batch: Batch,
    params: Any,
    rule: DataRule,
    m: int,
    how: str | None,
    vary: Callable[[Any], Any],
) -> Look:
    """Groups of m examples each, in the order of the batch."""
    if batch.size % m:
        raise ValueError(
            f"m must divide the batch: {batch.size} examples do not make groups of {m}."
        )
    count = batch.size // m
    how = default_map(count) if how is None else how
    mean_over = functools.partial(_MAPS[how], count=count, vary=vary)
    stacked = [
        jax.tree.map(lambda x: x.reshape(count, m, *x.shape[1:]), tree)
        for tree in batch.examples
    ]
    recompute = False

    def look(examples):
        nonlocal recompute
        one = look_at(batch.replace(examples), params, rule)
        recompute = one.recompute
        return one

    # One after another, groups are there to save memory, so that the gradient of each
    # is not kept for its path, but taken again.
    keeps = how != "scan"

    def first(examples):
        one = look(examples)
        if keeps:
            return None, (one.loss, one.aux, one.gradient)
        return one.gradient, (one.loss, one.aux, None)

    gradient, (losses, aux, gradients) = mean_over(first, stacked)
    if keeps:
        gradient = jax.tree.map(lambda x: jnp.mean(x, axis=0), gradients)

    def evaluate(point):
        return mean_over(lambda e: (look(e).evaluate(point), None), stacked)[0]

    def per_group(path):
        def follow(examples, g, index):
            one = look(examples)
            return path(one.gradient if g is None else g, one.evaluate, index), None

        indices = _like_first_axis(jnp.arange(count), stacked)
        return mean_over(follow, stacked, gradients, indices)[0]

    loss = jnp.mean(losses)
    return Look(loss, aux, gradient, evaluate, recompute, per_group, count)


def default_map(count: int) -> str:
    """How groups run if nothing is said, by what `benchmarks/groups.py` measures.

    Over several devices, a loop would take the groups of one device after those of
    another. On one, each group in a program of its own is fastest, as long as compiling
    that many is bearable.
    """
    if jax.device_count() > 1:
        return "vmap"
    return "unroll" if count <= 16 else "scan"


def _like_first_axis(indices: jax.Array, examples: Any) -> jax.Array:
    """Laid out over the devices as the examples are.

    Under a mesh with explicit axes, everything that is mapped must be, and there the
    layout is part of the type. With automatic axes the type names none.
    """
    for leaf in jax.tree.leaves(examples):
        sharding = jax.typeof(leaf).sharding
        axes = sharding.spec[0] if len(sharding.spec) else None
        if axes is not None:
            spec = jax.sharding.PartitionSpec(axes)
            return jax.sharding.reshard(
                indices, jax.sharding.NamedSharding(sharding.mesh, spec)
            )
    return indices


def _together(function, *trees, count, vary):
    del count, vary
    averaged, stacked = jax.vmap(function)(*trees)
    return jax.tree.map(_mean_over_groups, averaged), stacked


def _unrolled(function, *trees, count, vary):
    del vary
    results = [
        function(*jax.tree.map(lambda x, i=i: x[i], trees)) for i in range(count)
    ]
    averaged, stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *results)
    return jax.tree.map(_mean_over_groups, averaged), stacked


def _one_after_another(function, *trees, count, vary):
    shapes, _ = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], trees))

    def body(total, slices):
        averaged, stacked = function(*slices)
        return jax.tree.map(jnp.add, total, averaged), stacked

    start = vary(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))
    total, stacked = jax.lax.scan(body, start, trees)
    return jax.tree.map(lambda x: x / count if _tree.is_inexact(x) else x, total), (
        stacked
    )


_MAPS = {"vmap": _together, "unroll": _unrolled, "scan": _one_after_another}


def _mean_over_groups(x: jax.Array) -> jax.Array:
    # Counters and keys have no mean; the core does not ask for it.
    return jnp.mean(x, axis=0) if _tree.is_inexact(x) else x[0]


# --- Groups of devices.


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

    def vary(self, tree: Any) -> Any:
        """Marks what is equal on all devices as if it were not.

        Under `shard_map` with its check of varying axes, the gradient of parameters
        that are known to be equal arrives summed over the axis. We need each device's
        own.
        """

        def vary_leaf(x):
            for name in self.names:
                with contextlib.suppress(ValueError):  # where it varies already
                    x = jax.lax.pcast(x, name, to="varying")
            return x

        return jax.tree.map(vary_leaf, tree)

    def mean(self, tree: Any) -> Any:
        """Over all devices."""
        return self._mean(tree, self.names, None)

    def shared_mean(self, tree: Any) -> Any:
        """Over the devices that share a perturbation."""
        if self.index_groups is not None:
            return self._mean(tree, self.names, self.index_groups)
        return self._mean(tree, self.shared, None) if self.shared else tree

    def _mean(self, tree, names, index_groups):
        def mean_leaf(x):
            if not _tree.is_inexact(x):
                return x
            return jax.lax.pmean(x, names, axis_index_groups=index_groups)

        # JAX takes no mean over axes of which some are varied over, and some are not.
        return jax.tree.map(mean_leaf, self.vary(tree))

    def group(self) -> jax.Array:
        """The number of this device's group."""
        if self.index_groups is not None:
            group_of = np.empty(sum(map(len, self.index_groups)), np.int32)
            for group, devices in enumerate(self.index_groups):
                group_of[list(devices)] = group
            return jnp.asarray(group_of)[jax.lax.axis_index(self.names)]
        own = tuple(name for name in self.names if name not in self.shared)
        return jax.lax.axis_index(own)


def look_across(axis: Axis, here: Look) -> Look:
    """What the devices of an axis see together, from what one of them does."""

    def evaluate_here(point):
        return here.evaluate(axis.vary(point))

    def evaluate(point):
        return axis.mean(evaluate_here(point))

    def per_group(path):
        def follow(g, evaluate, index):
            return path(g, evaluate, axis.group() * here.groups + index)

        if here.per_group is not None:
            return axis.mean(here.per_group(follow))
        shared_g = axis.shared_mean(here.gradient)
        return axis.mean(
            follow(shared_g, lambda point: axis.shared_mean(evaluate_here(point)), 0)
        )

    is_one_group = axis.shared == axis.names and axis.index_groups is None
    return here._replace(
        loss=axis.mean(here.loss),
        gradient=axis.mean(here.gradient),
        evaluate=evaluate,
        per_group=None if is_one_group else per_group,
    )
