"""Checks that every deterministic method gives the same numbers on several devices.

Run it with::

    python benchmarks/device_table.py

Each method trains a small network for six steps in float64

- on one device,
- by `pmap`,
- by `shard_map`, with `check_vma` on and off,
- by `jit` with a sharded batch (data parallel),
- by `jit` with a sharded batch and sharded parameters (FSDP), and
- by `jit` on two processes,

once with one perturbation for the whole batch, and once with one for each device or
group. The table shows the largest difference of any parameter from the training on one
device, and whether the replicas are bitwise equal. The optimizer is SGD with momentum,
because a scale-invariant one, such as Adam, would hide a gradient that is wrong by a
factor, such as the number of devices.
"""

import argparse
import functools
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX is imported
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sam_optax

DEVICES, GROUP, STEPS = 4, 4, 6  # four groups of four examples, one per device

# The methods that draw no random numbers, with arguments for which they differ from
# SAM. F-SAM's default sigma of 1 would hide a moving average m that lags one step
# behind: g − m has the same direction before and after m is updated with g.
RHO = 0.2
METHODS = {
    "sam": lambda: sam_optax.sam(RHO),
    "sam, p = inf": lambda: sam_optax.sam(0.02, p=jnp.inf),
    "asam": lambda: sam_optax.asam(RHO),
    "fsam": lambda: sam_optax.fsam(RHO, sigma=0.7),
    "fasam": lambda: sam_optax.fasam(RHO, sigma=0.7),
    "usam": lambda: sam_optax.usam(RHO),
    "unified_sam": lambda: sam_optax.unified_sam(RHO),
    "monge_sam": lambda: sam_optax.monge_sam(RHO),
    "le_sam": lambda: sam_optax.le_sam(RHO, sigma=0.1),
    "layerwise_sam": lambda: sam_optax.layerwise_sam(RHO),
    "zsharp": lambda: sam_optax.zsharp(RHO, quantile=0.5),
    "vasso": lambda: sam_optax.vasso(RHO),
    "fisher_sam": lambda: sam_optax.fisher_sam(RHO),
    "sam_full": lambda: sam_optax.sam_full(RHO),
    "sam_noise": lambda: sam_optax.sam_noise(RHO),
    "gsam": lambda: sam_optax.gsam(RHO),
    "sam_plus_gap": lambda: sam_optax.sam_plus_gap(RHO),
    "stable_sam": lambda: sam_optax.stable_sam(RHO),
    "stable_asam": lambda: sam_optax.stable_asam(RHO),
    "stable_usam": lambda: sam_optax.stable_usam(RHO),
    "wsam": lambda: sam_optax.wsam(RHO),
    "gradient_norm_penalty": lambda: sam_optax.gradient_norm_penalty(RHO),
    "sagm": lambda: sam_optax.sagm(RHO, alpha=0.1),
    "cr_sam": lambda: sam_optax.cr_sam(RHO),
    "gam": lambda: sam_optax.gam(RHO),
    "look_sam": lambda: sam_optax.look_sam(RHO, k=3),
    "sam_every_k": lambda: sam_optax.sam_every_k(RHO, k=3),
    "ae_sam": lambda: sam_optax.ae_sam(RHO),
    "ae_look_sam": lambda: sam_optax.ae_look_sam(RHO),
    "msam": lambda: sam_optax.msam(RHO),
    "late_sam": lambda: sam_optax.late_sam(RHO, start=2),
    "sampa": lambda: sam_optax.sampa(RHO, learning_rate=0.05, momentum=0.9),
    "ssam": lambda: sam_optax.ssam(RHO, refresh_every=2),
    "multi_step_sam": lambda: sam_optax.multi_step_sam(RHO, steps=2),
    "decoupled_wsam": None,  # an optimizer of its own; see make_optimizer
}


def make_optimizer(name):
    """The SAM transformation, and the whole optimizer."""
    base = optax.sgd(0.05, momentum=0.9)
    if name == "decoupled_wsam":
        return sam_optax.decoupled_wsam(base, 0.05, RHO)
    sam = METHODS[name]()
    return sam, optax.chain(sam, base)


def make_params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "in": jax.random.normal(keys[0], (8, 4), jnp.float64),
        "shift": jax.random.normal(keys[1], (4,), jnp.float64),
        "out": jax.random.normal(keys[2], (4,), jnp.float64),
    }


def make_batch(step):
    rng = np.random.default_rng(step)
    return rng.normal(size=(DEVICES * GROUP, 8)), rng.normal(size=DEVICES * GROUP)


def loss_fn(params, x, y):
    hidden = jnp.tanh(x @ params["in"] + params["shift"])
    return jnp.mean(jnp.square(hidden @ params["out"] - y))


def make_step(methods, **options):
    """Returns (start, step), which train all methods in one program.

    One program compiles three times as fast as one for each method. `start(params)`
    returns {method: (params, opt_state)}, and `step(states, x, y)` returns the next
    such dict.
    """
    parts = {}
    for name in methods:
        sam, tx = make_optimizer(name)
        helper = sam_optax.sam_value_and_grad(
            loss_fn, sam, batch_argnums=(1, 2), **options
        )
        parts[name] = helper, tx

    def step_of(name, params, opt_state, x, y):
        loss_and_grads, tx = parts[name]
        _, grads = loss_and_grads(params, x, y, opt_state=opt_state)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def step(states, x, y):
        return {name: step_of(name, *states[name], x, y) for name in methods}

    def start(params):
        return {name: (params, tx.init(params)) for name, (_, tx) in parts.items()}

    return start, step


def make_grouped_step(methods, per_group, map_groups="vmap"):
    """`make_step` for one program on all devices: groups are of examples, by `m=`."""
    options = {"m": GROUP, "map_groups": map_groups} if per_group else {}
    return make_step(methods, **options)


# --- Settings: functions of the methods, and of whether each group has its own
# perturbation. They return a list of replicas: what each device or process holds, as
# {method: parameters}.


def train(step, states, place=lambda batch: batch):
    for t in range(STEPS):
        states = step(states, *place(make_batch(t)))
    return {name: params for name, (params, _) in states.items()}


def one_device(methods, per_group, map_groups="unroll"):
    start, step = make_grouped_step(methods, per_group, map_groups)
    return [train(jax.jit(step), start(make_params()))]


def pmap(methods, per_group):
    start, step = make_step(methods, axis_name="data", sync_perturbation=not per_group)
    params = train(
        jax.pmap(step, axis_name="data", devices=jax.devices()[:DEVICES]),
        jax.tree.map(lambda x: jnp.stack([x] * DEVICES), start(make_params())),
        lambda batch: [x.reshape(DEVICES, GROUP, *x.shape[1:]) for x in batch],
    )
    return [jax.tree.map(lambda x, i=i: x[i], params) for i in range(DEVICES)]


def make_mesh(**axes):
    return jax.make_mesh(
        tuple(axes.values()),
        tuple(axes),
        axis_types=(AxisType.Auto,) * len(axes),
        devices=jax.devices()[:DEVICES],
    )


def copies(params):
    """The copies of replicated parameters that the devices hold."""

    def on(device):
        return jax.tree.map(lambda x: x.addressable_shards[device].data, params)

    return [on(device) for device in range(DEVICES)]


def shard_map(methods, per_group, check_vma):
    start, step = make_step(methods, axis_name="data", sync_perturbation=not per_group)
    mapped = jax.shard_map(
        step,
        mesh=make_mesh(data=DEVICES),
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    return copies(train(jax.jit(mapped), start(make_params())))


def jit(methods, per_group, parameters):
    """By `jit`, with the batch sharded over the devices, and parameters by a spec."""
    start, step = make_grouped_step(methods, per_group)
    mesh = make_mesh(data=DEVICES)

    def place(tree, spec):
        return jax.device_put(tree, NamedSharding(mesh, spec))

    states = start(place(make_params(), parameters))
    params = train(jax.jit(step), states, lambda batch: place(batch, P("data")))
    return [params] if parameters == P("data") else copies(params)


SETTINGS = {
    "pmap": pmap,
    "shard_map": functools.partial(shard_map, check_vma=True),
    "shard_map, no vma": functools.partial(shard_map, check_vma=False),
    "jit": functools.partial(jit, parameters=P()),
    "jit, FSDP": functools.partial(jit, parameters=P("data")),
}


def difference(params, reference):
    """The largest absolute difference of any parameter."""
    return max(
        float(np.max(np.abs(np.asarray(a) - np.asarray(b))))
        for a, b in zip(
            jax.tree.leaves(params), jax.tree.leaves(reference), strict=True
        )
    )


def are_equal(replicas):
    """Whether all replicas are bitwise equal."""
    return all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for replica in replicas[1:]
        for a, b in zip(
            jax.tree.leaves(replicas[0]), jax.tree.leaves(replica), strict=True
        )
    )


# --- Two processes.


def run_process(process, port, directory, methods):
    """Runs one of two processes with half of the devices each; saves its parameters."""
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
    sharding = NamedSharding(make_mesh(data=DEVICES), P("data"))
    replicated = NamedSharding(sharding.mesh, P())

    def place(batch):
        half = len(batch[0]) // 2
        mine = slice(process * half, (process + 1) * half)
        return [
            jax.make_array_from_process_local_data(sharding, x[mine]) for x in batch
        ]

    for per_group in (False, True):
        start, step = make_grouped_step(methods, per_group)
        run = jax.jit(step, out_shardings=replicated)
        params = train(run, start(make_params()), place)
        values = {
            f"{method}/{leaf}": x.addressable_data(0)
            for method, leaves in params.items()
            for leaf, x in leaves.items()
        }
        np.savez(pathlib.Path(directory) / f"{per_group}-{process}.npz", **values)


def two_processes(methods):
    """{per_group: the final parameters of each of two processes}."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flag = f"--xla_force_host_platform_device_count={DEVICES // 2}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag}
    with tempfile.TemporaryDirectory() as directory:
        processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    __file__,
                    *("--process", str(process), str(port), directory),
                    *("--methods", *methods),
                ],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for process in range(2)
        ]
        printed = [process.communicate(timeout=1200)[0] for process in processes]
        # The exit status does not tell: after all work, gRPC's server can fail to shut
        # down.
        if len(list(pathlib.Path(directory).glob("*.npz"))) < 4:
            raise RuntimeError("a process failed:\n" + "\n".join(printed))

        def read(per_group, process):
            params = {method: {} for method in methods}
            name = f"{per_group}-{process}.npz"
            with np.load(pathlib.Path(directory) / name) as file:
                for key in file.files:
                    method, leaf = key.split("/")
                    params[method][leaf] = file[key]
            return params

        return {
            per_group: [read(per_group, process) for process in range(2)]
            for per_group in (False, True)
        }


# --- The table.


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--process", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    if args.process:
        process, port, directory = args.process
        run_process(int(process), int(port), directory, args.methods)
        return 0
    results = {"2 processes": two_processes(args.methods)}
    references = {}
    for per_group in (False, True):
        (references[per_group],) = one_device(args.methods, per_group)
        for name, setting in SETTINGS.items():
            results.setdefault(name, {})[per_group] = setting(args.methods, per_group)

    print(f"{'method':22} {'perturbation':12} " + " ".join(f"{n:>17}" for n in results))
    worst, all_equal = 0.0, True
    for method in args.methods:
        for per_group, reference in references.items():
            cells = ""
            for replicas in results.values():
                own = [replica[method] for replica in replicas[per_group]]
                far, same = difference(own[0], reference[method]), are_equal(own)
                cells += f"{far:>16.1e}" + (" =" if same else " !")
                worst, all_equal = max(worst, far), all_equal and same
            print(f"{method:22} {'per group' if per_group else 'one':12}{cells}")
    print(
        f"largest difference {worst:.1e}; replicas "
        + ("bitwise equal (=)" if all_equal else "differ (!)")
    )
    return 0 if worst <= 1e-10 and all_equal else 1


if __name__ == "__main__":
    sys.exit(main())
