"""What a step with one gradient costs, beside the plain step of the base optimizer.

    python benchmarks/price.py

measures steps of `msam` and `late_sam`, through both doors, on a perceptron, a small
residual network and a small transformer, and prints each divided by the plain step of
SGD with momentum: the time of a step in the same round (median, and the range that
holds half of the rounds), what the compiler counts, and temporary memory in copies of
the parameters. Beside them are steps written by hand: one that borrows the momentum of
SGD, and one that keeps a second one, as `msam` does.

Then it counts the collectives of these steps on eight simulated devices, with the batch
divided (data parallel) and with the parameters divided too (FSDP); looks whether the
steps of `late_sam` before its start are those of the base optimizer; and times `sampa`
on two simulated devices of one thread each, beside a plain step on one of them.

It saves everything as `price.json` in the output directory. `--quick` takes a minute.
"""

import argparse
import collections
import functools
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import (
    compact_json,
    compile_program,
    ratios,
    time_in_turn,
)
from models import MODELS, make_batch, make_loss
from rich.console import Console
from rich.table import Table

import sam_optax
from sam_optax import ascents

RATE, MOMENTUM, RHO = 0.01, 0.9, 0.3
SMALL = ("mlp", "resnet", "transformer")
# At most these, beside the plain step; memory in copies of the parameters, on top.
TARGETS = {"time": 1.05, "flops": 1.02, "copies": 1.0}
PLAIN = "plain"
COLLECTIVES = re.compile(
    r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?"
    r"\("
)


class Step(NamedTuple):
    """A step (params, state, x, y) -> (params, state, loss), and its first state."""

    run: Callable[..., Any]
    init: Callable[[Any], Any]


def base_optimizer() -> optax.GradientTransformation:
    return optax.sgd(RATE, momentum=MOMENTUM)


def make_steps(loss_fn: Callable[..., Any]) -> dict[str, Step]:
    base = base_optimizer()
    late = sam_optax.late_sam(RHO, start=1000)
    borrowed = sam_optax.sharpness_aware(
        ascents.chain(
            ascents.given_direction("momentum", sign=-1), ascents.sam(rho=RHO)
        )
    )

    def trace_of(state):
        return {"momentum": optax.tree.get(state, "trace")}

    door1 = functools.partial(through_door1, loss_fn)
    return {
        PLAIN: Step(functools.partial(plain_step, loss_fn), base.init),
        "by hand, SGD's momentum": Step(
            functools.partial(borrowing_by_hand, loss_fn), base.init
        ),
        "by hand, its own momentum": Step(
            functools.partial(msam_by_hand, loss_fn),
            lambda params: (optax.tree.zeros_like(params), base.init(params)),
        ),
        "msam, SGD's momentum given": door1(borrowed, extra_args=trace_of),
        "msam, door 1": door1(sam_optax.msam(RHO, MOMENTUM)),
        "msam, door 2": through_door2(loss_fn, sam_optax.msam(RHO, MOMENTUM)),
        "msam, no guard": door1(sam_optax.msam(RHO, MOMENTUM, guard=False)),
        "msam, value at w": door1(sam_optax.msam(RHO, MOMENTUM), value_at="parameters"),
        "late_sam before its start": door1(late, ascend=False, value_at="parameters"),
        "sam": door1(sam_optax.sam(RHO), value_at="parameters"),
    }


def plain_step(loss_fn, params, state, x, y):
    loss, g = jax.value_and_grad(loss_fn)(params, x, y)
    updates, state = base_optimizer().update(g, state, params)
    return optax.apply_updates(params, updates), state, loss


def ahead(params, momentum):
    """w − ρ m/‖m‖."""
    factor = RHO / (optax.tree.norm(momentum) + 1e-12)
    return jax.tree.map(lambda w, m: w - factor * m, params, momentum)


def borrowing_by_hand(loss_fn, params, state, x, y):
    point = ahead(params, optax.tree.get(state, "trace"))
    loss, d = jax.value_and_grad(loss_fn)(point, x, y)
    updates, state = base_optimizer().update(d, state, params)
    return optax.apply_updates(params, updates), state, loss


def msam_by_hand(loss_fn, params, state, x, y):
    momentum, state = state
    loss, d = jax.value_and_grad(loss_fn)(ahead(params, momentum), x, y)
    momentum = jax.tree.map(lambda m, d: MOMENTUM * m + d, momentum, d)
    updates, state = base_optimizer().update(d, state, params)
    return optax.apply_updates(params, updates), (momentum, state), loss


def through_door1(
    loss_fn: Callable[..., Any],
    sam: Any,
    *,
    ascend: bool | None = None,
    value_at: str = "perturbed",
    extra_args: Callable[[Any], dict] = lambda state: {},
) -> Step:
    tx = optax.chain(sam, base_optimizer())
    loss_and_grads = sam_optax.sam_value_and_grad(loss_fn, sam, value_at=value_at)

    def step(params, state, x, y):
        loss, grads = loss_and_grads(
            params, x, y, opt_state=state, ascend=ascend, extra_args=extra_args(state)
        )
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return Step(step, tx.init)


def through_door2(loss_fn: Callable[..., Any], sam: Any) -> Step:
    tx = optax.chain(sam, base_optimizer())
    gradients = sam_optax.value_and_ascent_grad(loss_fn, value_at="perturbed")

    def step(params, state, x, y):
        loss, g, extra_args = gradients(params, x, y)
        updates, state = tx.update(g, state, params, **extra_args)
        return optax.apply_updates(params, updates), state, loss.value

    return Step(step, tx.init)


# --- On one device.


def measure_model(name: str, rounds: int) -> dict[str, dict[str, Any]]:
    model = MODELS[name]
    params = model.init(jax.random.key(0), model.width)
    batch = make_batch(model, model.batch)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    programs, states = {}, {}
    for label, step in make_steps(make_loss(model.predict, jnp.float32)).items():
        copy = jax.tree.map(jnp.array, params)
        states[label] = [copy, step.init(copy)]
        programs[label] = compile_program(
            step.run, *states[label], *batch, donate=(0, 1)
        )

    def make_call(label):
        def call():
            *states[label], loss = programs[label].run(*states[label], *batch)
            return loss

        return call

    times = time_in_turn({label: make_call(label) for label in programs}, rounds)
    plain = programs[PLAIN]
    return {
        label: {
            "time": ratios(times[label], times[PLAIN]),
            "flops": program.flops / plain.flops,
            "moved": program.bytes_moved / plain.bytes_moved,
            "copies": (program.temporary_bytes - plain.temporary_bytes) / size,
        }
        for label, program in programs.items()
    }


def same_trainings(steps: int = 5) -> dict[str, bool]:
    """Whether late_sam before its start trains bit by bit as the base optimizer."""
    found = {}
    for name in SMALL:
        model = MODELS[name]
        made = make_steps(make_loss(model.predict, jnp.float32))
        batch, ends = make_batch(model, model.batch), []
        for label in (PLAIN, "late_sam before its start"):
            params = model.init(jax.random.key(0), model.width)
            state, run = made[label].init(params), jax.jit(made[label].run)
            for _ in range(steps):
                params, state, loss = run(params, state, *batch)
            ends.append(jax.tree.leaves((params, loss)))
        found[name] = all(map(np.array_equal, *ends))
    return found


# --- On simulated devices: processes of their own, as the number is set at the start.


def count_collectives() -> dict[str, dict[str, dict[str, int]]]:
    """Setting -> step -> collective -> how many of them the program has."""
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    model = MODELS["mlp"]
    loss_fn = make_loss(model.predict, jnp.float32)

    def sharding(*names):
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names))

    def fully_divided(leaf):
        is_divisible = leaf.ndim > 1 and leaf.shape[0] % 8 == 0
        return sharding("data") if is_divisible else sharding()

    x, y = jax.device_put(make_batch(model, model.batch), sharding("data"))
    found = {}
    for setting, place in (
        ("data parallel", lambda leaf: sharding()),
        ("FSDP", fully_divided),
    ):
        params = model.init(jax.random.key(0), 64)
        params = jax.device_put(params, jax.tree.map(place, params))
        found[setting] = {}
        for label, step in make_steps(loss_fn).items():
            state = step.init(params)
            state = jax.device_put(state, jax.tree.map(place, state))
            kept = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
            jitted = jax.jit(step.run, out_shardings=(*kept, None))
            text = jitted.lower(params, state, x, y).compile().as_text()
            found[setting][label] = dict(collections.Counter(COLLECTIVES.findall(text)))
    return found


def gradient_on_each_half(loss_fn, exchanges, params, state, x, y):
    """The least that two halves can do: a gradient each, and a sum of the two."""
    shift = 0.01 * jax.lax.axis_index("half")
    point = jax.tree.map(lambda w: w + shift, params)
    d = jax.grad(loss_fn)(point, x, y)
    d = jax.lax.psum(d, "half") if exchanges else d
    updates, state = base_optimizer().update(d, state, params)
    return optax.apply_updates(params, updates), state


def time_sampa(rounds: int) -> dict[str, dict[str, Any]]:
    """Model -> step on two devices -> its time over that of a plain step on one."""
    mesh = jax.make_mesh((2,), ("half",), (jax.sharding.AxisType.Auto,))
    one, both = jax.devices()[0], jax.sharding.PartitionSpec()
    found = {}
    for name in SMALL:
        model = MODELS[name]
        loss_fn = make_loss(model.predict, jnp.float32)
        batch = make_batch(model, model.batch)
        sam = sam_optax.sampa(RHO, RATE, momentum=MOMENTUM, halves="half")
        step = through_door1(loss_fn, sam, value_at="parameters")

        def without_loss(*arguments, step=step):
            return step.run(*arguments)[:2]

        def on_both(function):
            return jax.shard_map(
                function, mesh=mesh, in_specs=both, out_specs=both, check_vma=False
            )

        by_hand = functools.partial(gradient_on_each_half, loss_fn)
        init_base = base_optimizer().init
        plain = functools.partial(plain_step, loss_fn)
        placement = jax.sharding.NamedSharding(mesh, both)
        runs = {}
        for label, function, init, place in (
            (PLAIN, lambda *a, plain=plain: plain(*a)[:2], init_base, one),
            ("sampa", on_both(without_loss), step.init, placement),
            (
                "by hand",
                on_both(functools.partial(by_hand, True)),
                init_base,
                placement,
            ),
            (
                "by hand, without exchange",
                on_both(functools.partial(by_hand, False)),
                init_base,
                placement,
            ),
        ):
            params = model.init(jax.random.key(0), model.width)
            first = jax.device_put([params, init(params)], place)
            examples = jax.device_put(batch, place)
            jitted = jax.jit(function, donate_argnums=(0, 1))

            def call(jitted=jitted, states=first, examples=examples):
                states[:] = jitted(*states, *examples)
                return states[0]

            call()
            runs[label] = call
        times = time_in_turn(runs, rounds)
        found[name] = {
            label: ratios(times[label], times[PLAIN])
            for label in runs
            if label != PLAIN
        }
    return found


CHILDREN = {"collectives": count_collectives, "sampa": time_sampa}


def in_a_process(task: str, flags: str, *arguments: str) -> Any:
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--task", task, *arguments]
    run = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(run.stdout.splitlines()[-1])


# --- The report.


def show(console: Console, results: dict[str, Any]) -> None:
    for name, rows in results["models"].items():
        table = Table(title=f"{name}: beside the plain step")
        for heading in ("", "time", "FLOPs", "bytes moved", "copies of parameters"):
            table.add_column(heading, justify="left" if not heading else "right")
        for label, row in rows.items():
            low, median, high = row["time"]
            table.add_row(
                label,
                f"{median:.3f} ({low:.3f} to {high:.3f})",
                f"{row['flops']:.4f}",
                f"{row['moved']:.3f}",
                f"{row['copies']:+.2f}",
            )
        console.print(table)
    for setting, rows in results["collectives"].items():
        table = Table(title=f"{setting}, 8 devices: collectives")
        kinds = sorted({kind for row in rows.values() for kind in row})
        for heading in ("", *kinds):
            table.add_column(heading, justify="left" if not heading else "right")
        for label, row in rows.items():
            table.add_row(label, *(str(row.get(kind, 0)) for kind in kinds))
        console.print(table)
    console.print("late_sam before its start, bit by bit:", results["late_sam"])
    for name, rows in results["sampa"].items():
        for label, (low, median, high) in rows.items():
            console.print(
                f"{label} on two devices over a plain step on one, {name}: "
                f"{median:.3f} ({low:.3f} to {high:.3f})"
            )


def judge(console: Console, results: dict[str, Any]) -> None:
    for name, rows in results["models"].items():
        for label in ("msam, SGD's momentum given", "msam, door 1", "msam, door 2"):
            for quantity, limit in TARGETS.items():
                value = rows[label][quantity]
                value = value[1] if quantity == "time" else value
                hand = rows["by hand, its own momentum"][quantity]
                hand = hand[1] if quantity == "time" else hand
                verdict = "met" if value <= limit else "NOT met"
                console.print(
                    f"{verdict}: {name}, {label}, {quantity} {value:.4g} against "
                    f"{limit:g} (by hand, its own momentum: {hand:.4g})"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("."))
    parser.add_argument("--rounds", type=int, help="default 40; 5 with --quick")
    parser.add_argument("--task", choices=CHILDREN, help=argparse.SUPPRESS)
    options = parser.parse_args()
    rounds = options.rounds or (5 if options.quick else 40)
    if options.task:
        timed = {"rounds": rounds} if options.task == "sampa" else {}
        print(json.dumps(CHILDREN[options.task](**timed)))
        return
    devices = "--xla_force_host_platform_device_count"
    results = {
        "device": str(jax.devices()[0]),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "rounds": rounds,
        "models": {name: measure_model(name, rounds) for name in SMALL},
        "late_sam": same_trainings(),
        "collectives": in_a_process("collectives", f"{devices}=8"),
        "sampa": in_a_process(
            "sampa",
            f"{devices}=2 --xla_cpu_multi_thread_eigen=false",
            *("--rounds", str(rounds)),
        ),
    }
    console = Console()
    show(console, results)
    judge(console, results)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "price.json"
    path.write_text(compact_json(results) + "\n")
    console.print(f"Saved {path}")


if __name__ == "__main__":
    main()
