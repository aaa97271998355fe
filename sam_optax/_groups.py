"""Groups of examples and of devices: what a step sees, and what is averaged when.

One group of examples has one perturbation. A `Look` is all that a step knows of its
examples; it begins on one group, and is widened to groups of m examples on a device
and then over the devices of an axis. The core sees the result: a mean gradient, a
function for further ones, and the map that runs the path from g to d once per group.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sam_optax import _layout as layout
from sam_optax import _tree
from sam_optax._batch import Batch
from sam_optax._core import Evaluation, GradFn
from sam_optax._data import DataRule
from sam_optax._hyperparameters import check_positive_integer

Path = Callable[[Any, GradFn, Any], Any]


class Grouping(NamedTuple):
    """Which examples and devices share a perturbation; built by `make_grouping`."""

    m: int | None
    how: str | None
    axis: "Axis | None"

    def look(self, batch: Batch, params: Any, rule: DataRule) -> "Look":
        """What a step sees of its examples."""
        if self.axis is None:
            return self._look_here(batch, params, rule)
        self.axis.check()
        own = self.axis.vary(params)
        return look_across(self.axis, self._look_here(batch, own, rule))

    def _look_here(self, batch, params, rule):
        if self.m is None:
            return look_at(batch, params, rule)
        return look_in_groups(batch, params, rule, self.m, self.how, self.axis)


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
      grad_fn: gradients and losses elsewhere.
      per_group: path -> the mean of `path(g_i, grad_fn_i, i)` over groups, or None if
        there is but one.
      groups: how many there are.
    """

    loss: jax.Array
    aux: Any
    gradient: Any
    grad_fn: GradFn
    per_group: Callable[[Path], Any] | None = None
    groups: int = 1


def look_at(batch: Batch, params: Any, rule: DataRule) -> Look:
    """All examples as one group."""
    seen, ascent, descent, recompute = rule(batch, params)

    def evaluate(chosen, point):
        there = chosen.gradient(point)
        here = seen if seen.batch is chosen else chosen.forward(params)
        return Evaluation(there.gradient, there.loss, here.loss)

    is_taken = seen.batch is ascent and seen.gradient is not None
    g = seen.gradient if is_taken else ascent.gradient(params).gradient
    grad_fn = GradFn(
        descent=lambda point: evaluate(descent(point), point),
        ascent=lambda point: evaluate(ascent, point),
        recompute=recompute,
    )
    return Look(seen.loss, seen.aux, g, grad_fn)


# --- Groups of m examples on one device.


def look_in_groups(
    batch: Batch,
    params: Any,
    rule: DataRule,
    m: int,
    how: str | None,
    axis: "Axis | None",
) -> Look:
    """Groups of m examples each, in the order of the batch."""
    if batch.size % m:
        raise ValueError(
            f"m must divide the batch: {batch.size} examples do not make groups of {m}."
        )
    count = batch.size // m
    if how is None:
        how = default_map(count, is_mapped=axis is not None)
    groups = _MAPS[how](count, (lambda tree: tree) if axis is None else axis.vary)
    examples = groups.split(batch.examples)
    recomputes = []  # what the rule says, as soon as it has been traced

    def look(examples):
        one = look_at(batch.replace(examples), params, rule)
        recomputes.append(one.grad_fn.recompute)
        return one

    def first(examples):
        one = look(examples)
        kept = one.gradient if groups.keeps_gradients else None
        return one.gradient, (one.loss, one.aux, kept)

    gradient, each = groups.run(first, examples)
    losses, aux = groups.outputs(each)

    def mean_of(choose):
        def evaluate(point):
            return groups.run(lambda e: (choose(look(e))(point), None), examples)[0]

        return evaluate

    def per_group(path):
        def follow(examples, kept, index):
            one = look(examples)
            g = kept[2] if groups.keeps_gradients else one.gradient
            return path(g, one.grad_fn, index), None

        return groups.run(follow, examples, each, groups.indices(examples))[0]

    grad_fn = GradFn(
        descent=mean_of(lambda one: one.grad_fn.descent),
        ascent=mean_of(lambda one: one.grad_fn.ascent),
        recompute=recomputes[0],
    )
    return Look(jnp.mean(losses), aux, gradient, grad_fn, per_group, count)


def default_map(count: int, *, is_mapped: bool = False) -> str:
    """How groups run if nothing is said, by what `benchmarks/groups.py` measures.

    Over several devices under jit, a loop would take the groups of one device after
    those of another. Elsewhere all groups are on one device, where each in a program of
    its own is fastest, as long as compiling that many is bearable.
    """
    if jax.device_count() > 1 and not is_mapped:
        return "vmap"
    return "unroll" if count <= 16 else "scan"


class _Together:
    """Groups as a mapped axis."""

    keeps_gradients = True

    def __init__(self, count: int, vary: Callable[[Any], Any]):
        self.count, self.vary = count, vary

    def split(self, examples):
        """One value per group, in whatever form `run` takes them."""
        return self._split(examples, together=True)

    def _split(self, examples, together):
        def split_leaf(x):
            return layout.split(x, self.count, together=together)

        return jax.tree.map(split_leaf, examples)

    def indices(self, examples) -> Any:
        return layout.like_first_axis(jnp.arange(self.count), examples)

    def run(self, function, *values):
        """(mean of the first results over groups, the second results of each)."""
        averaged, each = jax.vmap(function)(*values)
        return _tree.mean_of_groups(averaged), each

    def outputs(self, each):
        """Of (loss, aux, gradient) of each group the first two, along a first axis."""
        return each[:2]


class _Unrolled(_Together):
    """Groups as a Python list. How many are in memory at a time, the compiler says."""

    def split(self, examples):
        stacked = self._split(examples, together=False)
        return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(self.count)]

    def indices(self, examples) -> Any:
        return list(range(self.count))

    def run(self, function, *values):
        like, first = function(*[value[0] for value in values])
        total, each = _tree.at_least_float32(like), [first]
        for group in zip(*[value[1:] for value in values], strict=True):
            averaged, kept = function(*group)
            total = jax.tree.map(_add, total, _tree.at_least_float32(averaged))
            each.append(kept)
        return self._mean(total, like), each

    def _mean(self, total, like):
        def mean(x, like):
            is_float = _tree.is_inexact(like)
            return jnp.asarray(x / self.count if is_float else x, _dtype(like))

        return jax.tree.map(mean, total, like)

    def outputs(self, each):
        own = [kept[:2] for kept in each]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)


class _OneAfterAnother(_Unrolled):
    """Groups as the steps of a loop, so that the gradient of each is not kept for its
    path, but taken again."""

    keeps_gradients = False

    def split(self, examples):
        return self._split(examples, together=False)

    def indices(self, examples) -> Any:
        return jnp.arange(self.count)

    def run(self, function, *values):
        like, _ = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], values))

        def body(total, group):
            averaged, kept = function(*group)
            return jax.tree.map(_add, total, _tree.at_least_float32(averaged)), kept

        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), like)
        start = self.vary(_tree.at_least_float32(zeros))
        total, each = jax.lax.scan(body, start, values)
        return self._mean(total, like), each

    def outputs(self, each):
        return each[:2]


def _add(total, x):
    return total + x if _tree.is_inexact(x) else x


def _dtype(x):
    return getattr(x, "dtype", None) or jnp.result_type(x)


_MAPS = {"vmap": _Together, "unroll": _Unrolled, "scan": _OneAfterAnother}


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

    def check(self) -> None:
        """What can be known of the axis only where it is mapped."""
        if self.index_groups is None:
            return
        size, grouped = jax.lax.axis_size(self.names), sum(map(len, self.index_groups))
        if size != grouped:
            raise ValueError(
                f"axis_index_groups must hold every index of the axis: it has {size}, "
                f"and the lists {grouped}."
            )

    def vary(self, tree: Any) -> Any:
        """Marks what is equal on all devices as if it were not.

        Under `shard_map` with its check of varying axes, the gradient of parameters
        that are known to be equal arrives summed over the axis. We need each device's
        own.
        """

        def vary_leaf(x):
            for name in self.names:
                try:
                    x = jax.lax.pcast(x, name, to="varying")
                except ValueError as error:
                    if "from=varying" not in str(error):
                        raise  # other than that it varies already
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
    own = here.grad_fn.map(lambda evaluate: lambda point: evaluate(axis.vary(point)))

    def averaged(mean):
        return own.map(lambda evaluate: lambda point: mean(evaluate(point)))

    def per_group(path):
        def follow(g, grad_fn, index):
            return path(g, grad_fn, axis.group() * here.groups + index)

        if here.per_group is not None:
            return axis.mean(here.per_group(follow))
        shared_g = axis.shared_mean(here.gradient)
        return axis.mean(follow(shared_g, averaged(axis.shared_mean), 0))

    is_one_group = axis.shared == axis.names and axis.index_groups is None
    return here._replace(
        loss=axis.mean(here.loss),
        gradient=axis.mean(here.gradient),
        grad_fn=averaged(axis.mean),
        per_group=None if is_one_group else per_group,
    )
