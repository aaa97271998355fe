"""Masks: what is perturbed, over which leaves norms run, and what is no mask."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import problem
import sam_optax
from lab import assert_trees_close, assert_trees_equal, gradient
from methods import TABLE
from sam_optax import _masks

MASKS = {
    "prefix": {"a": False, "b": True},
    "function": lambda params: {"a": False, "b": {"c": True, "d": True}},
}


@pytest.mark.gradients_alone
@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_perturbs_only_part_but_every_gradient_is_real(kind, mask):
    """On the second step, which the carried state has come to through the first."""
    row, w = TABLE[kind], problem.params()
    sam = row(mask=MASKS[mask], **row.values())
    state = sam.init(w)
    for t in range(2):
        points = []

        def grad_fn(point, points=points, t=t):
            points.append(point)
            return gradient(point, problem.batch(t))

        g = gradient(w, problem.batch(t))
        d, state = sam.update(g, state, w, grad_fn=grad_fn, ascend=True)
        point = points[row.point]
        epsilon = jax.tree.map(jnp.subtract, point, w)
        np.testing.assert_array_equal(point["a"], w["a"])
        if row.radius is not None:
            radius = row.radius(epsilon["b"], w["b"], g["b"], **row.values())
            wanted = row.values()["rho"] if t >= row.since else 0
            assert radius == pytest.approx(wanted, rel=1e-4)
        if row.descends_on_ga:
            assert_trees_close(d, grad_fn(point), rtol=1e-5, atol=1e-6)
        assert w["a"].shape not in [
            x.shape for x in jax.tree.leaves(state.ascent_state)
        ]
        w = jax.tree.map(lambda w, d: w - 0.1 * d, w, d)


def test_an_adaptive_mask_under_a_mask():
    """Each says of its own; T = |w| + η on matrices alone, ε = 0 on vectors alone."""
    w = {"matrix": jnp.full((2, 2), 3.0), "vector": jnp.ones(2), "scalar": jnp.ones(())}
    is_matrix = {"matrix": True, "vector": False, "scalar": False}
    mask = {"matrix": True, "vector": False, "scalar": True}
    points = []
    sam = sam_optax.asam(1.0, 0.5, adaptive_mask=is_matrix, mask=mask)
    g = jax.tree.map(jnp.ones_like, w)
    sam.update(g, sam.init(w), w, grad_fn=lambda p: points.append(p) or g)
    length = np.sqrt(4 * 3.5**2 + 1)
    moved = jax.tree.map(jnp.subtract, points[0], w)
    np.testing.assert_allclose(moved["matrix"], 3.5**2 / length, rtol=1e-5)
    np.testing.assert_allclose(moved["scalar"], 1 / length, rtol=1e-5)
    np.testing.assert_array_equal(moved["vector"], 0)


def test_a_callable_tree_of_bools_is_no_function():
    class Model(dict):
        def __call__(self):
            raise AssertionError("a mask of this kind is not to be called")

    jax.tree_util.register_pytree_node(
        Model,
        lambda m: (tuple(m.values()), tuple(m)),
        lambda keys, values: Model(zip(keys, values, strict=True)),
    )
    params = Model(kernel=jnp.ones((2, 2)), bias=jnp.ones(2))
    sam = sam_optax.sam(mask=Model(kernel=True, bias=False))
    seen = []
    sam.update(
        params, sam.init(params), params, grad_fn=lambda p: seen.append(p) or params
    )
    assert_trees_equal(seen[0]["bias"], params["bias"])
    assert np.any(seen[0]["kernel"] != params["kernel"])


# --- What is no mask.


def test_a_traced_mask():
    @jax.jit
    def build(keep):
        return sam_optax.sam(mask={"a": keep, "b": True}).init(problem.params())

    with pytest.raises(TypeError, match=r"must be Python bools"):
        build(True)


@pytest.mark.parametrize("mask", [True, "kernel", np.bool_(False)])
def test_a_mask_that_is_no_tree(mask):
    for kwargs in ({"mask": mask}, {"adaptive_mask": mask}):
        with pytest.raises(TypeError, match=r"must be a tree of bools.*static_args"):
            sam_optax.asam(**kwargs)


@pytest.mark.parametrize("name", ["mask", "adaptive_mask"])
def test_a_mask_that_inject_hyperparams_takes_for_a_schedule(name):
    def matrices(params):
        return jax.tree.map(lambda w: jnp.ndim(w) > 1, params)

    tx = optax.inject_hyperparams(sam_optax.asam)(rho=0.1, **{name: matrices})
    with pytest.raises(TypeError, match=rf"static_args=\('{name}',\)"):
        tx.init(problem.params())
    tx = optax.inject_hyperparams(sam_optax.asam, static_args=(name,))(
        rho=0.1, **{name: matrices}
    )
    tx.init(problem.params())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.masked(tx, {"a": True, "b": False}),
        lambda tx: optax.partition(
            {"sam": tx, "rest": optax.sgd(0.1)}, {"a": "sam", "b": "rest"}
        ),
        lambda tx: optax.transforms.selective_transform(
            tx, freeze_mask={"a": False, "b": True}
        ),
    ],
    ids=["masked", "partition", "freeze"],
)
def test_sam_inside_of_a_mask_or_partition_of_optax(wrap):
    """Masks and partitions belong inside."""
    sam, params = sam_optax.sam(), problem.params()
    with pytest.raises(ValueError, match=r"optax.masked or optax.partition.*mask="):
        wrap(optax.chain(sam, optax.sgd(0.1))).init(params)
    part = params | {"b": optax.MaskedNode()}
    with pytest.raises(ValueError, match=r"optax.masked or optax.partition.*mask="):
        sam.update(part, sam.init(params), part, grad_fn=lambda p: p)


def test_an_ascent_with_a_mask_needs_the_parameters():
    ascent = _masks.restrict(sam_optax.ascents.sam(), {"a": True})
    w = {"a": jnp.ones(2)}
    with pytest.raises(ValueError, match="An ascent with a mask needs the parameters"):
        ascent.update(w, ascent.init(w))


@pytest.mark.parametrize("mask", [{"a": False, "b": False}, lambda w: False])
def test_a_mask_that_leaves_nothing_to_perturb_raises(mask):
    with pytest.raises(ValueError, match="leaves no parameter to perturb"):
        sam_optax.sam(mask=mask).init(problem.params())
    sam_optax.sam(mask=lambda w: False).init({})


@pytest.mark.parametrize("own_loss", [False, True])
def test_an_ascent_under_a_mask_gets_the_descents_gradient_of_its_leaves(own_loss):
    seen = []

    def update(g, state, params=None, *, grad_fn, descent_grad_fn, **extra):
        seen.append((grad_fn is descent_grad_fn, descent_grad_fn(params)))
        return g, state

    ascent = optax.GradientTransformationExtraArgs(lambda params: (), update)
    sam = sam_optax.sharpness_aware(ascent, mask={"a": True, "b": False})
    w = {"a": jnp.array(2.0), "b": jnp.array(3.0)}
    options = {"ascent_loss_fn": lambda w: w["a"] * w["b"]} if own_loss else {}
    loss_and_grads = sam_optax.sam_value_and_grad(
        lambda w: w["a"] ** 2 + w["b"] ** 2, sam, **options
    )
    loss_and_grads(w, opt_state=sam.init(w))
    is_same, gradient = seen[-1]
    assert is_same is not own_loss
    assert jax.tree.leaves(gradient) == [4.0]
