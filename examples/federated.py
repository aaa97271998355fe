"""FedSAM and MoFedSAM: clients that keep their data train with SAM, a server averages.

    python examples/federated.py
    python examples/federated.py --momentum 0.1
    XLA_FLAGS=--xla_force_host_platform_device_count=4 python examples/federated.py

In each round, every client starts from the server's parameters, takes some local SAM
steps on its own data, and returns by how much it moved. The server adds the mean of
that. This is FedSAM. With `--momentum`, the clients step along

    β ∇L_i(w + ε) + (1 − β) Δ,    Δ the mean direction of the last round,

which is MoFedSAM (Qu et al., Generalized Federated Learning via Sharpness Aware
Minimization, ICML 2022). The clients are a mapped axis: of `vmap` on one device, and of
`shard_map` on several, where each device runs its share of them. Each client has digits
of a few classes only, so that they pull in different directions.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import sam_optax

CLIENTS, ROUNDS, LOCAL_STEPS, BATCH = 8, 40, 8, 32
LEARNING_RATE, RHO = 0.2, 0.1


def predict(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def loss_fn(params, x, y):
    logits = predict(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def init_params():
    key_1, key_2 = jax.random.split(jax.random.key(0))
    return {
        "w1": jax.random.normal(key_1, (64, 32)) / 8,
        "b1": jnp.zeros(32),
        "w2": jax.random.normal(key_2, (32, 10)) / 6,
        "b2": jnp.zeros(10),
    }


def local_training(params, direction, batches, beta):
    """How far one client moves, in local steps from the server's parameters."""
    sam = sam_optax.sam(rho=RHO)
    tx = optax.chain(sam, optax.sgd(LEARNING_RATE))
    loss_and_grads = sam_optax.sam_value_and_grad(loss_fn, sam)

    def step(carry, batch):
        w, opt_state = carry
        _, grads = loss_and_grads(w, *batch, opt_state=opt_state)
        # MoFedSAM: d is mixed with the direction of all clients. β = 1 is FedSAM.
        mixed = jax.tree.map(
            lambda d, m: beta * d + (1 - beta) * m, grads.gradients, direction
        )
        updates, opt_state = tx.update(grads.replace(mixed), opt_state, w)
        return (optax.apply_updates(w, updates), opt_state), None

    (w, _), _ = jax.lax.scan(step, (params, tx.init(params)), batches)
    return jax.tree.map(jnp.subtract, w, params)


def mean_move(params, direction, batches, beta):
    """The mean over the clients on this device: batches has an axis of them first."""
    train = functools.partial(local_training, beta=beta)
    moves = jax.vmap(train, in_axes=(None, None, 0))(params, direction, batches)
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), moves)


def make_round(beta=1.0, server_rate=1.0, mesh=None):
    """A round, (params, direction, batches) -> (params, direction)."""

    def over_devices(params, direction, batches):
        # The parameters are the same on all devices before the local steps, and differ
        # after them. Without this, JAX would sum their gradients over the devices.
        params, direction = jax.lax.pcast((params, direction), "clients", to="varying")
        return jax.lax.pmean(mean_move(params, direction, batches, beta), "clients")

    move_of_all = functools.partial(mean_move, beta=beta)
    if mesh is not None:
        move_of_all = jax.shard_map(
            over_devices,
            mesh=mesh,
            in_specs=(P(), P(), P("clients")),
            out_specs=P(),
        )

    @jax.jit
    def federated_round(params, direction, batches):
        move = move_of_all(params, direction, batches)
        steps = jax.tree.leaves(batches)[0].shape[1]
        direction = jax.tree.map(lambda x: -x / (LEARNING_RATE * steps), move)
        return optax.tree.add_scale(params, server_rate, move), direction

    return federated_round


def make_data():
    """((x, y) of each client, sorted by class; (x, y) of the test)."""
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x / 16, y, test_size=0.3, random_state=0)
    order = np.argsort(y, kind="stable")[: len(y) // CLIENTS * CLIENTS]
    x, y = x.astype(np.float32)[order], y[order]
    parts = x.reshape(CLIENTS, -1, 64), y.reshape(CLIENTS, -1)
    return parts, (jnp.asarray(x_test, jnp.float32), jnp.asarray(y_test))


def draw_batches(rng, parts):
    """Arrays (clients, local steps, batch, ...) for one round."""
    x, y = parts
    chosen = rng.integers(x.shape[1], size=(CLIENTS, LOCAL_STEPS, BATCH))
    clients = np.arange(CLIENTS)[:, None, None]
    return jnp.asarray(x[clients, chosen]), jnp.asarray(y[clients, chosen])


def train(beta=1.0, rounds=ROUNDS):
    """Trains on all devices of this process, and returns the test accuracy in %."""
    devices = jax.device_count()
    if CLIENTS % devices:
        raise SystemExit(
            f"{CLIENTS} clients do not spread evenly on {devices} devices."
        )
    mesh = Mesh(jax.devices(), ("clients",)) if devices > 1 else None
    federated_round = make_round(beta, mesh=mesh)
    parts, (x_test, y_test) = make_data()
    params = init_params()
    direction = optax.tree.zeros_like(params)
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        params, direction = federated_round(params, direction, draw_batches(rng, parts))
    predicted = jnp.argmax(predict(params, x_test), axis=-1)
    return float(100 * jnp.mean(predicted == y_test))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--momentum", type=float, default=1.0, help="β of MoFedSAM; default 1: FedSAM"
    )
    beta = parser.parse_args().momentum
    print(f"accuracy: {train(beta):.1f} % on {jax.device_count()} device(s)")


if __name__ == "__main__":
    main()
