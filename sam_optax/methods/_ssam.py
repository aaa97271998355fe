"""SSAM: the perturbation is masked, and the mask is carried."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from sam_optax import _tree
from sam_optax._checks import check_number, check_static_integer, check_static_number
from sam_optax._hyperparameters import ScalarOrSchedule, value_at
from sam_optax._random import Key, key_stream
from sam_optax._step import Options, sharpness_aware
from sam_optax.methods._record import record
from sam_optax.methods._sam import normalize_by_global_norm, scale_by_rho


class SparseState(NamedTuple):
    """State of the parts with a carried mask."""

    mask_step: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32
    mask_key: jax.Array  # key data, dtype=jnp.uint32
    perturbed: Any  # like the parameters, dtype=jnp.bool_


def keep_largest_fisher(
    sparsity: float = 0.5, *, refresh_every: int = 100
) -> optax.GradientTransformationExtraArgs:
    """Zeroes all but the entries with the largest squared gradient, as SSAM-F does.

    A mask in the state says which entries these are. On some steps, a refresh makes
    the mask anew from g².

    Args:
      sparsity: the fraction s in [0, 1) of the entries that are zeroed. Default 0.5,
        from the paper.
      refresh_every: the number of steps between refreshes of the mask. Default 100.

    Returns:
      A transformation that carries the mask. It takes g from the extra argument
      `ascent_gradient=`; without this argument, it takes its input for g.

    Raises:
      ValueError: if sparsity is outside [0, 1), or refresh_every is not a positive
        integer.
    """

    def refresh(key, step, mask, magnitudes, kept):
        del key, step, mask
        return _keep_largest(magnitudes, kept)

    return _masked_by(refresh, sparsity, refresh_every, key=0)


def drop_and_grow(
    sparsity: float = 0.5,
    drop: ScalarOrSchedule = 0.5,
    *,
    refresh_every: int = 100,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    """Zeroes all entries outside a mask that is partly redrawn, as SSAM-D does.

    The first mask is random. A refresh removes the share `drop` of the entries from the
    mask, those with the smallest gradient, and puts as many other entries, drawn at
    random, in their place. This is called dynamic sparse training.

    Args:
      sparsity, refresh_every: as for `keep_largest_fisher`.
      drop: the share of the kept entries that is exchanged, a number from 0 to 1 or a
        schedule of the step. (In the paper it decays along a cosine.) Default 0.5.
      key: an int, a typed key or a legacy one. Default 0.

    Returns:
      A transformation like `keep_largest_fisher`, which also carries a key.

    Raises:
      ValueError: if sparsity is outside [0, 1), drop is outside [0, 1], or
        refresh_every is not a positive integer.
    """
    check_number("drop", drop, at_least=0, at_most=1)

    def refresh(key, step, mask, magnitudes, kept):
        exchanged = jnp.round(jnp.asarray(value_at(drop, step)) * kept)
        exchanged = jnp.minimum(exchanged, _tree.size(mask) - kept).astype(jnp.int32)
        stays = _keep_largest(magnitudes, kept - exchanged, among=mask)
        outside = jax.tree.map(jnp.logical_not, mask)
        chance = _tree.uniform_like(key, magnitudes)
        enters = _keep_largest(chance, exchanged, among=outside)
        return jax.tree.map(jnp.logical_or, stays, enters)

    return _masked_by(refresh, sparsity, refresh_every, key)


def _masked_by(
    refresh: Callable[..., Any], sparsity: float, every: int, key: Key
) -> optax.GradientTransformationExtraArgs:
    """Masks the updates by a carried mask, which `refresh` makes anew now and then.

    refresh: (key, step, mask, |g|, number to keep) -> mask.
    """
    check_static_number("sparsity", sparsity, at_least=0, below=1)
    check_static_integer("refresh_every", every)
    keys = key_stream(key, "drop_and_grow")

    def kept(size):
        return max(round((1 - sparsity) * size), 1)

    def init_fn(params):
        scores = _tree.uniform_like(keys.next(keys.start())[0], params)
        mask = _keep_largest(scores, kept(_tree.size(params)))
        # An array's layout on a mesh can be part of its type. This operation changes
        # no entry, but gives the mask the layout of the parameters.
        mask = jax.tree.map(lambda keep, w: keep & ~(abs(w) < 0), mask, params)
        return SparseState(jnp.zeros((), jnp.int32), keys.start(), mask)

    def update_fn(updates, state, params=None, *, ascent_gradient=None, **extra_args):
        del params, extra_args
        step, key_data, mask = state
        now, later = keys.next(key_data)
        g = updates if ascent_gradient is None else ascent_gradient

        def renewed():
            return refresh(now, step, mask, _tree.magnitude(g), kept(_tree.size(g)))

        def as_before():
            # lax.cond wants both branches to vary over the same mesh axes, those of g.
            never = _tree.squared_norm(g) < 0
            return jax.tree.map(lambda keep: keep | never, mask)

        mask = jax.lax.cond(step % every == 0, renewed, as_before)
        updates = jax.tree.map(
            lambda u, keep: jnp.where(keep, u, 0 * u),
            _tree.at_least_float32(updates),
            mask,
        )
        return updates, SparseState(optax.safe_increment(step), later, mask)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _keep_largest(scores: Any, count: Any, among: Any = None) -> Any:
    """A mask that is True for exactly `count` entries, those of the largest scores.

    Of equal scores, the earlier ones are kept. No entry leaves its device and nothing
    is sorted: the threshold is found by counting, once per bit. Scores must not be
    negative; `among` is a mask of the entries to choose from.
    """
    leaves, structure = jax.tree.flatten(scores)
    if not leaves:  # optax.tree.map_params initialises with trees without leaves
        return scores
    dtype = _tree.widest(*[x.dtype for x in leaves])
    unsigned = jnp.dtype(f"uint{8 * dtype.itemsize}")
    # Non-negative floats sort like their bit patterns. Rank 0 marks the entries that
    # are not eligible.
    ranks = [
        jax.lax.bitcast_convert_type(x.astype(dtype), unsigned) + 1 for x in leaves
    ]
    if among is not None:
        eligible = jax.tree.leaves(among)
        ranks = [jnp.where(e, r, 0) for e, r in zip(eligible, ranks, strict=True)]

    def number(conditions):
        counts = [jnp.sum(c, dtype=jnp.uint32) for c in conditions]
        return functools.reduce(jnp.add, counts)

    def is_low_enough(threshold):
        return number([r >= threshold for r in ranks]) >= count

    # Made from the ranks, this zero varies over the mesh axes that they vary over.
    zero = 0 * number([r > 0 for r in ranks])
    threshold = _greatest(is_low_enough, zero.astype(unsigned))
    ties = [r == threshold for r in ranks]
    room = jnp.asarray(count, jnp.uint32) - number([r > threshold for r in ranks])
    positions, start = [], 0
    for leaf in leaves:
        own = jax.lax.iota(jnp.uint32, leaf.size).reshape(leaf.shape)
        positions.append(own + jnp.uint32(start))
        start += leaf.size

    def before(position):
        pairs = zip(ties, positions, strict=True)
        return [t & (p < position) for t, p in pairs]

    end = _greatest(lambda position: number(before(position)) <= room, zero)
    kept = [
        (r > threshold) | first for r, first in zip(ranks, before(end), strict=True)
    ]
    return jax.tree.unflatten(structure, kept)


def _greatest(is_true: Callable[[jax.Array], jax.Array], zero: jax.Array) -> jax.Array:
    """The greatest unsigned integer up to which a monotone predicate holds."""
    bits = 8 * zero.dtype.itemsize

    def set_bit(i, found):
        bit = jnp.ones((), zero.dtype) << (bits - 1 - i).astype(zero.dtype)
        candidate = found | bit
        return jnp.where(is_true(candidate), candidate, found)

    return jax.lax.fori_loop(0, bits, set_bit, zero)


@record(
    title="Sparse SAM (SSAM-F, SSAM-D)",
    equation="ε = b · ρ g/‖g‖, b a carried mask",
    radius="‖ε‖ before b",
    source="Mi 2022",
    url="https://arxiv.org/abs/2210.05177",
)
def ssam(
    rho: ScalarOrSchedule = 0.05,
    sparsity: float = 0.5,
    *,
    dynamic: bool = False,
    drop: ScalarOrSchedule = 0.5,
    refresh_every: int = 100,
    key: Key = 0,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Sparse Sharpness-Aware Minimization (SSAM-F and SSAM-D).

    .. math::
      \varepsilon = b \cdot \rho \frac{g}{\|g\|}, \qquad
      b \in \{0, 1\}^p, \quad \textstyle\sum b = (1 - s) p, \qquad
      d = \nabla L(w + \varepsilon)

    for p parameters. The mask b is kept in the state, and changes on some steps only.

    Args:
      rho: the radius ρ of the unmasked perturbation. Default 0.05, that of `sam`.
      sparsity: the fraction s in [0, 1) of the entries that are not perturbed. Default
        0.5, from the paper.
      dynamic: False (default) is SSAM-F, which keeps the entries with the largest
        squared gradient. True is SSAM-D, which exchanges entries with a small gradient
        for random ones.
      drop: the share of the mask that SSAM-D exchanges on a refresh, a number from 0 to
        1 or a schedule of the step. Default 0.5.
      refresh_every: the number of steps between refreshes. Default 100.
      key: the key of SSAM-D's random draws: an int, a typed key or a legacy one.
        Default 0.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0, sparsity is outside [0, 1), drop is outside [0, 1], or
        refresh_every is not a positive integer.

    Examples:
      On f(w) = |w|²/2 from w = (3, 4), SAM's ε for ρ = 5 is (3, 4). SSAM-F keeps the
      larger entry, so d = (3, 4 + 4).

      >>> import jax, jax.numpy as jnp, sam_optax
      >>> sam, w = sam_optax.ssam(rho=5.0), jnp.array([3.0, 4.0])
      >>> grad_fn = jax.grad(lambda w: jnp.sum(w**2) / 2)
      >>> d, _ = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
      >>> print(d)
      [3. 8.]

    References:
      Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation
      Approach <https://arxiv.org/abs/2210.05177>`_, NeurIPS 2022.

    Differences from the authors' code:
      1. Here the Fisher matrix is the squared gradient of one batch, that of the step
         of the refresh. Theirs is an average over single examples.
      2. The mask is in use from the first step on. Theirs perturbs nothing before its
         first refresh.

    Cost: 2 gradients a step; a tree of bools is carried. A refresh takes two passes
    over the gradient for each bit of an entry. If the gradient is not finite on the
    step of a refresh, the mask stays as it is until the next refresh.
    """
    if dynamic:
        sparse = drop_and_grow(sparsity, drop, refresh_every=refresh_every, key=key)
    else:
        sparse = keep_largest_fisher(sparsity, refresh_every=refresh_every)
    ascent = optax.chain(normalize_by_global_norm(), sparse, scale_by_rho(rho))
    return sharpness_aware(ascent, **options)
