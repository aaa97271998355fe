"""SAM on all devices of one process, of several, or of a cluster; the script is one.

    python examples/data_parallel.py
    python examples/data_parallel.py --coordinator 127.0.0.1:1234 --process 0 --of 2
    python examples/data_parallel.py --cluster

The first line uses the devices of this process. The second runs once for each process,
with its own number. The third is for clusters that JAX knows (Slurm, Cloud TPU, ...),
where it finds the rest by itself. Nothing in the training differs: the batch is spread
over all devices, and `jit` does the communication. With `--m 32` every 32 examples have
a perturbation of their own; without, the whole batch shares one.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import sam_optax

BATCH, STEPS = 256, 200


def predict(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def loss_fn(params, x, y):
    logits = predict(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def init_params():
    key_1, key_2 = jax.random.split(jax.random.key(0))
    return {
        "w1": jax.random.normal(key_1, (64, 64)) / 8,
        "b1": jnp.zeros(64),
        "w2": jax.random.normal(key_2, (64, 10)) / 8,
        "b2": jnp.zeros(10),
    }


def train(m: int | None) -> float:
    """Trains on all devices, and returns the test accuracy in %."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    sharded, replicated = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    sam = sam_optax.sam(rho=0.1)
    tx = optax.chain(sam, optax.sgd(0.1, momentum=0.9))
    loss_and_grads = sam_optax.sam_value_and_grad(
        loss_fn, sam, batch_argnums=(1, 2), m=m
    )

    @jax.jit
    def start():
        params = jax.lax.with_sharding_constraint(init_params(), replicated)
        return params, jax.lax.with_sharding_constraint(tx.init(params), replicated)

    @jax.jit
    def step(params, opt_state, x, y):
        loss, grads = loss_and_grads(params, x, y, opt_state=opt_state)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    images, labels = load_digits(return_X_y=True)
    x, test_x, y, test_y = train_test_split(
        (images / 16).astype(np.float32), labels, random_state=0
    )
    # Each process passes its own part of the batch, and need not load the others'.
    part = BATCH // jax.process_count()
    own = slice(jax.process_index() * part, (jax.process_index() + 1) * part)
    rng = np.random.default_rng(0)
    with jax.set_mesh(mesh):
        params, opt_state = start()
        for number in range(STEPS):
            batch = rng.choice(len(x), BATCH, replace=False)[own]
            local = (x[batch], y[batch])
            images, labels = (
                jax.make_array_from_process_local_data(sharded, a) for a in local
            )
            params, opt_state, loss = step(params, opt_state, images, labels)
            # Simulated devices of one CPU can block each other if steps run at once.
            jax.block_until_ready(loss)
            if jax.process_index() == 0 and number % 50 == 0:
                print(f"step {number:3d}: loss {loss:.3f}", flush=True)

    on_host = jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), params)
    right = jnp.argmax(predict(on_host, test_x), axis=-1) == test_y
    return 100 * float(jnp.mean(right))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--coordinator", help="address:port of process 0")
    parser.add_argument("--of", type=int, help="how many there are")
    parser.add_argument("--process", type=int, help="the number of this one, from 0")
    parser.add_argument("--cluster", action="store_true", help="let JAX find these")
    parser.add_argument("--m", type=int, help="examples that share a perturbation")
    args = parser.parse_args()
    if args.cluster:
        jax.distributed.initialize()
    elif args.coordinator:
        jax.distributed.initialize(args.coordinator, args.of, args.process)

    accuracy = train(args.m)
    if jax.process_index() == 0:
        print(f"{jax.process_count()} processes, {jax.device_count()} devices")
    print(f"process {jax.process_index()}: test accuracy {accuracy:.2f} %")


if __name__ == "__main__":
    main()
