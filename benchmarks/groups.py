"""What m-sharpness costs, depending on how its groups run.

Run it with, for example::

    python benchmarks/groups.py
    python benchmarks/groups.py --devices 2

It times a SAM step that has one perturbation for each group of m examples, where the
groups run together (vmap), in an unrolled program, or one after another (scan). It
divides by the time of a SAM step with one perturbation for the whole batch. The models
are a multilayer perceptron, where passes over the parameters take much of the time, and
a convolutional network. With several (simulated) devices, the batch is sharded over
them. The default of `map_groups=` was chosen by these measurements.
"""

import argparse
import os

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--devices", type=int, default=1, help="(default: 1)")
parser.add_argument("--batch", type=int, default=128, help="(default: 128)")
parser.add_argument("--m", type=int, nargs="+", default=[32, 8], help="(default: 32 8)")
parser.add_argument("--rounds", type=int, default=15, help="(default: 15)")

if __name__ == "__main__":
    args = parser.parse_args()
    if args.devices > 1:  # before JAX is imported
        os.environ["XLA_FLAGS"] = (
            f"--xla_force_host_platform_device_count={args.devices}"
        )

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402
from measure import compile_program, print_ratios  # noqa: E402

import sam_optax  # noqa: E402


def perceptron(params, x):
    return jax.nn.relu(x.reshape(len(x), -1) @ params["in"]) @ params["out"]


def convolutional(params, x):
    for name in ("first", "second", "third"):
        x = jax.lax.conv_general_dilated(
            x, params[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x)
    return jnp.mean(x, axis=(1, 2)) @ params["out"]


def normal(seed, *shape):
    fan_in = 1
    for size in shape[:-1]:
        fan_in *= size
    return jax.random.normal(jax.random.key(seed), shape) / fan_in**0.5


MODELS = {
    "perceptron": (
        perceptron,
        lambda: {"in": normal(0, 768, 1024), "out": normal(1, 1024, 10)},
    ),
    "convolutional": (
        convolutional,
        lambda: {
            "first": normal(0, 3, 3, 3, 32),
            "second": normal(1, 3, 3, 32, 32),
            "third": normal(2, 3, 3, 32, 32),
            "out": normal(3, 32, 10),
        },
    ),
}


def make_step(predict, **options):
    def loss_fn(params, x, y):
        logits = predict(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    sam = sam_optax.sam(0.05)
    loss_and_grads = sam_optax.sam_value_and_grad(
        loss_fn, sam, batch_argnums=(1, 2), **options
    )

    def step(params, x, y):
        loss, grads = loss_and_grads(params, x, y, opt_state=sam.init(params))
        params = jax.tree.map(lambda w, d: w - 0.1 * d, params, grads.gradients)
        return params, loss

    return step


def main() -> None:
    mesh = jax.make_mesh(
        (args.devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    x = jax.random.normal(jax.random.key(4), (args.batch, 16, 16, 3))
    y = jax.random.randint(jax.random.key(5), (args.batch,), 0, 10)
    x, y = jax.device_put((x, y), NamedSharding(mesh, P("data")))
    print(f"jax {jax.__version__}, {args.devices} x {jax.devices()[0].device_kind}")
    for name, (predict, init) in MODELS.items():
        params = jax.device_put(init(), NamedSharding(mesh, P()))
        print(f"\n{name}, batch {args.batch}")
        programs = {
            "one perturbation": compile_program(make_step(predict), params, x, y)
        }
        for m in args.m:
            for how in ("vmap", "unroll", "scan"):
                step = make_step(predict, m=m, map_groups=how)
                programs[f"m = {m}, {how}"] = compile_program(step, params, x, y)
        print_ratios(programs, args.rounds)


if __name__ == "__main__":
    main()
