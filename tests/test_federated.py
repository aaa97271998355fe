"""FedSAM and MoFedSAM, against a loop over clients and steps by hand."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

PATH = pathlib.Path(__file__).parent.parent / "examples" / "federated.py"
RATE, RHO = 0.2, 0.1

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def federated():
    spec = importlib.util.spec_from_file_location("federated", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_hand(loss_fn, params, rounds, beta):
    """The server's parameters after each round."""
    gradient = jax.jit(jax.grad(loss_fn))
    direction, servers = jax.tree.map(jnp.zeros_like, params), []
    for x, y in rounds:
        moves = []
        for client in range(len(x)):
            w = params
            for step in range(x.shape[1]):
                batch = x[client, step], y[client, step]
                g = gradient(w, *batch)
                size = np.sqrt(sum(float(jnp.sum(v**2)) for v in g.values()))
                at = {n: w[n] + RHO * g[n] / size for n in w}
                d = gradient(at, *batch)
                d = {n: beta * d[n] + (1 - beta) * direction[n] for n in w}
                w = {n: w[n] - RATE * d[n] for n in w}
            moves.append({n: w[n] - params[n] for n in w})
        mean = {n: sum(move[n] for move in moves) / len(moves) for n in params}
        direction = {n: -mean[n] / (RATE * x.shape[1]) for n in params}
        params = {n: params[n] + mean[n] for n in params}
        servers.append(params)
    return servers


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("beta", [1.0, 0.3], ids=["FedSAM", "MoFedSAM"])
def test_on_one_device_and_on_several_it_is_the_loop_by_hand(federated, beta):
    assert (federated.LEARNING_RATE, federated.RHO) == (RATE, RHO)
    parts, _ = federated.make_data()
    rng = np.random.default_rng(1)
    rounds = [
        tuple(a[:, :3, :8] for a in federated.draw_batches(rng, parts))
        for _ in range(3)
    ]
    rounds = [(x.astype(jnp.float64), y) for x, y in rounds]
    start = jax.tree.map(lambda w: w.astype(jnp.float64), federated.init_params())
    expected = by_hand(federated.loss_fn, start, rounds, beta)
    mesh = jax.sharding.Mesh(jax.devices()[:4], ("clients",))
    for on in (None, mesh):
        federated_round = federated.make_round(beta, mesh=on)
        params, direction = start, jax.tree.map(jnp.zeros_like, start)
        for batches, wanted in zip(rounds, expected, strict=True):
            params, direction = federated_round(params, direction, batches)
            for name, value in wanted.items():
                np.testing.assert_allclose(params[name], value, rtol=0, atol=1e-12)


def test_clients_with_a_few_classes_each_learn_all_of_them_together(federated):
    parts, _ = federated.make_data()
    assert max(len(set(labels)) for labels in parts[1]) <= 3
    assert federated.train(rounds=15) > 75


def test_momentum_of_the_server_learns_too(federated):
    assert federated.train(beta=0.3, rounds=15) > 75
