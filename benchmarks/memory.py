"""What a step on a large model keeps in memory and sends between devices.

Run it with::

    python benchmarks/memory.py

It compiles training steps of a decoder for many simulated devices, and asks the
compiler what they would take. Nothing is run and no array is made, so models of any
size compile on a laptop. For each step it reports, per device:

- temporary memory: what the step needs beside its arguments and results, and its peak
  memory, which counts these as well;
- how many collective operations of each kind run in a step, and the bytes of their
  results;
- the floating-point operations that the compiler counts, and the time to compile.

The default is a decoder of 1.27 billion parameters on 8 devices, with parameters,
gradients and optimizer states sharded over them (FSDP), under AdamW. The steps are
AdamW alone, SAM by hand, every method of `sam_optax` through both doors (door 1 is
`sam_value_and_grad`, door 2 is `update` with `grad_fn=`), and the ways to save memory
that docs/large-models.md describes. `--full` adds 7 billion parameters, 64 and 256
devices, and two other layouts, for a few methods of each kind. To choose::

    python benchmarks/memory.py --models 7B --devices 64 --steps AdamW sam

Each setting is compiled in a process of its own. The results are written to
`memory.json` and `memory.md` in the output directory.

The figures are those of XLA for a CPU. It has no reduce-scatter, so it averages whole
gradients of one layer at a time, and keeps its own part. It also computes in float32
what it has no half-precision instruction for. So read the differences between steps,
rather than the figures of one of them.

`--target TPU` asks XLA for a TPU v5p in its place, on a machine without one. This needs
the package `libtpu`, takes minutes for a step of the default model, and counts a
collective operation in a loop once.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX is imported

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from measure import compact_json
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

import sam_optax

RHO, GIB = 0.05, 2**30
BASE = optax.adamw(1e-4)
MICRO_BATCHES = 4  # per batch, in the steps that have them
RANK = 16  # of the adapters


# --- The model.


class Size(NamedTuple):
    """Sizes of a decoder, and of the batch of one device."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    length: int  # tokens of an example
    batch: int  # examples on a device


MODELS = {
    "tiny": Size(2, 32, 2, 64, 8, 4),
    "1.27B": Size(24, 2048, 16, 32000, 512, 4),
    "7B": Size(34, 4096, 32, 32000, 512, 4),
}


class Weight(NamedTuple):
    """The shape of a parameter, and which of its axes each layout divides."""

    shape: tuple[int, ...]
    over_data: int | None = None  # the axis that FSDP divides
    over_model: int | None = None  # the axis that tensor parallelism divides

    def spec(self, *, data: bool, model: bool) -> P:
        names: list[str | None] = [None] * len(self.shape)
        if data and self.over_data is not None:
            names[self.over_data] = "data"
        if model and self.over_model is not None:
            names[self.over_model] = "model"
        return P(*names)


def make_weights(size: Size) -> dict[str, Any]:
    """The parameters; those of the layers are stacked along a first axis."""
    n, d = size.layers, size.width
    return {
        "embedding": Weight((size.vocabulary, d), 1, 0),
        "layers": {
            "attention": Weight((n, d, 3, d), 1, 3),
            "out": Weight((n, d, d), 2, 1),
            "up": Weight((n, d, 4 * d), 1, 2),
            "down": Weight((n, 4 * d, d), 2, 1),
            "norms": Weight((n, 2, d)),
        },
        "norm": Weight((d,)),
    }


def make_adapters(size: Size) -> dict[str, Any]:
    """LoRA's two factors for each matrix of a layer but the embedding."""
    n, d = size.layers, size.width
    outputs = {"attention": (3, d), "out": (d,), "up": (4 * d,), "down": (d,)}
    inputs = {"down": 4 * d}
    return {
        name: {
            "a": Weight((n, inputs.get(name, d), RANK)),
            "b": Weight((n, RANK, *shape)),
        }
        for name, shape in outputs.items()
    }


LAYOUTS = ("data parallel", "FSDP", "FSDP × tensor parallel")
TARGETS = ("CPU", "TPU")
TPU_TOPOLOGIES = {8: "v5p:2x2x2", 64: "v5p:4x4x4", 256: "v5p:4x8x8"}
# So that libtpu does not look for the machine that it is on.
TPU_VARIABLES = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-16",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model on a mesh of devices."""

    model: str
    devices: int
    layout: str
    dtype: str = "bfloat16"
    target: str = "CPU"

    @property
    def size(self) -> Size:
        return MODELS[self.model]

    @functools.cached_property
    def mesh(self) -> Any:
        tensor = self.layout == "FSDP × tensor parallel"
        along = max(2, math.isqrt(self.devices) // 2) if tensor else 1
        return jax.make_mesh(
            (self.devices // along, along),
            ("data", "model"),
            axis_types=(AxisType.Auto,) * 2,
            devices=self.compile_for,
        )

    @property
    def compile_for(self) -> Sequence[Any] | None:
        """Devices that need not exist; None for the simulated ones."""
        if self.target == "CPU":
            return None
        name = TPU_TOPOLOGIES[self.devices]
        return topologies.get_topology_desc(name, "tpu").devices

    def place(self, *names: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, P(*names))

    def stored(self, weight: Weight) -> NamedSharding:
        """Where a parameter, and everything of its shape, is kept."""
        sharded = self.layout != "data parallel"
        return NamedSharding(self.mesh, weight.spec(data=sharded, model=True))

    def used(self, weight: Weight) -> NamedSharding:
        """Where a parameter is used: all of it, or its part along the model axis."""
        return NamedSharding(self.mesh, weight.spec(data=False, model=True))

    def in_use(self, weight: Weight, value: Any, first: int = 0) -> jax.Array:
        """A weight as the computation takes it, from axis `first` on."""
        spec = self.used(weight).spec
        value = value.astype(self.dtype)
        sharding = NamedSharding(self.mesh, P(*spec[first:]))
        return jax.lax.with_sharding_constraint(value, sharding)

    def over_batch(self, x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, self.place("data"))


def is_weight(node: Any) -> bool:
    return isinstance(node, Weight)


def normalize(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    root = jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + 1e-6)
    return (wide * root * scale).astype(x.dtype)


def make_loss(setting: Setting) -> Callable[..., jax.Array]:
    """(parameters, tokens, adapters or None) -> the mean loss of the next tokens."""
    size, weights = setting.size, make_weights(setting.size)

    def layer(x, parameters):
        w, adapters = parameters
        w = {
            name: setting.in_use(weights["layers"][name], w[name], first=1)
            for name in w
        }

        def apply(name, x):
            y = jnp.tensordot(x, w[name], 1)
            if adapters is None:
                return y
            a, b = (adapters[name][factor].astype(x.dtype) for factor in "ab")
            return y + jnp.tensordot(x @ a, b, 1)

        before_attention, before_mlp = w["norms"]
        qkv = apply("attention", normalize(x, before_attention))
        heads = (*x.shape[:2], 3, size.heads, size.width // size.heads)
        q, k, v = jnp.moveaxis(qkv.reshape(heads), 2, 0)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = setting.over_batch(x + apply("out", mixed.reshape(x.shape)))
        hidden = jax.nn.gelu(apply("up", normalize(x, before_mlp)))
        return setting.over_batch(x + apply("down", hidden)), None

    def loss_fn(params, tokens, adapters=None):
        embedding = setting.in_use(weights["embedding"], params["embedding"])
        x = setting.over_batch(embedding[tokens[:, :-1]])
        stacked = params["layers"], adapters
        x, _ = jax.lax.scan(jax.checkpoint(layer), x, stacked)
        logits = normalize(x, params["norm"]) @ embedding.T
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), tokens[:, 1:]
        )
        return jnp.mean(losses)

    return loss_fn


# --- The steps: functions of (params, optimizer state, tokens).


class Step(NamedTuple):
    """A step, and the optimizer whose state it carries.

    `trained` gives the weights that are trained, `frozen` those that are not.
    """

    run: Callable[..., Any]
    tx: Any
    trained: Callable[[Size], Any] = make_weights
    frozen: Callable[[Size], Any] | None = None


def perturbed(params: Any, u: Any) -> Any:
    norm = optax.tree.norm(u)
    return jax.tree.map(lambda w, u: w + RHO / norm * u, params, u)


def descend(tx: Any, params: Any, state: Any, d: Any, loss: Any) -> Any:
    updates, state = tx.update(d, state, params)
    return optax.apply_updates(params, updates), state, loss


def plain(loss_fn: Any) -> Step:
    def step(params, state, *batch):
        loss, g = jax.value_and_grad(loss_fn)(params, *batch)
        return descend(BASE, params, state, g, loss)

    return Step(step, BASE)


def by_hand(loss_fn: Any) -> Step:
    def step(params, state, *batch):
        loss, g = jax.value_and_grad(loss_fn)(params, *batch)
        d = jax.grad(loss_fn)(perturbed(params, g), *batch)
        return descend(BASE, params, state, d, loss)

    return Step(step, BASE)


def gsam_by_hand(loss_fn: Any) -> Step:
    def step(params, state, *batch):
        loss, g = jax.value_and_grad(loss_fn)(params, *batch)
        ga = jax.grad(loss_fn)(perturbed(params, g), *batch)
        share = optax.tree.vdot(g, ga) / optax.tree.vdot(ga, ga)
        d = jax.tree.map(lambda ga, g: ga - 0.4 * (g - share * ga), ga, g)
        return descend(BASE, params, state, d, loss)

    return Step(step, BASE)


def in_a_branch(loss: jax.Array, grad_fn: Any) -> Any:
    """A gradient that is taken only where the loss is finite, and is NaN elsewhere.

    The compiler plans the memory of a branch by itself. So it cannot reserve memory for
    the second pass before the first one has ended.
    """

    def branch(point):
        def skip(point):
            return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), point)

        return jax.lax.cond(jnp.isfinite(loss), grad_fn, skip, point)

    return branch


def by_hand_in_a_branch(loss_fn: Any) -> Step:
    def step(params, state, *batch):
        loss, g = jax.value_and_grad(loss_fn)(params, *batch)
        grad_fn = in_a_branch(loss, lambda point: jax.grad(loss_fn)(point, *batch))
        return descend(BASE, params, state, grad_fn(perturbed(params, g)), loss)

    return Step(step, BASE)


def door2_in_a_branch(loss_fn: Any, sam: Any) -> Step:
    tx = optax.chain(sam, BASE)

    def step(params, state, *batch):
        loss, g = jax.value_and_grad(loss_fn)(params, *batch)
        grad_fn = in_a_branch(loss, lambda point: jax.grad(loss_fn)(point, *batch))
        updates, state = tx.update(g, state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state, loss

    return Step(step, tx)


def momentum_by_hand(loss_fn: Any) -> Step:
    """SAM with one gradient: along AdamW's own first moment, and against it."""

    def step(params, state, *batch):
        moment = jax.tree.map(jnp.negative, state[0].mu)
        loss, d = jax.value_and_grad(loss_fn)(perturbed(params, moment), *batch)
        return descend(BASE, params, state, d, loss)

    return Step(step, BASE)


def door1(loss_fn: Any, sam: Any, **options: Any) -> Step:
    tx = optax.chain(sam, BASE)
    loss_and_grads = sam_optax.sam_value_and_grad(loss_fn, sam, **options)

    def step(params, state, *batch):
        loss, grads = loss_and_grads(params, *batch, opt_state=state)
        return descend(tx, params, state, grads, loss)

    return Step(step, tx)


def door2(loss_fn: Any, sam: Any) -> Step:
    tx = optax.chain(sam, BASE)

    def step(params, state, *batch):
        value_and_grad = sam_optax.value_and_ascent_grad(loss_fn)
        loss, g, extra_args = value_and_grad(params, *batch)
        updates, state = tx.update(g, state, params, **extra_args)
        return optax.apply_updates(params, updates), state, loss

    return Step(step, tx)


DOORS = {"": door1, ", door 2": door2}  # by what follows the name of a method


def in_micro_batches(loss_fn: Any) -> Any:
    """The same loss, one micro-batch after the other, in the memory of one."""

    def loss_of_all(params, tokens):
        # Each micro-batch takes every k-th example, so each device has its part of it.
        micro = tokens.reshape(-1, MICRO_BATCHES, tokens.shape[-1]).swapaxes(0, 1)
        one = jax.checkpoint(lambda tokens: loss_fn(params, tokens))
        return jax.lax.map(one, micro).mean()

    return loss_of_all


def on_adapters(step: Step) -> Step:
    """The same step on LoRA's factors, with all else frozen."""
    return step._replace(trained=make_adapters, frozen=make_weights)


FSAM_IN_BFLOAT16 = sam_optax.sharpness_aware(
    sam_optax.ascents.with_state_dtype(sam_optax.ascents.fsam(RHO))
)


def make_steps(setting: Setting) -> dict[str, Callable[[], Step]]:
    """name -> a function that builds the step."""
    loss_fn = make_loss(setting)
    micro_loss = in_micro_batches(loss_fn)

    def adapter_loss(adapters, tokens, frozen):
        return loss_fn(frozen, tokens, adapters)

    quarter = sam_optax.data.sub_batch(0.25)
    examples = setting.size.batch * setting.mesh.shape["data"] // MICRO_BATCHES
    sam = sam_optax.sam
    steps: dict[str, Callable[[], Step]] = {
        "AdamW": lambda: plain(loss_fn),
        "SAM by hand": lambda: by_hand(loss_fn),
        "GSAM by hand": lambda: gsam_by_hand(loss_fn),
        "momentum-SAM by hand": lambda: momentum_by_hand(loss_fn),
        "sam, guard=False": lambda: door1(loss_fn, sam(RHO, guard=False)),
        "SAM by hand, in a branch": lambda: by_hand_in_a_branch(loss_fn),
        "sam, in a branch": lambda: door2_in_a_branch(loss_fn, sam(RHO)),
        "gsam, in a branch": lambda: door2_in_a_branch(loss_fn, sam_optax.gsam(RHO)),
        "fsam, in a branch": lambda: door2_in_a_branch(loss_fn, sam_optax.fsam(RHO)),
        "fsam, average in bfloat16": lambda: door1(loss_fn, FSAM_IN_BFLOAT16),
        "AdamW, micro-batches": lambda: plain(micro_loss),
        "SAM by hand, micro-batches": lambda: by_hand(micro_loss),
        "sam, micro-batches": lambda: door1(micro_loss, sam(RHO)),
        "sam, m= and scan": lambda: door1(
            loss_fn, sam(RHO), m=examples, map_groups="scan"
        ),
        "sam, a quarter ascends": lambda: door1(loss_fn, sam(RHO), data=quarter),
        "AdamW, adapters": lambda: on_adapters(plain(adapter_loss)),
        "SAM by hand, adapters": lambda: on_adapters(by_hand(adapter_loss)),
        "sam, adapters": lambda: on_adapters(door1(adapter_loss, sam(RHO))),
    }
    for name, method in sam_optax.METHODS.items():
        for label, door in DOORS.items():
            steps[f"{name}{label}"] = functools.partial(
                lambda door, make: door(loss_fn, make()), door, method.make
            )
    return steps


# --- What a compiled step takes.

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_INSTRUCTION = re.compile(r"%?[\w.-]+ = (\(.*?\)|\S+) ([\w-]+)\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")
_TRUE_FALSE = re.compile(r"(?:true|false)_computation=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"(pred|[a-z]+\d+)\w*\[([\d,]*)\]")


def collectives(program: str) -> dict[str, list[float]]:
    """{kind: [how many run in a step, bytes of their results]}, of an HLO program.

    Those in the body of a loop count as often as the loop runs. Of the branches of a
    conditional, the one that moves most counts.
    """
    computations = dict(_computations(re.sub(r"/\*.*?\*/", "", program)))

    @functools.cache
    def count(name: str) -> tuple[Counter[str], Counter[str]]:
        runs: Counter[str] = Counter()
        moved: Counter[str] = Counter()
        for line in computations.get(name, ()):
            match = _INSTRUCTION.search(line)
            if not match:
                continue
            kind = match[2].removesuffix("-start")
            if kind in COLLECTIVES:
                runs[kind] += 1
                moved[kind] += sum(_bytes(*array) for array in _ARRAY.findall(match[1]))
            for times, called in _calls(line, match[2]):
                chosen = max(map(count, called), key=lambda pair: pair[1].total())
                for total, part in zip((runs, moved), chosen, strict=True):
                    for key, value in part.items():
                        total[key] += times * value
        return runs, moved

    runs, moved = count("ENTRY")
    return {kind: [runs[kind], moved[kind]] for kind in COLLECTIVES if runs[kind]}


def _computations(program: str) -> Iterator[tuple[str, list[str]]]:
    """The name and the lines of each computation; the main one's name is ENTRY."""
    name, lines = None, []
    for line in program.splitlines():
        match = _COMPUTATION.match(line)
        if match:
            name, lines = "ENTRY" if match[1] else match[2], []
        elif line == "}" and name:
            yield name, lines
        else:
            lines.append(line)


def _calls(line: str, operation: str) -> Iterator[tuple[int, list[str]]]:
    """(how often, the computations of which one runs) of one instruction."""
    if operation == "conditional":
        listed = _BRANCHES.search(line)
        names = listed[1].split(",") if listed else _TRUE_FALSE.findall(line)
        yield 1, [name.strip().removeprefix("%") for name in names]
        return
    trips = _TRIPS.search(line)
    times = int(trips[1]) if trips and operation == "while" else 1
    for name in _CALLED.findall(line):
        yield times, [name]


def _bytes(dtype: str, shape: str) -> float:
    bits = re.search(r"\d+", dtype)
    each = int(bits.group()) / 8 if bits else 1  # a pred (a bool) takes a byte
    return each * math.prod(int(n) for n in shape.split(",") if n)


class Footprint(NamedTuple):
    """What one device needs for a step, in bytes, and what it sends."""

    temporary: int
    peak: int
    arguments: int
    flops: float
    collectives: dict[str, list[float]]
    compile_seconds: float


def compile_step(setting: Setting, step: Step) -> Footprint:
    """Compiles a step for all devices, from shapes and shardings alone."""

    def as_arrays(weights, dtype=jnp.float32):
        return jax.tree.map(
            lambda w: jax.ShapeDtypeStruct(w.shape, dtype, sharding=setting.stored(w)),
            weights,
            is_leaf=is_weight,
        )

    params = as_arrays(step.trained(setting.size))
    # A leaf of the state is kept as the parameters of its shape are.
    kept = {w.shape: w.sharding for w in jax.tree.leaves(params)}
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=kept.get(x.shape, setting.place())
        ),
        jax.eval_shape(step.tx.init, params),
    )
    examples = setting.size.batch * setting.mesh.shape["data"]
    tokens = jax.ShapeDtypeStruct(
        (examples, setting.size.length + 1), jnp.int32, sharding=setting.place("data")
    )
    batch = [tokens]
    if step.frozen:
        batch.append(as_arrays(step.frozen(setting.size), jnp.dtype(setting.dtype)))

    start = time.perf_counter()
    shardings = jax.tree.map(lambda x: x.sharding, (params, state))
    jitted = jax.jit(
        step.run, donate_argnums=(0, 1), out_shardings=(*shardings, setting.place())
    )
    compiled = jitted.lower(params, state, *batch).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Footprint(
        memory.temp_size_in_bytes,
        memory.argument_size_in_bytes + results + memory.temp_size_in_bytes,
        memory.argument_size_in_bytes,
        compiled.cost_analysis().get("flops", math.nan),
        collectives(compiled.as_text()),
        seconds,
    )


def compile_all(setting: Setting, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(name, footprint) of each step; in this process, which has the devices."""
    steps = make_steps(setting)
    for name in names:
        yield name, compile_step(setting, steps[name]())


def compile_in_child(
    setting: Setting, names: Sequence[str]
) -> Iterator[tuple[str, Footprint]]:
    """`compile_all` in a process that simulates the devices of the setting."""
    flag = f"--xla_force_host_platform_device_count={setting.devices}"
    flags = os.environ.get("XLA_FLAGS", "")
    request = json.dumps([dataclasses.asdict(setting), list(names)])
    with subprocess.Popen(
        [sys.executable, __file__, "--child", request],
        env={
            **os.environ,
            **(TPU_VARIABLES if setting.target == "TPU" else {}),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{flags} {flag}",
        },
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout or ():
            name, footprint = json.loads(line)
            yield name, Footprint(**footprint)
    if process.returncode:
        raise RuntimeError(f"compiling for {setting} failed")


def answer(request: str) -> None:
    """What the child prints: a line of JSON for each step."""
    setting, names = json.loads(request)
    for name, footprint in compile_all(Setting(**setting), names):
        print(json.dumps([name, footprint._asdict()]), flush=True)


# --- The tables.


def count_parameters(size: Size) -> int:
    weights = jax.tree.leaves(make_weights(size), is_leaf=is_weight)
    return sum(math.prod(weight.shape) for weight in weights)


def shard_bytes(setting: Setting) -> float:
    """The parameters that one device keeps, in float32."""
    copies = 1 if setting.layout == "data parallel" else setting.devices
    return 4 * count_parameters(setting.size) / copies


def table(setting: Setting, results: dict[str, Footprint]) -> str:
    """A Markdown table of one setting."""
    reference = results.get("SAM by hand")
    lines = [
        "| step | temporary, GiB | over by hand | peak, GiB | all-gather "
        "| all-reduce | other collectives | TFLOP | compile, s |",
        "|---" * 9 + "|",
    ]
    for name, step in results.items():
        ratio = f"{step.temporary / reference.temporary:.3f}" if reference else ""
        others = [
            f"{kind} {_sent(step.collectives, kind)}"
            for kind in COLLECTIVES[2:]
            if kind in step.collectives
        ]
        cells = [
            name,
            f"{step.temporary / GIB:.2f}",
            ratio,
            f"{step.peak / GIB:.2f}",
            *(_sent(step.collectives, kind) for kind in COLLECTIVES[:2]),
            ", ".join(others),
            f"{step.flops / 1e12:.2f}",
            f"{step.compile_seconds:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    title = (
        f"## {setting.model}, {setting.devices} devices, {setting.layout}, for a "
        f"{setting.target}\n\n"
        f"The parameters that a device keeps take {shard_bytes(setting) / GIB:.2f} GiB."
    )
    return "\n".join([title, "", *lines])


def _sent(found: dict[str, list[float]], kind: str) -> str:
    count, size = found.get(kind, (0, 0))
    return f"{count:.0f} ({size / GIB:.2f} GiB)"


def report(
    results: dict[Setting, dict[str, Footprint]], command: str
) -> tuple[str, dict[str, Any]]:
    """The page of tables, and the same as a tree for JSON."""
    versions = {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "sam_optax": sam_optax.__version__,
    }
    if any(setting.target == "TPU" for setting in results):
        versions["libtpu"] = importlib.metadata.version("libtpu")
    about = ", ".join(f"{name} {version}" for name, version in versions.items())
    page = "\n\n".join(
        [
            "# Memory and collectives of a step",
            f"`{command}`, on {time.strftime('%Y-%m-%d', time.gmtime())}, with {about}."
            " Figures are per device and step; `benchmarks/memory.py` says what they"
            " mean.",
            *(table(setting, steps) for setting, steps in results.items()),
        ]
    )
    content = {
        "command": command,
        "versions": versions,
        "settings": [
            {
                **dataclasses.asdict(setting),
                "size": setting.size._asdict(),
                "parameters": count_parameters(setting.size),
                "shard": shard_bytes(setting),
                "steps": {name: step._asdict() for name, step in steps.items()},
            }
            for setting, steps in results.items()
        ],
    }
    return page + "\n", content


def save(
    results: dict[Setting, dict[str, Footprint]], command: str, output: pathlib.Path
) -> str:
    """Writes memory.md and memory.json, and returns the former."""
    page, content = report(results, command)
    output.mkdir(parents=True, exist_ok=True)
    (output / "memory.md").write_text(page, encoding="utf-8")
    text = compact_json(content) + "\n"
    (output / "memory.json").write_text(text, encoding="utf-8")
    return page


# --- The command.

# What other settings are compared on: one method of each kind.
FEW = (
    *("AdamW", "SAM by hand", "sam", "sam, door 2", "asam", "fsam", "gsam"),
    *("stable_sam", "look_sam", "random_sam", "sam, a quarter ascends"),
    *("AdamW, adapters", "sam, adapters"),
)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["1.27B"])
    parser.add_argument("--devices", nargs="+", type=int, default=[8])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["FSDP"])
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="bfloat16",
        help="dtype to compute in; parameters are float32 (default: %(default)s)",
    )
    parser.add_argument(
        "--target",
        choices=TARGETS,
        default="CPU",
        help="whose compiler is asked (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        nargs="+",
        metavar="STEP",
        help="only these; `methods` are all methods through both doors (default: all)",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="also 7B, 64 and 256 devices, and the other layouts, for a few steps",
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("results"),
        help="directory of memory.json and memory.md (default: %(default)s)",
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.target == "TPU":
        if args.full or not set(args.devices) <= set(TPU_TOPOLOGIES):
            known = [*TPU_TOPOLOGIES]
            parser.error(f"--target TPU goes with --devices {known}, not with --full.")
        if not importlib.util.find_spec("libtpu"):
            parser.error("--target TPU needs libtpu: pip install libtpu")
    known = make_steps(Setting("tiny", 1, "FSDP"))
    if "methods" in (args.steps or ()):
        place = args.steps.index("methods")
        names = [f"{name}{door}" for name in sam_optax.METHODS for door in DOORS]
        args.steps[place : place + 1] = names
    unknown = set(args.steps or ()) - set(known)
    if unknown:
        parser.error(f"there is no step {sorted(unknown)[0]!r}; there are {[*known]}.")
    return args


def make_plan(args: argparse.Namespace) -> dict[Setting, list[str]]:
    """The steps of each setting."""
    every = list(make_steps(Setting("tiny", 1, "FSDP")))
    plan = {
        Setting(model, devices, layout, args.dtype, args.target): list(
            args.steps or every
        )
        for model in args.models
        for devices in args.devices
        for layout in args.layouts
    }
    if args.full:
        for model in ("1.27B", "7B"):
            for devices in (8, 64, 256):
                for layout in LAYOUTS:
                    setting = Setting(model, devices, layout, args.dtype)
                    plan.setdefault(setting, list(args.steps or FEW))
    return plan


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.child:
        answer(args.child)
        return 0
    plan = make_plan(args)
    given = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "benchmarks/memory.py", *given])
    page = ""
    console = Console(width=120)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn())
    results: dict[Setting, dict[str, Footprint]] = {}
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("compile", total=sum(map(len, plan.values())))
        for setting, names in plan.items():
            label = f"{setting.model}, {setting.devices} devices, {setting.layout}"
            progress.update(task, description=label)
            results[setting] = {}
            for name, footprint in compile_in_child(setting, names):
                results[setting][name] = footprint
                # After every step, because a long run may be cut short.
                page = save(results, command, args.output)
                progress.advance(task)
    console.print(page, markup=False, soft_wrap=True)
    console.print(f"Wrote memory.json and memory.md in {args.output}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
