"""SSAM: the perturbation is masked, and the mask is carried."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from sam_optax import _sharding as sharding
from sam_optax import _tree
from sam_optax._checks import (
    check_number,
    check_positive_integer,
    check_static_integer,
    check_static_number,
)
from sam_optax._doors.batch import loss_and_aux
from sam_optax._hyperparameters import ScalarOrSchedule, value_at
from sam_optax._parts import Ascent, chain
from sam_optax._random import Key, key_stream
from sam_optax._step import Options, sharpness_aware
from sam_optax.methods._order import (
    Count,
    check_countable,
    count_true,
    greatest,
    ranks_of,
    sum_true,
)
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
    r"""Zeroes all but the entries with the largest Fisher information, as SSAM-F does.

    .. math::
      F_j = \frac1n \sum_{i=1}^n
            \left( \frac{\partial \ell_i(w)}{\partial w_j} \right)^2

    F is the diagonal of the empirical Fisher matrix, over n training examples with the
    losses ℓ_i. A mask in the state says which entries have the largest F. On some
    steps, a refresh makes the mask anew, and that step already uses the new mask.

    Args:
      sparsity: the fraction s in [0, 1) of the entries that are zeroed. Default 0.5,
        from the examples in the README of the authors' code.
      refresh_every: the number of steps between refreshes of the mask. Default 100.

    Returns:
      A transformation that carries the mask. Its update takes the extra argument
      `fisher=`. This is a function () -> F, which is only called on a step with a
      refresh, or the tree F itself. `mean_squared_gradients` computes F. If an entry of
      F is not finite, the mask stays as it is until the next refresh.

    Raises:
      ValueError: if sparsity is outside [0, 1), or refresh_every is not a positive
        integer; from `update`, if fisher= is missing, or is not like the parameters.
    """

    def renew(key, step, mask, scores, count):
        del key, step
        new = _keep_largest(scores, Count.of(count))
        is_usable = _tree.all_finite(scores)
        return jax.tree.map(lambda n, o: jnp.where(is_usable, n, o), new, mask)

    return _masked_by(renew, sparsity, refresh_every, scores_of=_given_fisher)


def keep_largest_gradient(
    sparsity: float = 0.5, *, refresh_every: int = 100
) -> optax.GradientTransformationExtraArgs:
    """Zeroes all but the entries with the largest gradient of one batch.

    A refresh takes the gradient of its own step, so it costs no gradient. Otherwise
    this is `keep_largest_fisher`, but the score is a much noisier one: the gradient of
    a batch averages over the examples before it is squared. Once training is under
    way, its mask agrees with that of F in little more entries than a random mask does.

    Args:
      sparsity, refresh_every: as for `keep_largest_fisher`.

    Returns:
      A transformation that carries the mask. It takes g from the extra argument
      `ascent_gradient=`; without this argument, it takes its input for g.

    Raises:
      ValueError: if sparsity is outside [0, 1), or refresh_every is not a positive
        integer; from `update`, if it gets fisher=, which it would not use.
    """

    def renew(key, step, mask, scores, count):
        del key, step, mask
        return _keep_largest(scores, Count.of(count))

    return _masked_by(renew, sparsity, refresh_every, scores_of=_batch_gradient)


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
    random, in their place. The new mask is in use from the next step on. This is called
    dynamic sparse training.

    Args:
      sparsity, refresh_every: as for `keep_largest_fisher`.
      drop: the share of the kept entries that is exchanged, a number from 0 to 1 or a
        schedule of the step, whose values are cut to this range. Default 0.5, where the
        authors' code starts. There, the share then falls to 0 along a cosine. For this,
        pass `optax.cosine_decay_schedule(0.5, steps)` with the number of steps of the
        training.
      key: an int, a typed key or a legacy one. Default 0.

    Returns:
      A transformation that carries the mask and a key. It takes g from the extra
      argument `ascent_gradient=`; without this argument, it takes its input for g.

    Raises:
      ValueError: if sparsity is outside [0, 1), drop is outside [0, 1], or
        refresh_every is not a positive integer.
    """
    check_number("drop", drop, at_least=0, at_most=1)

    def renew(key, step, mask, scores, count):
        others = max(optax.tree.size(mask) - count, 0)  # a tree can be empty
        exchanged = _number_exchanged(value_at(drop, step), count, others)
        stays = _keep_largest(scores, Count.of(count).minus(exchanged), among=mask)
        outside = jax.tree.map(jnp.logical_not, mask)
        chance = _tree.uniform_like(key, scores)
        enters = _keep_largest(chance, exchanged, among=outside)
        return jax.tree.map(jnp.logical_or, stays, enters)

    return _masked_by(
        renew,
        sparsity,
        refresh_every,
        key,
        scores_of=lambda magnitudes, fisher: lambda: magnitudes,
        from_next_step=True,
    )


def _number_exchanged(share: Any, count: int, others: int) -> Count:
    """That share of `count` entries, as far as there are others to take their place."""
    share = _tree.at_least_float32(jnp.asarray(share))
    # Under jit, a schedule that ends at 0 can end a little below.
    rounded = Count.of(jnp.round(jnp.clip(share, 0, 1) * float(count)))
    # The product can be above the count, which a float may not hold exactly.
    return rounded.smaller(Count.of(count)).smaller(Count.of(others))


# How a refresh gets its scores: (|g|, the extra argument fisher) -> a function
# () -> scores, which is called in the branch of the refresh.
ScoresOf = Callable[[Any, Any], Callable[[], Any]]


def _batch_gradient(magnitudes: Any, fisher: Any) -> Callable[[], Any]:
    """The scores |g|, which have the order of g²."""
    if fisher is not None:
        raise ValueError(
            "The update got fisher=, but the mask is made from the gradient of the "
            'batch. Pass ssam(score="fisher"), or use ascents.keep_largest_fisher.'
        )
    return lambda: magnitudes


def _given_fisher(magnitudes: Any, fisher: Any) -> Callable[[], Any]:
    """The scores that the caller of the update computes."""
    if fisher is None:
        raise ValueError(
            "The mask is made from the Fisher information, so the update needs "
            "fisher=: a function () -> the mean of the squared gradients of single "
            "examples, as ascents.mean_squared_gradients computes it. Pass it to "
            "tx.update, or to the function that sam_value_and_grad returns, as "
            'extra_args={"fisher": ...}.'
        )

    def scores():
        found = fisher() if callable(fisher) else fisher
        if _structure(found) == _structure(magnitudes):
            # Under a mask, g has no leaves where nothing is perturbed.
            found = jax.tree.map(
                lambda g, f: g if _is_masked(g) else f,
                magnitudes,
                found,
                is_leaf=_is_masked,
            )
        difference = _tree.mismatch(found, magnitudes)
        if difference is not None:
            raise ValueError(f"fisher must be like the parameters: {difference}.")
        return sharding.like(_tree.magnitude(found), magnitudes)

    return scores


def _structure(tree: Any) -> Any:
    return jax.tree.structure(tree, is_leaf=_is_masked)


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def _masked_by(
    renew: Callable[..., Any],
    sparsity: float,
    every: int,
    key: Key = 0,
    *,
    scores_of: ScoresOf,
    from_next_step: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Masks the updates by a carried mask, which `renew` makes anew now and then.

    renew: (key, step, mask, scores, number to keep) -> mask. With from_next_step, the
    step of a refresh itself still uses the mask from before.
    """
    check_static_number("sparsity", sparsity, at_least=0, below=1)
    check_static_integer("refresh_every", every)
    keys = key_stream(key, "drop_and_grow")

    def kept(size):
        return max(round((1 - sparsity) * size), 1)

    def init_fn(params):
        scores = _tree.uniform_like(keys.next(keys.start())[0], params)
        mask = _keep_largest(scores, Count.of(kept(optax.tree.size(params))))
        # An array's layout on a mesh can be part of its type. This operation changes
        # no entry, but gives the mask the layout of the parameters.
        mask = jax.tree.map(
            lambda keep, w: keep & jnp.logical_not(jnp.abs(w) < 0), mask, params
        )
        return SparseState(jnp.zeros((), jnp.int32), keys.start(), mask)

    def update_fn(
        updates, state, params=None, *, ascent_gradient=None, fisher=None, **extra_args
    ):
        del params, extra_args
        step, key_data, before = state
        now, later = keys.next(key_data)
        g = updates if ascent_gradient is None else ascent_gradient
        scores = scores_of(_tree.magnitude(g), fisher)

        def renewed():
            mask = renew(now, step, before, scores(), kept(optax.tree.size(g)))
            return sharding.vary_like(mask, g)

        def unchanged():
            return sharding.vary_like(before, g)

        after = jax.lax.cond(step % every == 0, renewed, unchanged)
        updates = jax.tree.map(
            lambda u, keep: jnp.where(keep, u, 0 * u),
            _tree.at_least_float32(updates),
            before if from_next_step else after,
        )
        return updates, SparseState(optax.safe_increment(step), later, after)

    part = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return Ascent.of(part, reads_gradient=True, shows_nonfinite=True)


def _keep_largest(scores: Any, wanted: Count, among: Any = None) -> Any:
    """A mask that is True for as many entries as wanted, those of the largest scores.

    If fewer are eligible, it is True for these.

    Of equal scores, the earlier ones are kept. No entry leaves its device and nothing
    is sorted: the threshold is found by counting, once per bit. Scores must not be
    negative; `among` is a mask of the entries to choose from.
    """
    leaves, structure = jax.tree.flatten(scores)
    if not leaves:  # optax.tree.map_params initialises with trees without leaves
        return scores
    for leaf in leaves:
        check_countable(leaf)
    dtype = _tree.widest(*[x.dtype for x in leaves])
    ranks = [ranks_of(x.astype(dtype)) for x in leaves]
    if among is not None:  # rank 0 marks the entries that are not eligible
        eligible = jax.tree.leaves(among)
        ranks = [jnp.where(e, r, 0) for e, r in zip(eligible, ranks, strict=True)]

    def is_low_enough(threshold):
        return count_true([r >= threshold for r in ranks]).at_least(wanted)

    possible = count_true([r > 0 for r in ranks])
    wanted = wanted.smaller(possible)
    zero = sharding.vary_like(jnp.zeros((), ranks[0].dtype), ranks)
    threshold = greatest(is_low_enough, zero)
    above, ties = ([f(r, threshold) for r in ranks] for f in (jnp.greater, jnp.equal))
    room, shares = wanted.minus(count_true(above)), []
    for tie in ties:  # each leaf fills as much of the room as it can
        share = room.smaller(Count.of(sum_true(tie)))
        room = room.minus(share)
        shares.append(share.low)

    def first(ends):
        found = []
        for tie, end in zip(ties, ends, strict=True):
            position = jax.lax.iota(jnp.uint32, tie.size).reshape(tie.shape)
            found.append(tie & (position < end))
        return found

    def fit(ends):
        return jnp.stack([sum_true(x) for x in first(ends)]) <= jnp.stack(shares)

    nowhere = sharding.vary_like(jnp.zeros(len(ties), jnp.uint32), ranks)
    ends = greatest(fit, nowhere)
    kept = [jnp.logical_or(*pair) for pair in zip(above, first(ends), strict=True)]
    return jax.tree.unflatten(structure, kept)


def mean_squared_gradients(
    loss_fn: Callable[..., Any],
    params: optax.Params,
    *examples: Any,
    at_once: int = 8,
    has_aux: bool = False,
) -> optax.Updates:
    r"""The mean over examples of the squared gradient of one example.

    .. math::
      F_j = \frac1n \sum_{i=1}^n
            \left( \frac{\partial \ell_i(w)}{\partial w_j} \right)^2

    This is the diagonal of the empirical Fisher matrix, by which SSAM-F chooses what it
    perturbs. The square of a batch's gradient is something else: there, the gradients
    of the examples cancel before they are squared.

    Args:
      loss_fn: parameters and examples -> loss, or (loss, aux), as for
        `sam_value_and_grad`. It is called on batches of one example. If the loss has a
        shape, its mean is taken.
      params: the parameters w.
      examples: the further arguments of loss_fn: arrays, or trees of them, with one
        entry per example along the first axis. Bind other arguments of loss_fn with
        `functools.partial`.
      at_once: for how many examples the gradients are computed together, and so are in
        memory together. Default 8.
      has_aux: whether loss_fn returns (loss, aux). Default False.

    Returns:
      F, a tree like the parameters, in at least float32. Where every device of a named
      axis has its own examples, take the mean over the axis with `jax.lax.pmean`, so
      that all devices get the same mask.

    Raises:
      ValueError: if there are no examples, if their arguments have different numbers
        of them, or if at_once is not a positive integer.

    Examples:
      At w = 0, the losses (w − 1)²/2 and (w + 1)²/2 have the gradients −1 and 1. Their
      mean is 0, and the mean of their squares is 1.

      >>> import jax.numpy as jnp
      >>> from sam_optax import ascents
      >>> losses = lambda w, x: (w - x) ** 2 / 2
      >>> w, x = jnp.array(0.0), jnp.array([1.0, -1.0])
      >>> print(ascents.mean_squared_gradients(losses, w, x))
      1.0

    Cost: the gradients of n single examples, so n/B gradients of a batch of B examples.
    On an accelerator it takes longer than that, because at_once examples fill it less
    than a batch does.
    """
    check_positive_integer("at_once", at_once)
    shapes = [jnp.shape(x) for x in jax.tree.leaves(examples)]
    sizes = {shape[:1] for shape in shapes}
    if len(sizes) != 1 or sizes <= {(), (0,)}:
        raise ValueError(
            "mean_squared_gradients needs examples along the first axis of its "
            f"arguments, as many in each; got arrays of the shapes {shapes}."
        )
    ((size,),) = sizes

    # Under shard_map, JAX sums gradients over the axes along which the examples differ
    # and the parameters do not. That sum must not come before the square.
    axes = frozenset().union(*map(sharding.varying_axes, jax.tree.leaves(examples)))

    def vary(w):
        missing = tuple(sorted(axes - sharding.varying_axes(w)))
        return jax.lax.pcast(w, missing, to="varying") if missing else w

    params = jax.tree.map(vary, params)

    def mean_loss(params, *batch):
        loss, _ = loss_and_aux(loss_fn(params, *batch), has_aux)
        return jnp.mean(loss)

    def squared_gradient(example):
        batch = jax.tree.map(lambda x: x[None], example)
        g = jax.grad(mean_loss)(params, *batch)
        return jax.tree.map(jnp.square, _tree.at_least_float32(g))

    def total(chunk):
        squares = jax.vmap(squared_gradient)(chunk)
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), squares)

    # On a mesh with explicit axes, parameters and examples can be spread over the same
    # one. The gradients of several examples cannot be spread over it twice.
    examples = jax.tree.map(sharding.replicate, examples)

    def part(start, stop):
        return jax.tree.map(lambda x: x[start:stop], examples)

    # The examples that do not fill a chunk come first, and start the sum. If there are
    # none, a full chunk does.
    first = size % at_once or min(at_once, size)
    summed = total(part(0, first))
    count = (size - first) // at_once
    if count:
        chunks = jax.tree.map(
            lambda x: jnp.reshape(x, (count, at_once, *x.shape[1:])), part(first, size)
        )
        summed, _ = jax.lax.scan(
            lambda so_far, chunk: (jax.tree.map(jnp.add, so_far, total(chunk)), None),
            summed,
            chunks,
        )
    return _tree.scale(1 / size, summed)


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
    score: Literal["squared_batch_gradient", "fisher"] = "squared_batch_gradient",
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
        0.5, from the examples in the README of the authors' code, whose parser has 0.2.
      dynamic: False (default) is SSAM-F, which keeps the entries with the largest
        score. True is SSAM-D, which exchanges entries with a small gradient for random
        ones.
      score: what SSAM-F ranks entries by. "fisher" is the score of the authors: the
        mean over examples of the squared gradient of one example. The update needs it
        as the extra argument `fisher=`; see `ascents.keep_largest_fisher`. Default
        "squared_batch_gradient": the square of g on the step of a refresh, which costs
        no gradient and needs no argument, but is a poor stand-in; see
        `ascents.keep_largest_gradient`.
      drop: the share of the mask that SSAM-D exchanges on a refresh, a number from 0 to
        1 or a schedule of the step. Default 0.5. In the authors' code, it falls from
        there to 0 along a cosine over the training, as it does here with
        `drop=optax.cosine_decay_schedule(0.5, steps)`.
      refresh_every: the number of steps between refreshes. Default 100. The authors'
        code counts in epochs: 5 in its parser, 1 in the examples of its README.
      key: the key of SSAM-D's random draws: an int, a typed key or a legacy one.
        Default 0.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0, sparsity is outside [0, 1), score is not one of the two,
        or is "fisher" for SSAM-D, drop is outside [0, 1], or refresh_every is not a
        positive integer; from the update, if `fisher=` is missing or, with the
        magnitudes, not wanted (SSAM-D ignores it); from init, if one array has more
        than 4,294,967,295 entries.

    Examples:
      On f(w) = |w|²/2 from w = (3, 4), SAM's ε for ρ = 5 is (3, 4). SSAM-F keeps the
      larger entry, so d = (3, 4 + 4).

      >>> import jax, jax.numpy as jnp, sam_optax
      >>> sam, w = sam_optax.ssam(rho=5.0), jnp.array([3.0, 4.0])
      >>> grad_fn = jax.grad(lambda w: jnp.sum(w**2) / 2)
      >>> d, _ = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
      >>> print(d)
      [3. 8.]

      With the Fisher score, on two examples with the losses |w − x|²/2. At w = 0 their
      gradients are (−4, −8) and (−4, 2), so g is (−4, −3), and F is (16, 34). The
      second entry is kept, although g is smaller there, and d = (−4, −3 − 3).

      >>> losses = lambda w, x: jnp.sum((w - x) ** 2, axis=1) / 2
      >>> w, x = jnp.zeros(2), jnp.array([[4.0, 8.0], [4.0, -2.0]])
      >>> sam = sam_optax.ssam(rho=5.0, score="fisher")
      >>> loss_and_grads = sam_optax.sam_value_and_grad(losses, sam)
      >>> def fisher():
      ...     return sam_optax.ascents.mean_squared_gradients(losses, w, x)
      >>> loss, grads = loss_and_grads(
      ...     w, x, opt_state=sam.init(w), extra_args={"fisher": fisher})
      >>> print(fisher(), grads.gradients)
      [16. 34.] [-4. -6.]

    References:
      Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation
      Approach <https://arxiv.org/abs/2210.05177>`_, NeurIPS 2022.

    Differences from the authors' code:
      1. By default, the score of SSAM-F is the squared gradient of one batch. Theirs is
         that of score="fisher", over 1024 examples by the parser, and 16 or 128 in the
         examples of the README.
      2. SSAM-F renews its mask before the perturbation of the step, and uses it at
         once. Theirs renews it at the end of the step, and so perturbs nothing on the
         first one.
      3. The share that SSAM-D exchanges is constant unless drop is a schedule.
      4. No epsilon is added to the norm. Theirs is 1e-7.

    Cost: 2 gradients a step; a tree of bools is carried. A refresh takes two passes
    over the gradient for each bit of an entry, and four with SSAM-D. With
    score="fisher", it also takes the gradients of the single examples, and once per
    group if the examples are in groups.
    If the gradient is not finite on the step of a refresh, the mask stays as it is
    until the next refresh.
    """
    if score not in ("squared_batch_gradient", "fisher"):
        raise ValueError(
            f'score must be "squared_batch_gradient" or "fisher", got {score!r}.'
        )
    check_number("drop", drop, at_least=0, at_most=1)
    if dynamic and score == "fisher":
        raise ValueError(
            "SSAM-D (dynamic=True) ranks entries by the gradient of the batch, so it "
            'has no use for score="fisher".'
        )
    if dynamic:
        sparse = drop_and_grow(sparsity, drop, refresh_every=refresh_every, key=key)
    elif score == "fisher":
        sparse = keep_largest_fisher(sparsity, refresh_every=refresh_every)
    else:
        sparse = keep_largest_gradient(sparsity, refresh_every=refresh_every)
    ascent = chain(normalize_by_global_norm(), sparse, scale_by_rho(rho))
    return sharpness_aware(ascent, **options)
