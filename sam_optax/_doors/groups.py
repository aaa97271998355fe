"""m-sharpness: groups of m examples on one device, each with its own perturbation."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sam_optax import _sharding as sharding
from sam_optax import _tree
from sam_optax._doors.batch import Batch, DataRule, choose
from sam_optax._step.inputs import Choice, Pass

PathOfGroup = Callable[[Any, Choice, Any], Any]  # (g, choice, index) of a group -> tree
PerGroup = Callable[[PathOfGroup], Any]  # -> the mean of these trees over the groups


def over_groups(
    batch: Batch,
    params: Any,
    rule: DataRule,
    m: int,
    how: str,
    vary: Callable[[Any], Any],
) -> tuple[Choice, PerGroup]:
    """Groups of m examples each, in the order of the batch: their means, and the map.

    `vary` marks a tree as different on each device, which the start of a loop must be
    if its steps are.
    """
    count = number_of_groups(batch, m)
    groups = MAPS[how](count, vary)
    examples = groups.split(batch.examples)

    def choose_in(examples: Any) -> Choice:
        return choose(rule, batch.replace(examples), params)

    def first_gradient(examples):
        own = choose_in(examples)
        g = own.seen.gradient
        said = _Said(own.recompute, own.comparable, own.only_ascent, own.sees_one_loss)
        return g, (own.seen.loss, own.seen.aux, said, g if groups.keeps_g else None)

    gradient, each = groups.run(first_gradient, examples)
    losses, aux, said = groups.stacked(each)

    def mean_of(part: Callable[[Choice], Callable[[Any], Pass]]):
        def evaluate(point):
            def evaluate_group(examples):
                there = part(choose_in(examples))(point)
                return there._replace(aux=None), None

            return groups.run(evaluate_group, examples)[0]

        return evaluate

    def per_group(path: PathOfGroup) -> Any:
        def follow(examples, kept, index):
            own = choose_in(examples)
            g = kept[-1] if groups.keeps_g else own.seen.gradient
            return path(g, own, index), None

        return groups.run(follow, examples, each, groups.indices(examples))[0]

    descent = mean_of(lambda own: own.descent)
    choice = Choice(
        Pass(jnp.mean(losses), gradient, aux),
        ascent=descent if said.sees_one_loss else mean_of(lambda own: own.ascent),
        descent=descent,
        recompute=said.recompute,
        comparable=said.comparable,
        only_ascent=said.only_ascent,
    )
    return choice, per_group


def number_of_groups(batch: Batch, m: int) -> int:
    if batch.size % m:
        raise ValueError(
            f"m must divide the batch: {batch.size} examples do not make groups of {m}."
        )
    return batch.size // m


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Said:
    """What a rule's choice says, as static pytree data that vmap and scan hand on."""

    recompute: bool
    comparable: bool
    only_ascent: bool
    sees_one_loss: bool


def default_map(count: int, *, is_alone: bool = False) -> str:
    """How groups run if nothing is said, by what `benchmarks/groups.py` measures.

    Over several devices under jit, a loop would take the groups of one device after
    those of another. Elsewhere all groups are on one device (or each is on all, if the
    parameters are spread), where each in a program of its own is fastest, as long as
    compiling that many is bearable.
    """
    if jax.device_count() > 1 and not is_alone:
        return "vmap"
    return "unroll" if count <= 16 else "scan"


class _Vmap:
    """Groups as a mapped axis."""

    keeps_g = True

    def __init__(self, count: int, vary: Callable[[Any], Any]):
        self.count, self.vary = count, vary

    def split(self, examples):
        """One value per group, in whatever form `run` takes them."""
        return self._split(examples, together=True)

    def _split(self, examples, together):
        def split_leaf(x):
            return sharding.split(x, self.count, together=together)

        return jax.tree.map(split_leaf, examples)

    def indices(self, examples) -> Any:
        return sharding.like_first_axis(jnp.arange(self.count), examples)

    def run(self, function, *values):
        """(mean of the first results over groups, the second results of each)."""
        averaged, each = jax.vmap(function)(*values)
        return _tree.mean_of_groups(averaged), each

    def stacked(self, each):
        """The second results of each without the last, along a first axis."""
        return each[:-1]


class _Unroll(_Vmap):
    """Groups as a Python list. The compiler chooses how many are in memory at once."""

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
            total = jax.tree.map(jnp.add, total, _tree.at_least_float32(averaged))
            each.append(kept)
        return self._mean(total, like), each

    def _mean(self, total, like):
        return jax.tree.map(
            lambda x, like: (x / self.count).astype(jnp.result_type(like)), total, like
        )

    def stacked(self, each):
        own = [kept[:-1] for kept in each]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)


class _Scan(_Unroll):
    """Groups as the steps of a loop.

    The first gradient of a group is not kept but taken again, which saves memory.
    """

    keeps_g = False

    def split(self, examples):
        return self._split(examples, together=False)

    def indices(self, examples) -> Any:
        return jnp.arange(self.count)

    def run(self, function, *values):
        like, _ = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], values))

        def body(total, group):
            averaged, kept = function(*group)
            return jax.tree.map(jnp.add, total, _tree.at_least_float32(averaged)), kept

        zeros = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype, device=s.sharding), like
        )
        start = self.vary(_tree.at_least_float32(zeros))
        total, each = jax.lax.scan(body, start, values)
        return self._mean(total, like), each

    def stacked(self, each):
        return each[:-1]


MAPS = {"vmap": _Vmap, "unroll": _Unroll, "scan": _Scan}
