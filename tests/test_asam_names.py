"""The mask of docs/masks.md: ASAM's T is 1 on biases alone, in every framework."""

import pathlib
import re

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sam_optax

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "masks.md"


@pytest.fixture(scope="module")
def all_but_biases():
    """The function that the page tells users to write."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    (block,) = [block for block in blocks if "def all_but_biases" in block]
    namespace = {"jax": jax}
    exec(block[: block.index("\n\n\n")], namespace)
    return namespace["all_but_biases"]


def linen():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(3, (2,))(nn.Embed(5, 4)(x))
            x = nn.LayerNorm()(nn.BatchNorm(use_running_average=True)(x))
            return nn.Dense(2)(x)

    return Model().init(jax.random.key(0), jnp.zeros((2, 3), int))["params"]


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(2, 3, rngs=rngs)
        self.norm = nnx.LayerNorm(3, rngs=rngs)
        self.batch_norm = nnx.BatchNorm(3, rngs=rngs)


class Equinox(eqx.Module):
    norm: eqx.nn.LayerNorm
    layers: list

    def __init__(self):
        self.norm = eqx.nn.LayerNorm(3)
        self.layers = [eqx.nn.Linear(3, 2, key=jax.random.key(0))]


MODELS = {
    "linen": linen,
    "nnx": lambda: nnx.state(Nnx(nnx.Rngs(0)), nnx.Param),
    "nnx, pure": lambda: nnx.to_pure_dict(nnx.state(Nnx(nnx.Rngs(0)), nnx.Param)),
    "equinox": lambda: eqx.filter(Equinox(), eqx.is_array),
}


@pytest.mark.parametrize("model", MODELS)
def test_kernels_and_scales_are_scaled_and_biases_are_not(model, all_but_biases):
    """On weights of 2, with g of ones: ε is along T², which is 2² where T = |w|."""
    params = jax.tree.map(lambda w: jnp.full_like(w, 2), MODELS[model]())
    sam = sam_optax.asam(rho=1.0, eta=0.0, adaptive_mask=all_but_biases)
    g, points = jax.tree.map(jnp.ones_like, params), []
    sam.update(g, sam.init(params), params, grad_fn=lambda w: points.append(w) or g)
    moved = jax.tree.map(jnp.subtract, points[0], params)
    named = [
        (jax.tree_util.keystr(path), e)
        for path, e in jax.tree_util.tree_leaves_with_path(moved)
    ]
    biases = [e for name, e in named if "bias" in name]
    others = [e for name, e in named if "bias" not in name]
    assert len(biases) == {"linen": 4, "equinox": 2}.get(model, 3)
    assert sum(e.ndim == 1 for e in others) == {"equinox": 1}.get(model, 2)
    squares = sum(4 * e.size for e in others) + sum(e.size for e in biases)
    for e in others:
        np.testing.assert_allclose(e, 4 / np.sqrt(squares), rtol=1e-5)
    for e in biases:
        np.testing.assert_allclose(e, 1 / np.sqrt(squares), rtol=1e-5)
