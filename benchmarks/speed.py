"""What a sharpness-aware step costs, compared with steps written by hand.

Run it with::

    python benchmarks/speed.py

It compares plain SGD, SAM written by hand, `sam_optax.sam` through both doors (door 1
is `sam_value_and_grad`, door 2 is `update` with `grad_fn=`), `optax.contrib.sam`, other
methods, and methods that are cheaper than two gradients. Their steps run in turn within
one process, on a perceptron, where passes over the parameters take much of the time, a
small residual network and a small transformer. It prints

- the time of one step divided by that of another in the same round: the median, and the
  range that holds half of the rounds. The same ratio is printed for what the compiler
  counts (flops, bytes accessed, temporary memory), for the time to compile, and for the
  bytes that instructions outside of branches move;
- the share of a step's time that is not spent on its two gradients, and the share that
  the fewest possible passes over the parameters would take, if each pass is as fast as
  when SGD runs on a single array of that size;
- each target, with what was measured.

It saves all of this as `speed.json` in the output directory, and draws the ratios of
times in `speed.png`. `--quick` takes less than two minutes.

To vary the amount of work, or to run at the sizes of papers::

    python benchmarks/speed.py --models mlp --width 512 1024 2048 --batch 8 128
    python benchmarks/speed.py --models resnet18 vit-s --dtype bfloat16

It runs on whatever device JAX finds. Parameters and states are donated, as in training.
With `--torch`, PyTorch takes plain SGD and SAM steps on the perceptron and the residual
network.
"""

import argparse
import functools
import itertools
import operator
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import torch_steps
from matplotlib.figure import Figure
from measure import (
    Program,
    Spread,
    bandwidth,
    compact_json,
    compile_program,
    ratios,
    time_in_turn,
)
from models import MODELS, make_batch, make_loss
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

import sam_optax

RHO, LEARNING_RATE, ETA = 0.05, 0.01, 0.01
GSAM_ALPHA, LOOK_SAM_ALPHA = 0.4, 0.7

# Each step that is compared, and the step that it is divided by.
COMPARISONS = [
    ("plain SGD", "by hand"),
    ("sam, door 1", "by hand"),
    ("sam, door 2", "by hand"),
    ("optax.contrib.sam, opaque", "by hand"),
    ("optax.contrib.sam, transparent", "by hand"),
    ("sam, door 1", "optax.contrib.sam, opaque"),
    ("sam, door 2", "optax.contrib.sam, opaque"),
    ("PyTorch, SAM", "PyTorch, plain"),
    ("sam, door 1", "PyTorch, SAM"),
    ("asam", "asam by hand"),
    ("fsam", "fsam by hand"),
    ("gsam", "gsam by hand"),
    ("stable_sam", "stable_sam by hand"),
    ("vasso", "vasso by hand"),
    ("asam", "sam, door 1"),
    ("fsam", "sam, door 1"),
    ("gsam", "sam, door 1"),
    ("stable_sam", "sam, door 1"),
    ("vasso", "sam, door 1"),
    ("look_sam, k = 5", "plain SGD"),
    ("look_sam, k = 5", "look_sam by hand"),
    ("rst, p = 0.5", "plain SGD"),
    ("rst, p = 0.5", "rst by hand"),
    ("sam, a quarter ascends", "plain SGD"),
    ("sam, a quarter ascends", "a quarter by hand"),
    ("random_sam", "plain SGD"),
    ("random_sam", "random_sam by hand"),
    ("report unused", "sam, door 1"),
    ("report used", "sam, door 1"),
    ("fsam", "fsam, no guard"),
]

# These choose in Python between several compiled steps. Their cost is the mean of the
# costs of those steps, weighted by how often each is taken.
MEANS = {
    "look_sam, k = 5": {"look_sam, ascends": 1 / 5, "look_sam, does not": 4 / 5},
    "look_sam by hand": {
        "look_sam by hand, ascends": 1 / 5,
        "look_sam by hand, does not": 4 / 5,
    },
    "rst, p = 0.5": {"rst, ascends": 1 / 2, "rst, does not": 1 / 2},
    "rst by hand": {"by hand": 1 / 2, "plain SGD": 1 / 2},
}

# The fewest passes over the parameters that a step needs besides its two gradients, if
# all that happens between two norms is one loop. docs/cost.md derives them.
METHODS = ("asam", "fsam", "gsam", "stable_sam", "vasso")
SAM_PASSES = dict.fromkeys(("by hand", "sam, door 1", "sam, door 2"), 7)
METHOD_PASSES = dict(zip(METHODS, (8, 10, 10, 8, 10), strict=True))
FEWEST_PASSES = {
    **SAM_PASSES,
    **METHOD_PASSES,
    **{f"{name} by hand": passes for name, passes in METHOD_PASSES.items()},
}
ALONE = "two gradients alone"


class Target(NamedTuple):
    """How large the ratio of a quantity of two steps may be at most, on some models."""

    name: str
    over: str
    quantity: str
    at_most: float
    models: tuple[str, ...] = tuple(MODELS)


CONVOLUTIONAL = ("resnet", "resnet18", "resnet18-imagenet")
DOORS = ("sam, door 1", "sam, door 2")
TARGETS = [
    *(
        Target(door, "by hand", quantity, 1.02)
        for door in DOORS
        for quantity in ("time", "memory", "flops", "bytes", "moved")
    ),
    *(Target(door, "by hand", "compile", 1.05) for door in DOORS),
    *(Target(door, "optax.contrib.sam, opaque", "time", 1.0) for door in DOORS),
    *(Target(name, "sam, door 1", "time", 1.05, CONVOLUTIONAL) for name in METHODS),
    Target("look_sam, k = 5", "plain SGD", "time", 1.30),
    Target("rst, p = 0.5", "plain SGD", "time", 1.60),
    Target("sam, a quarter ascends", "plain SGD", "time", 1.35),
    Target("random_sam", "plain SGD", "time", 1.50),
    Target("report unused", "sam, door 1", "flops", 1.0),
    Target("report unused", "sam, door 1", "bytes", 1.0),
    Target("report used", "sam, door 1", "time", 1.01, CONVOLUTIONAL),
    Target("fsam", "fsam, no guard", "time", 1.01, CONVOLUTIONAL),
    Target("fsam", "fsam, no guard", "time", 1.08, ("mlp",)),
]


# --- The steps: functions of (params, state, x, y) that return (params, state, loss).


class Step(NamedTuple):
    run: Callable[..., Any]
    init: Callable[[Any], Any]


def make_steps(loss_fn: Callable[..., Any]) -> dict[str, Step]:
    base = optax.sgd(LEARNING_RATE)

    def descend(params, state, d):
        updates, state = base.update(d, state, params)
        return optax.apply_updates(params, updates), state

    def perturbed(params, u):
        norm = optax.tree.norm(u)
        return jax.tree.map(lambda w, u: w + RHO / norm * u, params, u)

    def averaged(ema, g, decay):
        return jax.tree.map(lambda m, g: decay * m + (1 - decay) * g, ema, g)

    def plain(params, state, x, y):
        loss, g = jax.value_and_grad(loss_fn)(params, x, y)
        return *descend(params, state, g), loss

    def gradients_alone(params, state, x, y):
        # The rest of the state is the last gradients. The new ones take their memory.
        point, *_ = state
        loss, g = jax.value_and_grad(loss_fn)(params, x, y)
        # The second gradient must wait for all of the first, as it does in a SAM step.
        seen = sum(leaf[(0,) * leaf.ndim] for leaf in jax.tree.leaves(g))
        x = jnp.where(jnp.isnan(seen), 0, x)
        return params, (point, g, jax.grad(loss_fn)(point, x, y)), loss

    def by_hand(params, state, x, y):
        loss, g = jax.value_and_grad(loss_fn)(params, x, y)
        d = jax.grad(loss_fn)(perturbed(params, g), x, y)
        return *descend(params, state, d), loss

    def gsam_by_hand(params, state, x, y):
        loss, g = jax.value_and_grad(loss_fn)(params, x, y)
        length = optax.tree.norm(g)
        u = jax.tree.map(lambda g: g / length, g)
        point = jax.tree.map(lambda w, u: w + RHO * u, params, u)
        ga = jax.grad(loss_fn)(point, x, y)
        robust_length = optax.tree.norm(ga)
        ua = jax.tree.map(lambda g: g / robust_length, ga)
        cosine = optax.tree.vdot(u, ua)
        d = jax.tree.map(
            lambda ga, u, ua: ga - GSAM_ALPHA * length * (u - cosine * ua), ga, u, ua
        )
        return *descend(params, state, d), loss

    def asam_by_hand(params, state, x, y):
        loss, g = jax.value_and_grad(loss_fn)(params, x, y)
        scaled = jax.tree.map(lambda w, g: (jnp.abs(w) + ETA) * g, params, g)
        factor = RHO / optax.tree.norm(scaled)
        point = jax.tree.map(
            lambda w, u: w + factor * (jnp.abs(w) + ETA) * u, params, scaled
        )
        return *descend(params, state, jax.grad(loss_fn)(point, x, y)), loss

    def fsam_by_hand(params, state, x, y):
        ema, state = state
        loss, g = jax.value_and_grad(loss_fn)(params, x, y)
        ema = averaged(ema, g, decay=0.9)
        point = perturbed(params, optax.tree.sub(g, ema))
        params, state = descend(params, state, jax.grad(loss_fn)(point, x, y))
        return params, (ema, state), loss

    def stable_sam_by_hand(params, state, x, y):
        loss, g = jax.value_and_grad(loss_fn)(params, x, y)
        ga = jax.grad(loss_fn)(perturbed(params, g), x, y)
        d = optax.tree.scale(optax.tree.norm(g) / optax.tree.norm(ga), ga)
        return *descend(params, state, d), loss

    def vasso_by_hand(params, state, x, y):
        ema, state = state
        loss, g = jax.value_and_grad(loss_fn)(params, x, y)
        ema = averaged(ema, g, decay=0.8)
        point = perturbed(params, ema)
        params, state = descend(params, state, jax.grad(loss_fn)(point, x, y))
        return params, (ema, state), loss

    def look_sam_by_hand(params, state, x, y):
        _, state = state
        loss, g = jax.value_and_grad(loss_fn)(params, x, y)
        d = jax.grad(loss_fn)(perturbed(params, g), x, y)
        overlap = optax.tree.vdot(g, d) / optax.tree.norm(g, squared=True)
        kept = jax.tree.map(lambda d, g: d - overlap * g, d, g)
        params, state = descend(params, state, d)
        return params, (kept, state), loss

    def look_sam_by_hand_between(params, state, x, y):
        kept, state = state
        loss, g = jax.value_and_grad(loss_fn)(params, x, y)
        factor = LOOK_SAM_ALPHA * optax.tree.norm(g) / optax.tree.norm(kept)
        d = jax.tree.map(lambda g, v: g + factor * v, g, kept)
        params, state = descend(params, state, d)
        return params, (kept, state), loss

    def quarter_by_hand(params, state, x, y):
        part = len(x) // 4
        loss, g = jax.value_and_grad(loss_fn)(params, x[:part], y[:part])
        d = jax.grad(loss_fn)(perturbed(params, g), x, y)
        return *descend(params, state, d), loss

    def random_sam_by_hand(params, state, x, y):
        key, state = state
        key, now = jax.random.split(key)
        e = optax.tree.random_like(now, params)
        loss, d = loss_fn(params, x, y), jax.grad(loss_fn)(perturbed(params, e), x, y)
        params, state = descend(params, state, d)
        return params, (key, state), loss

    def with_ema(params):
        return optax.tree.zeros_like(params), base.init(params)

    def with_gradient(params):
        return optax.tree.ones_like(params), base.init(params)

    def with_key(params):
        return jax.random.key(0), base.init(params)

    return {
        "plain SGD": Step(plain, base.init),
        ALONE: Step(
            gradients_alone,
            lambda params: (params,) + 2 * (optax.tree.zeros_like(params),),
        ),
        "by hand": Step(by_hand, base.init),
        "sam, door 1": _through_door1(loss_fn, base, sam_optax.sam(RHO)),
        "sam, door 2": _through_door2(loss_fn, base, sam_optax.sam(RHO)),
        **_contrib_steps(loss_fn, base),
        "asam by hand": Step(asam_by_hand, base.init),
        "fsam by hand": Step(fsam_by_hand, with_ema),
        "gsam by hand": Step(gsam_by_hand, base.init),
        "stable_sam by hand": Step(stable_sam_by_hand, base.init),
        "vasso by hand": Step(vasso_by_hand, with_ema),
        "look_sam by hand, ascends": Step(look_sam_by_hand, with_gradient),
        "look_sam by hand, does not": Step(look_sam_by_hand_between, with_gradient),
        "random_sam by hand": Step(random_sam_by_hand, with_key),
        "a quarter by hand": Step(quarter_by_hand, base.init),
        **_method_steps(loss_fn, base),
    }


def _through_door1(
    loss_fn: Callable[..., Any],
    base: Any,
    sam: Any,
    ascend: bool | None = None,
    read: Callable[[Any], Any] = lambda gradients: (),
    **options: Any,
) -> Step:
    tx = optax.chain(sam, base)
    loss_and_grads = sam_optax.sam_value_and_grad(loss_fn, sam, **options)

    def step(params, state, x, y):
        loss, grads = loss_and_grads(params, x, y, opt_state=state, ascend=ascend)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, (loss, read(grads))

    return Step(step, tx.init)


def _through_door2(loss_fn: Callable[..., Any], base: Any, sam: Any) -> Step:
    tx = optax.chain(sam, base)

    def step(params, state, x, y):
        loss, g = jax.value_and_grad(loss_fn)(params, x, y)
        grad_fn = jax.grad(lambda w: loss_fn(w, x, y))
        updates, state = tx.update(g, state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state, loss

    return Step(step, tx.init)


def _contrib_steps(loss_fn: Callable[..., Any], base: Any) -> dict[str, Step]:
    def contrib(opaque_mode):
        ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
        return optax.contrib.sam(base, ascent, opaque_mode=opaque_mode)

    def opaque(params, state, x, y):
        def grad_fn(w, _):
            return jax.grad(loss_fn)(w, x, y)

        loss, g = jax.value_and_grad(loss_fn)(params, x, y)
        updates, state = contrib(True).update(g, state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state, loss

    def transparent(params, state, x, y):
        losses = []
        for _ in range(2):
            loss, g = jax.value_and_grad(loss_fn)(params, x, y)
            updates, state = contrib(False).update(g, state, params)
            params = optax.apply_updates(params, updates)
            losses.append(loss)
        return params, state, losses[0]

    return {
        "optax.contrib.sam, opaque": Step(opaque, contrib(True).init),
        "optax.contrib.sam, transparent": Step(transparent, contrib(False).init),
    }


def _method_steps(loss_fn: Callable[..., Any], base: Any) -> dict[str, Step]:
    door1 = functools.partial(_through_door1, loss_fn, base)
    look_sam = sam_optax.look_sam(RHO, k=5, alpha=LOOK_SAM_ALPHA)
    rst = sam_optax.rst(RHO, probability=0.5)
    unguarded = sam_optax.sharpness_aware(sam_optax.ascents.fsam(RHO), guard=False)
    quarter = {"data": sam_optax.data.sub_batch(0.25), "batch_argnums": (1, 2)}
    return {
        "asam": door1(sam_optax.asam(RHO)),
        "fsam": door1(sam_optax.fsam(RHO)),
        "gsam": door1(sam_optax.gsam(RHO, alpha=GSAM_ALPHA)),
        "stable_sam": door1(sam_optax.stable_sam(RHO)),
        "vasso": door1(sam_optax.vasso(RHO)),
        "look_sam, ascends": door1(look_sam, ascend=True),
        "look_sam, does not": door1(look_sam, ascend=False),
        "rst, ascends": door1(rst, ascend=True),
        "rst, does not": door1(rst, ascend=False),
        "sam, a quarter ascends": door1(sam_optax.sam(RHO), **quarter),
        "random_sam": door1(sam_optax.random_sam(RHO)),
        "report unused": door1(sam_optax.sam(RHO), report=True),
        "report used": door1(
            sam_optax.sam(RHO), read=operator.attrgetter("report"), report=True
        ),
        "fsam, no guard": door1(unguarded),
    }


# --- The measurement.


class Case(NamedTuple):
    """One model at one size."""

    model: str
    width: int
    batch: int


class Costs(NamedTuple):
    """What one step costs; `time` holds the seconds of each round."""

    time: list[float]
    flops: float
    bytes: float
    moved: float
    memory: float
    compile: float


def measure_case(
    case: Case,
    pairs: Sequence[tuple[str, str]],
    dtype: Any,
    rounds: int,
    compiles: int,
    progress: Progress,
) -> "Result":
    """Compares the pairs of steps on one model."""
    model = MODELS[case.model]
    params = model.init(jax.random.key(0), case.width)
    size = sum(w.size for w in jax.tree.leaves(params))
    batch = make_batch(model, case.batch)
    wanted = {ALONE, "by hand"} | {
        part for pair in pairs for name in pair for part in MEANS.get(name, [name])
    }
    steps = {
        name: step
        for name, step in make_steps(make_loss(model.predict, dtype)).items()
        if name in wanted
    }
    label = f"{case.model} {case.width}, batch {case.batch}"
    task = progress.add_task(label, total=len(steps) * compiles + rounds)
    advance = functools.partial(progress.advance, task)
    programs = _compile(steps, params, batch, compiles, advance)
    others = {}
    if any("PyTorch" in name for name in wanted) and case.model in ("mlp", "resnet"):
        others = torch_steps.make_calls(
            case.model, params, batch, rho=RHO, learning_rate=LEARNING_RATE
        )
    times = _time(programs, others, params, batch, rounds, advance)
    costs = {
        name: Costs(
            times[name],
            program.flops,
            program.bytes_accessed,
            program.bytes_moved,
            program.temporary_bytes,
            program.compile_seconds,
        )
        for name, program in programs.items()
    }
    unknown = float("nan")
    costs |= {name: Costs(times[name], *[unknown] * 5) for name in others}
    costs |= {
        name: _mean(costs, of) for name, of in MEANS.items() if set(of) <= set(costs)
    }
    known = [pair for pair in pairs if set(pair) <= set(costs)]
    comparisons = [compare(costs, *pair) for pair in known]
    return Result(case, size, bandwidth(size), costs, comparisons)


def _compile(
    steps: dict[str, Step],
    params: Any,
    batch: tuple[jax.Array, ...],
    compiles: int,
    advance: Callable[[], None],
) -> dict[str, Program]:
    """Compiles each step several times, in turn; the fastest compilation counts."""
    # Every step is traced once beforehand. Otherwise the first one would also pay for
    # tracing the functions that all of them call.
    for run, init in steps.values():
        jax.eval_shape(run, params, init(params), *batch)
    programs: dict[str, Program] = {}
    for _, (name, (run, init)) in itertools.product(range(compiles), steps.items()):
        # A copy, because a state may contain the parameters, which are donated as well.
        state = jax.tree.map(jnp.copy, init(params))
        program = compile_program(run, params, state, *batch, donate=(0, 1))
        before = programs.get(name, program).compile_seconds
        programs[name] = program._replace(
            compile_seconds=min(before, program.compile_seconds)
        )
        advance()
    return programs


def _time(
    programs: dict[str, Program],
    others: dict[str, Callable[[], Any]],
    params: Any,
    batch: tuple[jax.Array, ...],
    rounds: int,
    advance: Callable[[], None],
) -> dict[str, list[float]]:
    """The seconds of each step in each round. All steps train the same parameters."""
    states = {name: program.arguments[1] for name, program in programs.items()}

    def call(name):
        nonlocal params
        params, states[name], loss = programs[name].run(params, states[name], *batch)
        return params, states[name], loss

    calls = {name: functools.partial(call, name) for name in programs} | others
    times = time_in_turn(calls, rounds, advance)
    if not jnp.isfinite(optax.tree.norm(params)):
        raise FloatingPointError("Training diverged, so the times mean nothing.")
    return times


def _mean(costs: dict[str, Costs], weights: dict[str, float]) -> Costs:
    """The weighted mean of costs; but the largest memory, and all compile times."""

    def mean(values):
        return sum(w * v for w, v in zip(weights.values(), values, strict=True))

    parts = [costs[name] for name in weights]
    return Costs(
        [mean(times) for times in zip(*[part.time for part in parts], strict=True)],
        mean([part.flops for part in parts]),
        mean([part.bytes for part in parts]),
        mean([part.moved for part in parts]),
        max(part.memory for part in parts),
        sum(part.compile for part in parts),
    )


class Comparison(NamedTuple):
    """The costs of one step divided by those of another."""

    name: str
    over: str
    time: Spread
    flops: float
    bytes: float
    moved: float
    memory: float
    compile: float

    def of(self, quantity: str) -> float:
        value = getattr(self, quantity)
        return value.median if quantity == "time" else value


def compare(costs: dict[str, Costs], name: str, over: str) -> Comparison:
    a, b = costs[name], costs[over]
    return Comparison(
        name,
        over,
        ratios(a.time, b.time),
        a.flops / b.flops,
        a.bytes / b.bytes,
        a.moved / b.moved,
        a.memory / (b.memory or 1),
        a.compile / b.compile,
    )


class Result(NamedTuple):
    case: Case
    parameters: int
    bandwidth: float
    costs: dict[str, Costs]
    comparisons: list[Comparison]

    def overheads(self) -> dict[str, "Overhead"]:
        """What the steps take besides their two gradients."""
        alone, by_hand = self.costs[ALONE], self.costs["by hand"]
        size = 4 * self.parameters
        return {
            name: Overhead(
                FEWEST_PASSES["by hand"] + (costs.moved - by_hand.moved) / size,
                ratios(map(operator.sub, costs.time, alone.time), costs.time),
                fewest * size / self.bandwidth / statistics.median(costs.time),
            )
            for name, fewest in FEWEST_PASSES.items()
            if (costs := self.costs.get(name))
        }


class Overhead(NamedTuple):
    """What one step takes besides its two gradients.

    Attributes:
      passes: passes over the (float32) parameters in the compiled step. Only their
        difference from SAM by hand is counted; that is taken to need the fewest.
      share: the measured share of the step's time.
      least: the share that the fewest possible passes would take.
    """

    passes: float
    share: Spread
    least: float


# --- Tables, targets, the plot and the JSON.


def comparison_table(result: Result) -> Table:
    case = result.case
    table = Table(
        title=f"{case.model}: width {case.width}, batch {case.batch}, "
        f"{result.parameters:,} parameters"
    )
    columns = ("time", "flops", "bytes", "moved", "memory", "compile")
    for column in ("step", "over", *columns):
        is_number = column not in ("step", "over")
        table.add_column(column, justify="right" if is_number else "left")
    for row in result.comparisons:
        numbers = [row.of(column) for column in columns[1:]]
        table.add_row(row.name, row.over, str(row.time), *(f"{x:.3f}" for x in numbers))
    return table


def overhead_table(overheads: dict[str, Overhead], bandwidth: float) -> Table:
    table = Table(
        title=f"besides the two gradients; passes at {bandwidth / 1e9:.1f} GB/s"
    )
    columns = ("fewest passes", "as compiled", "take of a step", "measured")
    table.add_column("step")
    for column in columns:
        table.add_column(column, justify="right")
    for name, (passes, share, least) in overheads.items():
        fewest = str(FEWEST_PASSES[name])
        table.add_row(name, fewest, f"{passes:.1f}", f"{least:.3f}", str(share))
    return table


def judge(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Checks each target in each case that it is meant for."""
    verdicts = []
    for target, result in itertools.product(TARGETS, results):
        for row in result.comparisons:
            is_meant = (row.name, row.over) == (target.name, target.over)
            if not is_meant or result.case.model not in target.models:
                continue
            measured = row.of(target.quantity)
            verdicts.append(
                {
                    "case": result.case._asdict(),
                    "step": target.name,
                    "over": target.over,
                    "quantity": target.quantity,
                    "target": target.at_most,
                    "measured": measured,
                    "met": round(measured, 3) <= target.at_most,
                }
            )
    return verdicts


def target_table(verdicts: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="targets")
    for column in ("case", "what", "target", "measured", "met?"):
        is_number = column in ("target", "measured")
        table.add_column(column, justify="right" if is_number else "left")
    for verdict in verdicts:
        table.add_row(
            " ".join(map(str, verdict["case"].values())),
            f"{verdict['quantity']} of {verdict['step']} over {verdict['over']}",
            f"{verdict['target']:.2f}",
            f"{verdict['measured']:.3f}",
            "yes" if verdict["met"] else "no",
        )
    return table


def plot(results: Sequence[Result], path: pathlib.Path) -> None:
    """Draws each ratio of times with its spread, and its target if it has one."""
    # A model may lack some rows, so they are collected from all models.
    rows = [(row.name, row.over) for result in results for row in result.comparisons]
    heights = {row: y for y, row in enumerate(dict.fromkeys(rows))}
    at_most = {
        (target.name, target.over, model): target.at_most
        for target in TARGETS
        if target.quantity == "time"
        for model in target.models
    }
    size = (4 + 3 * len(results), 1.5 + 0.2 * len(heights))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for panel, result in zip(panels, results, strict=True):
        for row in result.comparisons:
            y = heights[row.name, row.over]
            low, middle, high = row.time
            panel.errorbar(
                middle, y, xerr=[[middle - low], [high - middle]], fmt="o", color="C0"
            )
            target = at_most.get((row.name, row.over, result.case.model))
            if target is not None:
                panel.plot(target, y, marker="|", markersize=14, color="C3")
        panel.axvline(1, color="gray", linewidth=0.5)
        panel.set_xlabel("ratio of times")
        panel.set_title(" ".join(map(str, result.case)))
    panels[0].set_yticks(range(len(heights)), map(" / ".join, heights))
    panels[0].invert_yaxis()
    figure.suptitle("median ratio; the bar holds half of the rounds; red: target")
    figure.savefig(path)


def as_json(
    results: Sequence[Result],
    verdicts: Sequence[dict[str, Any]],
    options: Any,
) -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}, {device.device_kind}",
        "versions": {"jax": jax.__version__, "optax": optax.__version__},
        "options": {
            key: str(value) if isinstance(value, pathlib.Path) else value
            for key, value in vars(options).items()
        },
        "results": [
            {
                **result.case._asdict(),
                "parameters": result.parameters,
                "bandwidth": result.bandwidth,
                "steps": {
                    name: costs._replace(time=statistics.median(costs.time))._asdict()
                    for name, costs in result.costs.items()
                },
                "comparisons": [
                    row._replace(time=row.time._asdict())._asdict()
                    for row in result.comparisons
                ],
                "overheads": {
                    name: overhead._replace(share=overhead.share._asdict())._asdict()
                    for name, overhead in result.overheads().items()
                },
            }
            for result in results
        ],
        "targets": list(verdicts),
    }


# --- The command.


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    small = ["mlp", "resnet", "transformer"]
    parser.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        help=f"(default: {' '.join(small)}, of which --quick leaves out the last)",
    )
    parser.add_argument(
        "--width", type=int, nargs="+", help="of the layers (default: the model's own)"
    )
    parser.add_argument(
        "--batch", type=int, nargs="+", help="examples (default: the model's own)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=sorted({name for name, _ in COMPARISONS}),
        metavar="STEP",
        help="compare only these (default: all)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="dtype to compute in; parameters are float32 (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds", type=int, default=100, help="(default: %(default)s)"
    )
    parser.add_argument(
        "--compiles",
        type=int,
        default=3,
        help="the fastest one counts (default: %(default)s)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small models and few rounds: coarse, but under two minutes",
    )
    parser.add_argument(
        "--torch",
        action="store_true",
        help="also in PyTorch, on the CPU: the models mlp and resnet in float32",
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("results"),
        help="directory of speed.json and speed.png (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    args.models = args.models or small[: 2 if args.quick else 3]
    if args.quick:
        args.rounds, args.compiles = min(args.rounds, 6), 1
    if args.rounds < 2 or args.compiles < 1:
        parser.error("at least two rounds and one compilation are needed.")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    console = Console(width=120)
    dtype = jnp.dtype(args.dtype)
    pairs = [pair for pair in COMPARISONS if not args.only or pair[0] in args.only]
    if not args.torch:
        pairs = [pair for pair in pairs if not any("PyTorch" in name for name in pair)]
    results = []
    columns = (
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for name in args.models:
            model = MODELS[name]
            compared = pairs
            # Methods by hand serve to compare passes, for which one model is enough.
            if args.quick and name != "mlp":
                compared = [pair for pair in pairs if not pair[1].endswith(" by hand")]
            own = model.width // 2 if args.quick else model.width
            widths, batches = args.width or [own], args.batch or [model.batch]
            for case in itertools.starmap(
                Case, itertools.product([name], widths, batches)
            ):
                results.append(
                    measure_case(
                        case, compared, dtype, args.rounds, args.compiles, progress
                    )
                )

    console.print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {dtype}")
    for result in results:
        console.print(comparison_table(result))
        if overheads := result.overheads():
            console.print(overhead_table(overheads, result.bandwidth))
    verdicts = judge(results)
    console.print(target_table(verdicts))
    args.output.mkdir(parents=True, exist_ok=True)
    content = compact_json(as_json(results, verdicts, args))
    (args.output / "speed.json").write_text(content + "\n", encoding="utf-8")
    plot(results, args.output / "speed.png")
    console.print(
        f"Wrote {args.output / 'speed.json'} and {args.output / 'speed.png'}."
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
