"""SAM on normalisation layers, and a radius for each layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import problem
import sam_optax
from lab import assert_trees_equal, gradient
from sam_optax import ascents
from sam_optax.methods import mask_by_name, normalization_layers


def epsilon_of(sam, w, g):
    points = []
    sam.update(g, sam.init(w), w, grad_fn=lambda q: points.append(q) or g)
    return jax.tree.map(jnp.subtract, points[-1], w)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("p", [2, 3, np.inf])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_radius_of_layers_at_every_loss_scale(p, scale):
    w = problem.params(jnp.float64)
    g = gradient(problem.params(), problem.batch())
    g = jax.tree.map(lambda x: jnp.asarray(x * scale, jnp.float64), g)
    mask = {"a": True, "b": {"c": True, "d": False}}
    sam = sam_optax.layerwise_sam(0.3, 0.5, p=p, adaptive_mask=mask)
    epsilon = epsilon_of(sam, w, g)
    norms = [jnp.linalg.norm(w["a"]), jnp.linalg.norm(w["b"]["c"]), 1 / 1.5]
    scaled = [
        jnp.ravel(e) / (1.5 * norm)
        for e, norm in zip(jax.tree.leaves(epsilon), norms, strict=True)
    ]
    found = jnp.linalg.norm(jnp.concatenate(scaled), ord=p)
    assert found == pytest.approx(0.3, rel=1e-7)
    # Of all ε with that radius, this one raises the linearised loss most: by ρ times
    # the dual norm of T g.
    rise = sum(map(jnp.vdot, jax.tree.leaves(epsilon), jax.tree.leaves(g)))
    weighed = [
        jnp.ravel(x) * 1.5 * norm
        for x, norm in zip(jax.tree.leaves(g), norms, strict=True)
    ]
    dual = 1.0 if p == np.inf else p / (p - 1)
    wanted = 0.3 * jnp.linalg.norm(jnp.concatenate(weighed) / scale, ord=dual)
    assert rise / scale == pytest.approx(float(wanted), rel=1e-7)


def test_a_layer_of_zeros_is_not_perturbed():
    w = {"kernel": jnp.array([3.0, 4.0]), "bias": jnp.zeros(2)}
    g = {"kernel": jnp.array([0.0, 1.0]), "bias": jnp.ones(2)}
    epsilon = epsilon_of(sam_optax.layerwise_sam(0.1), w, g)
    np.testing.assert_array_equal(epsilon["bias"], 0)
    np.testing.assert_allclose(epsilon["kernel"], [0, 0.5], rtol=1e-6)


def test_sam_on_is_sam_under_the_mask_of_names():
    w = {
        "Dense_0": {"kernel": jnp.ones((2, 2))},
        "LayerNorm_0": {"scale": jnp.array([2.0])},
        "bn1": [jnp.array([1.0])],
    }
    g = jax.tree.map(lambda x: 3 * x, w)
    mask = {
        "Dense_0": {"kernel": False},
        "LayerNorm_0": {"scale": True},
        "bn1": [True],
    }
    assert normalization_layers(w) == mask
    epsilon = epsilon_of(sam_optax.sam_on(0.2), w, g)
    assert_trees_equal(epsilon, epsilon_of(sam_optax.sam(0.2, mask=mask), w, g))
    np.testing.assert_array_equal(epsilon["Dense_0"]["kernel"], 0)


def test_names_that_no_parameter_has_raise():
    w = {"dense": jnp.ones(2)}
    with pytest.raises(ValueError, match="No parameter has a name with 'norm' or 'bn'"):
        sam_optax.sam_on().init(w)
    for words in ((), ("",), (3,)):
        with pytest.raises(TypeError, match="A mask by name needs words"):
            mask_by_name(*words)
    assert mask_by_name("DENSE")(w) == {"dense": True}


def test_the_spectral_scale_of_a_shape():
    u = {"dense": jnp.ones((8, 2)), "conv": jnp.ones((3, 3, 4, 9)), "bias": jnp.ones(9)}
    scaled, _ = ascents.scale_by_fans().update(u, ())
    wanted = {"dense": 0.5, "conv": 0.5, "bias": 3.0}
    for name, factor in wanted.items():
        np.testing.assert_allclose(scaled[name], factor, rtol=1e-6)
    # Of a layer with its norm before it, ‖ε‖ = ρ √(fan_out/fan_in).
    ascent = ascents.chain(
        ascents.normalize_by_leaf_norm(),
        ascents.scale_by_fans(),
        ascents.scale_by_rho(0.1),
    )
    epsilon, _ = ascent.update(u, ascent.init(u), u)
    assert jnp.linalg.norm(epsilon["dense"]) == pytest.approx(0.05, rel=1e-6)
    assert ascents.scale_by_fans().update(jnp.ones(()), ())[0] == 1
    other = ascents.scale_by_fans(lambda shape: (shape[-1], shape[0]))
    np.testing.assert_allclose(other.update(jnp.ones((8, 2)), ())[0], 2.0)
    with pytest.raises(ValueError, match=r"it returned \(0, 2\)"):
        ascents.scale_by_fans(lambda shape: (0, 2)).update(jnp.ones(2), ())
    with pytest.raises(ValueError, match=r"it returned \(1, inf\)"):
        ascents.scale_by_fans(lambda shape: (1, jnp.inf)).update(jnp.ones(2), ())


def test_impossible_arguments():
    with pytest.raises(ValueError, match="eta must be >= 0"):
        ascents.scale_by_leaf_norm(-1.0)
    with pytest.raises(TypeError, match="adaptive_mask must be a tree of bools"):
        sam_optax.layerwise_sam(adaptive_mask=True)
    with pytest.raises(ValueError, match="p must be >= 1"):
        sam_optax.layerwise_sam(p=0.5)
    with pytest.raises(ValueError, match="p must be >= 1"):
        sam_optax.sam_on(p=0.5)
