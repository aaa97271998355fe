"""ESAM's masks by value: of entries, and of whole tensors as in the released code."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from sam_optax import _tree, ascents
from sam_optax._random import key_stream

G = {
    "a": jnp.asarray([[3.0, -4.0], [1.0, 2.0]]),
    "b": {"c": jnp.asarray([0.5, -1.5, 2.5]), "d": jnp.asarray(-2.0)},
}
LEAVES = [np.asarray(x) for x in jax.tree.leaves(G)]


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def keys_of(part, key, steps, group=None):
    """The keys that a part draws from on successive steps."""
    stream = key_stream(key, part)
    data, keys = stream.start(), []
    for _ in range(steps):
        now, _ = stream.next(data, group)
        _, data = stream.next(data)
        keys.append(now)
    return keys


def outputs(part, steps, g=G, **extra):
    """What a part returns on successive steps, the state carried between."""
    state, found = part.init(g), []
    for _ in range(steps):
        u, state = part.update(g, state, g, **extra)
        found.append(u)
    return found


def rising(step):
    """β of the steps 0, 1, 2, ..."""
    return jnp.asarray([0.3, 0.9, 0.6, 0.4, 0.8, 0.5])[step]


SHARES = [0.3, 0.9, 0.6, 0.4, 0.8, 0.5]


# --- One draw for each entry.


@pytest.mark.parametrize("group", [None, 0, 2])
def test_each_entry_is_kept_by_its_own_draw_and_the_share_of_the_step(group):
    part = ascents.mask_at_random(rising, key=7)
    extra = {} if group is None else {"group": group}
    keys = keys_of("mask_at_random", 7, 6, group)
    # The state that a group hands on is that of all; each step starts from it.
    states = [part.init(G)]
    for _ in range(5):
        states.append(part.update(G, states[-1], G)[1])
    for state, key, share in zip(states, keys, SHARES, strict=True):
        u, _ = part.update(G, state, G, **extra)
        drawn = flat(_tree.uniform_like(key, G))
        wanted = np.where(drawn < np.float32(share), flat(G) / np.float32(share), 0)
        np.testing.assert_array_equal(flat(u), wanted)


def test_a_share_of_one_keeps_everything():
    for u in outputs(ascents.mask_at_random(1.0), 2):
        np.testing.assert_array_equal(flat(u), flat(G))


def test_half_precision_is_masked_in_float32():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), G)
    for part in (ascents.mask_at_random(0.7), ascents.mask_leaves_at_random(0.7)):
        (u,) = outputs(part, 1, half)
        assert {x.dtype for x in jax.tree.leaves(u)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    "make", [ascents.mask_at_random, ascents.mask_leaves_at_random]
)
def test_nothing_kept_is_refused(make):
    with pytest.raises(ValueError, match="keep must be > 0 and <= 1, got 0"):
        make(0)
    with pytest.raises(ValueError, match=r"keep must be > 0 and <= 1, got 1.5"):
        make(1.5)


# --- One draw for each tensor.


def kept_leaves(key, share):
    """Which tensors a key keeps: each draws from the key with its index folded in."""
    return [
        float(jax.random.uniform(jax.random.fold_in(key, i))) < share for i in range(3)
    ]


@pytest.mark.parametrize("group", [None, 1])
def test_whole_tensors_are_kept_as_the_released_code_keeps_them(group):
    """On the first step all of them. The norm is that of the kept tensors."""
    sam = sam_optax.esam(0.5, rising, key=3, as_released=True)
    keys = keys_of("mask_leaves_at_random", 3, 6, group)
    w, state, masks = jax.tree.map(jnp.zeros_like, G), sam.init(G), []

    def per_group(path):
        return path(G, lambda point: point, group)

    for t, (key, share) in enumerate(zip(keys, SHARES, strict=True)):
        extra = {} if group is None else {"per_group": per_group}
        epsilon, state = sam.update(G, state, w, grad_fn=lambda point: point, **extra)
        kept = [True] * 3 if t == 0 else kept_leaves(key, share)
        masks.append(tuple(kept))
        g = [k * x for k, x in zip(kept, LEAVES, strict=True)]
        size = np.linalg.norm(flat(g)) or 1
        np.testing.assert_allclose(
            flat(epsilon), flat(g) * 0.5 / size / share, rtol=1e-6
        )
    assert len(set(masks)) > 2  # else this would show little


def test_no_tensor_kept_is_no_perturbation():
    part = ascents.mask_leaves_at_random(1e-6)
    first, second = outputs(part, 2)
    np.testing.assert_array_equal(flat(first), flat(G))
    np.testing.assert_array_equal(flat(second), 0)
    sam = sam_optax.esam(0.5, 1e-6, as_released=True)
    _, state = sam.update(G, sam.init(G), G, grad_fn=lambda point: point)
    d, _ = sam.update(G, state, G, grad_fn=lambda point: point)
    np.testing.assert_array_equal(flat(d), flat(G))


def test_a_bad_tensor_that_is_not_kept_is_seen():
    part = ascents.mask_leaves_at_random(1e-6)
    state = part.update(G, part.init(G), G)[1]
    for bad in (jnp.nan, jnp.inf):
        u, _ = part.update(G | {"a": G["a"].at[0, 0].set(bad)}, state, G)
        assert np.isnan(u["a"][0, 0])


@pytest.mark.filterwarnings("ignore:Some perturbed parameters")
def test_strict_dtype_promotion():
    with jax.numpy_dtype_promotion("strict"):
        for share in (0.5, jnp.float32(0.5), rising):
            for as_released in (False, True):
                sam = sam_optax.esam(0.5, share, as_released=as_released)
                half = jax.tree.map(lambda x: x.astype(jnp.float16), G)
                d, _ = sam.update(half, sam.init(half), half, grad_fn=lambda p: p)
                assert np.all(np.isfinite(flat(d)))


def test_the_default_is_the_mask_of_the_paper():
    """The ascent in two steps; the released one would keep all entries on the first."""
    sam, w = sam_optax.esam(key=2), jax.tree.map(jnp.zeros_like, G)
    by_hand = optax.chain(ascents.sam(0.05), ascents.mask_at_random(0.6, key=2))
    state, hand_state = sam.init(w), by_hand.init(w)
    for _ in range(2):
        epsilon, state = sam.update(G, state, w, grad_fn=lambda point: point)
        wanted, hand_state = by_hand.update(G, hand_state, w)
        np.testing.assert_array_equal(flat(epsilon), flat(wanted))


def test_the_share_is_that_of_the_scripts():
    for make, name in (
        (sam_optax.esam, "beta"),
        (ascents.mask_at_random, "keep"),
        (ascents.mask_leaves_at_random, "keep"),
    ):
        assert inspect.signature(make).parameters[name].default == 0.6
