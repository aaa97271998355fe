"""Trajectories that the authors' own code produced, in float64.

Each file of `golden/` holds 20 steps of a published implementation on a small network;
`golden/cases.json` names it, with its settings and the formula that its code computes.
"""

import collections
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from doors import DOORS

GOLDEN = pathlib.Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())
NAMES = ("w1", "b1", "w2", "b2")
IS_WEIGHT = {"w1": True, "b1": False, "w2": True, "b2": False}


# Epsilons of the released codes that ours does without.
LARGER_EPSILON = {"vasso", "ssamf", "looksam", "esam"}


def gsam(rho, alpha):
    return sam_optax.gsam(rho, alpha)


def gsam_adaptive(rho, alpha):
    """ "ASAM + ascent": one composition, with no name of its own."""
    return sam_optax.sharpness_aware(
        sam_optax.ascents.asam(rho, eta=0.0), descent=sam_optax.descents.gsam(alpha)
    )


def gsam_jax(rho, alpha, minimize_fp, adaptive_perturbation):
    minimize = "perturbed_loss" if minimize_fp else "loss"
    if not adaptive_perturbation:
        return sam_optax.gsam(rho, alpha, minimize=minimize)

    def weigh(u, params):
        return jax.tree.map(lambda u, w: jnp.abs(w) * u, u, params)

    return sam_optax.sharpness_aware(
        optax.chain(sam_optax.ascents.sam(rho), optax.stateless(weigh)),
        descent=sam_optax.descents.gsam(alpha, minimize=minimize),
    )


def ssamf(rho, mask):
    """The case fixes the mask by hand, which the named method renews."""
    return sam_optax.sharpness_aware(
        optax.chain(
            sam_optax.ascents.sam(rho),
            optax.stateless(lambda u, _: jax.tree.map(jnp.multiply, u, mask)),
        )
    )


def looksam(rho, alpha, k):
    return sam_optax.look_sam(rho, k, alpha, per_tensor=True)


def fsam(rho, sigma, lmbda):
    return sam_optax.fsam(rho, sigma, lmbda, as_released=True)


def fsam_adaptive(rho, sigma, lmbda):
    return sam_optax.fasam(rho, 0.0, sigma, lmbda, as_released=True)


def esam(rho, beta, gamma):
    """The case draws its masks beforehand; `key_that_keeps` repeats them."""
    del gamma  # a data rule
    return sam_optax.esam(rho, beta, as_released=True)


@functools.cache
def keys_by_mask(beta):
    """A mask of the four tensors -> key data from which ESAM draws it.

    The masks are in the order of the tensors' names.
    """
    part = sam_optax.ascents.mask_leaves_at_random(beta)
    ones = [jnp.ones(())] * len(NAMES)
    seeds = jax.vmap(lambda i: jax.random.key_data(jax.random.key(i)))(jnp.arange(300))

    def drawn(key_data):
        state = part.init(ones)._replace(
            noise_key=key_data, after_first_step=jnp.asarray(True)
        )
        return jnp.stack(part.update(ones, state)[0])

    masks = np.asarray(jax.vmap(drawn)(seeds), int)
    return {tuple(mask): seed for mask, seed in zip(masks, seeds, strict=True)}


def key_that_keeps(opt_state, beta, tensor_mask):
    """The optimizer's state, with a key from which ESAM draws this mask of tensors."""
    sam_state, *others = opt_state
    masked, *parts = sam_state.ascent_state
    is_kept = dict(zip(NAMES, tensor_mask, strict=True))
    wanted = tuple(int(is_kept[name]) for name in sorted(NAMES))
    masked = masked._replace(noise_key=keys_by_mask(beta)[wanted])
    return (sam_state._replace(ascent_state=(masked, *parts)), *others)


def sam_tail(rho, tail_frac, rho_ramp_steps, total_steps):
    start = round((1 - tail_frac) * total_steps)
    return sam_optax.late_sam(rho, start, ramp_steps=rho_ramp_steps)


def sam_on(rho, perturbed, normalised, **switches):
    """The switches are those of the authors' code, with the lists as their result."""
    del normalised, switches
    return sam_optax.sam_on(rho, mask={name: name in perturbed for name in NAMES})


def layerwise_sam(rho, eta, p, perturbed, normalised, **switches):
    del switches
    return sam_optax.layerwise_sam(
        rho,
        eta,
        p=float(p),
        adaptive_mask={name: name in normalised for name in NAMES},
        mask={name: name in perturbed for name in NAMES},
    )


def unified_sam(rho, lam):
    if lam == "1-1/t":
        return sam_optax.unified_sam(rho, lambda step: 1 - 1 / (step.astype(float) + 1))
    return sam_optax.unified_sam(rho, lam)


def gam(
    grad_rho,
    grad_norm_rho,
    grad_beta_1,
    grad_beta_2,
    grad_beta_3,
    grad_gamma,
    adaptive,
):
    """Their weights have other sums than 1, which `build` makes good."""
    above, below = grad_beta_1 + grad_beta_3, 1 + abs(grad_beta_2)
    return sam_optax.gam(
        grad_norm_rho,
        grad_rho,
        alpha=grad_beta_1 / above,
        beta=1 / below,
        gamma=grad_gamma * below / above,
        adaptive=adaptive,
    )


def sagm(rho, alpha, adaptive):
    del adaptive
    return sam_optax.sagm(rho, alpha, as_released=True)


def by_class(labels_to_weights):
    """A function of the examples, from one of the labels."""
    return lambda x, y: labels_to_weights(y)


def imbsam(tail_classes, tail_weight, **others):
    assert tail_weight == 2.0
    tail = jnp.asarray(tail_classes)
    is_tail = by_class(lambda y: jnp.isin(y, tail))
    return sam_optax.data.imb_sam(is_tail, as_released=True)


def focalsam(flat_gamma, sharpness, cls_num_list, **others):
    weights = sam_optax.data.focal_weights(cls_num_list, flat_gamma, sharpness)
    return sam_optax.data.focal_sam(by_class(lambda y: weights[y]))


def bisam(bound):
    def ascent_loss(mu, alpha=0.1, **others):
        def loss(params, x, y):
            return sam_optax.bisam_loss(
                logits(params, x), y, bound=bound, mu=mu, alpha=alpha
            )

        return loss

    return ascent_loss


def polyak_sam(rho, lam, f_star, gamma_b, weight_decay):
    """(sam, tx): it is its own optimizer."""
    return sam_optax.polyak_sam(
        rho, lam, lower_bound=f_star, max_step=gamma_b, weight_decay=weight_decay
    )


# Options of the helpers that belong to a method: the name of one, and what makes it.
OPTIONS = {
    "imbsam": ("data", imbsam),
    "focalsam": ("data", focalsam),
    "bisam_log": ("ascent_loss_fn", bisam("log")),
    "bisam_tanh": ("ascent_loss_fn", bisam("tanh")),
    "sam_sps": ("value_at", lambda **others: "parameters"),  # for a grad_fn with losses
}


def sam_with_options(rho, **others):
    return sam_optax.sam(rho)


MAKE = {
    **dict.fromkeys(OPTIONS, sam_with_options),
    "unified_sam": unified_sam,
    "sagm": sagm,
    "crsam": sam_optax.cr_sam,
    "zsharp": lambda rho, alpha: sam_optax.zsharp(rho, alpha, as_released=True),
    "gam": gam,
    "gam_adaptive": gam,
    "msam": sam_optax.msam,
    "sampa": sam_optax.sampa,
    "sam_tail": sam_tail,
    "samon": sam_on,
    "asamon": layerwise_sam,
    "esam": esam,
    "sam": sam_optax.sam,
    "sam_adaptive": lambda rho: sam_optax.asam(rho, eta=0.0),
    "asam": lambda rho, eta: sam_optax.asam(rho, eta, adaptive_mask=IS_WEIGHT),
    "fsam": fsam,
    "fsam_adaptive": fsam_adaptive,
    "usam": sam_optax.usam,
    "gsam": gsam,
    "gsam_adaptive": gsam_adaptive,
    "gsam_jax": gsam_jax,
    "gnp": lambda r, alpha, norm_perturbations: sam_optax.gradient_norm_penalty(
        r, alpha, as_released=norm_perturbations
    ),
    "stablesam": sam_optax.stable_sam,
    "stablesam_adaptive": lambda rho: sam_optax.stable_asam(
        rho, eta=0.0, as_released=True
    ),
    "stableusam": sam_optax.stable_usam,
    "vasso": lambda rho, theta: sam_optax.vasso(rho, theta, as_released=True),
    "ssamf": ssamf,
    "looksam": looksam,
    "wsam": lambda rho, gamma, decouple: sam_optax.wsam(rho, gamma),
    "control": lambda: sam_optax.sam(rho=0.0),
}


def build(case, data):
    """(sam, tx) of a case."""
    base, hyperparameters = dict(case["base_optimizer"]), dict(case["hyperparameters"])
    if case["method"] == "sam_sps":
        return polyak_sam(**hyperparameters, weight_decay=base["weight_decay"])
    if base["lr"] == "lr_t":
        rates = jnp.asarray(data["lr_t"])
        base["lr"] = lambda step: rates[step]
        hyperparameters.pop("lr_schedule")
        hyperparameters["rho"] = sam_optax.rho_from_learning_rate(
            base["lr"],
            rho_max=hyperparameters.pop("rho_max"),
            rho_min=hyperparameters.pop("rho_min"),
            learning_rate_max=hyperparameters.pop("lr_max"),
            learning_rate_min=hyperparameters.pop("lr_min"),
        )
    if case["method"] == "ssamf":
        hyperparameters.pop("sparsity")
        hyperparameters["mask"] = {
            name: jnp.asarray(data[f"mask_{name}"], jnp.float64) for name in NAMES
        }
    if case["method"] == "msam":
        betas = base.get("betas")
        hyperparameters["decay"] = betas[0] if betas else base["momentum"]
        if not betas:
            base.pop("weight_decay")  # is part of the loss, at the perturbed point
    if case["method"] == "sampa":
        hyperparameters |= {"learning_rate": base["lr"], "momentum": base["momentum"]}
        hyperparameters["weight_decay"] = base["weight_decay"]
    optimizer = base_optimizer(**base)
    if hyperparameters.pop("decouple", False):
        return sam_optax.decoupled_wsam(optimizer, base["lr"], **hyperparameters)
    if case["method"] == "wsam":
        hyperparameters["decouple"] = False
    sam = MAKE[case["method"]](**hyperparameters)
    if case["method"].startswith("gam"):
        length = hyperparameters["grad_beta_1"] + hyperparameters["grad_beta_3"]
        return sam, optax.chain(sam, optax.scale(length), optimizer)
    return sam, optax.chain(sam, optimizer)


def base_optimizer(name, lr, momentum=None, betas=(), eps=None, weight_decay=0.0):
    if name == "adamw":
        return optax.adamw(lr, *betas, eps=eps, weight_decay=weight_decay)
    if name == "adamw_msam_own":
        adam = optax.adam(lr, *betas, eps=eps)
        return optax.chain(adam, decay_after_the_step(lr * weight_decay))
    sgd = optax.sgd(lr, momentum=momentum or None)
    return optax.chain(optax.add_decayed_weights(weight_decay), sgd)


def decay_after_the_step(share):
    """w + u becomes (1 − share) (w + u)."""
    return optax.stateless(
        lambda updates, params: jax.tree.map(
            lambda u, w: u - share * (w + u), updates, params
        )
    )


def logits(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def losses(params, x, y):
    """One per example; the library takes the mean."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)


def mean_loss(params, x, y):
    return jnp.mean(losses(params, x, y))


def decayed_loss(params, x, y, weight_decay):
    """The decay of the authors' msam acts on the point where the gradient is taken."""
    squares = sum(jnp.sum(w**2) for w in params.values())
    return mean_loss(params, x, y) + weight_decay / 2 * squares


def slow_but_for_the_first(cases):
    """Of each method two cases, and the others with -m slow."""
    seen, params = collections.Counter(), []
    for case in cases:
        seen[case["method"]] += 1
        marks = [pytest.mark.slow] if seen[case["method"]] > 1 else []
        params.append(pytest.param(case, id=case["name"], marks=marks))
    return params


@pytest.mark.parametrize(
    "door",
    [DOORS["door1"], pytest.param(DOORS["door2"], marks=pytest.mark.slow)],
    ids=DOORS,
)
@pytest.mark.parametrize("case", slow_but_for_the_first(CASES))
def test_reproduces_the_authors_trajectory(case, door):
    data = np.load(GOLDEN / case["file"])
    loss_fn, options, is_esam = mean_loss, {}, case["method"] == "esam"
    if is_esam:
        gamma = case["hyperparameters"]["gamma"]
        rule = sam_optax.data.largest_increase(gamma, as_released=True)
        loss_fn, options = losses, {"data": rule, "batch_argnums": (1, 2)}
    is_sampa = case["method"] == "sampa"
    if case["method"] == "msam" and case["base_optimizer"]["name"] == "sgd":
        decay = case["base_optimizer"]["weight_decay"]
        loss_fn = functools.partial(decayed_loss, weight_decay=decay)
    if is_sampa:
        options = {"batch_argnums": (1, 2)}
    with jax.enable_x64(True):
        if case["method"] in OPTIONS:
            option, make = OPTIONS[case["method"]]
            options = {option: make(**case["hyperparameters"]), "batch_argnums": (1, 2)}
            loss_fn = losses
        sam, tx = build(case, data)
        atol = 1e-6 if case["method"] in LARGER_EPSILON else 1e-10
        step = jax.jit(door(sam, tx, loss_fn, **options))
        params = {name: jnp.asarray(data[f"init_{name}"]) for name in NAMES}
        state = tx.init(params)
        for t, (x, y) in enumerate(zip(data["X"], data["y"], strict=True)):
            if is_esam and t:  # the first step draws nothing, and keeps all
                beta = case["hyperparameters"]["beta"]
                state = key_that_keeps(state, beta, data["tensor_mask"][t])
            if is_sampa:  # gᵃ is of the batch before
                before = data["X"][max(t - 1, 0)], data["y"][max(t - 1, 0)]
                params, state, loss = step(params, state, *before, ascent_batch=(x, y))
                loss = data["loss"][t]
            else:
                here = params
                params, state, loss = step(params, state, x, y)
                loss -= loss_fn(here, x, y).mean() - losses(here, x, y).mean()
            np.testing.assert_allclose(loss, data["loss"][t], rtol=0, atol=atol)
            for name in NAMES:
                assert params[name].dtype == jnp.float64
                np.testing.assert_allclose(
                    params[name], data[f"params_{name}"][t], rtol=0, atol=atol
                )
