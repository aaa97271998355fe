"""The two ways into a SAM transformation, behind one signature.

A door is a function of (sam, tx, loss_fn, **options) that returns a step,
`step(params, opt_state, *args, ascend=None, ascent_batch=None, **extra)
-> (params, opt_state, loss)`.
`tx` is the chain that starts with `sam`; options are those of the helpers, and extra
are extra arguments of the update.
"""

import jax
import optax

import sam_optax


def door1(sam, tx, loss_fn, **options):
    """`sam_value_and_grad`, whose gradients bring the SAM state along."""
    loss_and_grads = sam_optax.sam_value_and_grad(loss_fn, sam, **options)

    def step(params, opt_state, *args, ascend=None, ascent_batch=None, **extra):
        loss, grads = loss_and_grads(
            params,
            *args,
            opt_state=opt_state,
            ascend=ascend,
            ascent_batch=ascent_batch,
            extra_args=extra,
        )
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


def door2(sam, tx, loss_fn, **options):
    """Optax's extra-args protocol: `grad_fn=` at the update."""
    del sam

    def by_hand(params, *args):
        def grad_fn(point):
            return jax.grad(loss_fn)(point, *args)

        return *jax.value_and_grad(loss_fn)(params, *args), {"grad_fn": grad_fn}

    gradients = sam_optax.value_and_ascent_grad(loss_fn, **options)
    first_pass = gradients if options else by_hand

    def step(params, opt_state, *args, ascend=None, ascent_batch=None, **extra):
        others = {} if ascent_batch is None else {"ascent_batch": ascent_batch}
        loss, grads, passed = first_pass(params, *args, **others)
        extra |= passed | ({} if ascend is None else {"ascend": ascend})
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


DOORS = {"door1": door1, "door2": door2}
