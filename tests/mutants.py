"""Breaks the library on purpose, one line at a time, and sees that a test fails.

Run by hand, from the repository: `python tests/mutants.py [NAME ...]`. Each mutant is a
replacement in a copy of the package; the exit status is the number of survivors.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent


class Mutant(NamedTuple):
    """A replacement in a file of the package, and which tests to begin with (-k)."""

    file: str
    old: str
    new: str
    first: str = ""


MUTANTS = {
    "sign of the perturbation": Mutant(
        "_ascent.py", "_tree.scale(rho, _tree", "_tree.scale(-rho, _tree"
    ),
    "no perturbation": Mutant(
        "_perturb.py", "_sum(w, e).astype(jnp.result_type(w)), params", "w, params"
    ),
    "second gradient taken at w": Mutant(
        "_core.py",
        "evaluate.descent(perturb(params, perturbation, group))",
        "evaluate.descent(params)",
    ),
    "dropped EMA": Mutant(
        "_ascent.py",
        "    return EmaState(m, jnp.ones((), jnp.bool_))",
        "    return EmaState(state.gradient_ema, jnp.ones((), jnp.bool_))",
    ),
    "value from another point": Mutant(
        "_value_and_grad.py",
        "        value = (look.loss, look.aux) if self._has_aux else look.loss\n",
        "        moved = batch.forward(optax.tree.scale(1.01, params))\n"
        "        value = (moved.loss, look.aux) if self._has_aux else moved.loss\n",
        first="trajectory or value_and_aux",
    ),
    "aux from another point": Mutant(
        "_value_and_grad.py",
        "        value = (look.loss, look.aux) if self._has_aux else look.loss\n",
        "        moved = batch.forward(optax.tree.scale(1.01, params))\n"
        "        value = (look.loss, moved.aux) if self._has_aux else look.loss\n",
        first="value_and_aux",
    ),
    "schedule one step ahead": Mutant(
        "_hyperparameters.py", "part_at(step).update", "part_at(step + 1).update"
    ),
    "schedule frozen": Mutant(
        "_hyperparameters.py", "optax.safe_increment(step), part", "step, part"
    ),
    "norm per leaf": Mutant(
        "_ascent.py",
        "return _tree.to_unit(updates, sphere), state",
        "return jax.tree.map(_tree.unit, updates), state",
    ),
    "no rescue of tiny and huge norms": Mutant(
        "_tree.py",
        "(plain >= 1 / reach) & (plain <= reach)",
        "(plain == plain)",
    ),
    "large norms rescued like small ones": Mutant(
        "_tree.py",
        "jnp.where(plain > reach, 1 / reach, jnp.asarray(reach, plain.dtype))",
        "jnp.asarray(reach, plain.dtype)",
        first="ends",
    ),
    "a direction for what is infinite": Mutant(
        "_tree.py",
        "Sphere(jnp.where(jnp.isfinite(square), shrink, jnp.nan), square)",
        "Sphere(shrink, square)",
        first="no_direction",
    ),
    "single precision beside double": Mutant(
        "_tree.py",
        "_of_one_width(jax.tree.leaves(at_least_float32(tree)))",
        "jax.tree.leaves(at_least_float32(tree))",
        first="beside_double",
    ),
    "zero beside double": Mutant(
        "_tree.py",
        "jnp.where(is_safe | (square == 0), 1, rescue)",
        "jnp.where(is_safe, 1, rescue)",
        first="beside_double",
    ),
    "order of the norm ignored": Mutant("_ascent.py", "if p == 2:", "if True:"),
    "wrong root of the p-norm": Mutant(
        "_ascent.py", "root = total ** (1 / p)", "root = total ** (1 / q)"
    ),
    "T_w once": Mutant(
        "_ascent.py",
        "_vouching(rescale, normalize_by_global_norm(), rescale,",
        "_vouching(rescale, normalize_by_global_norm(),",
    ),
    "eta ignored": Mutant("_ascent.py", "+ jnp.asarray(eta, u.dtype)", "+ 0"),
    "adaptive mask inverted": Mutant(
        "_ascent.py",
        "by_magnitude(u, w) if adaptive else u",
        "u if adaptive else by_magnitude(u, w)",
        first="radius",
    ),
    "EMA weights swapped": Mutant(
        "_ascent.py",
        "_advance(state, innovation, 1 - decay, as_released)",
        "_advance(state, innovation, decay, as_released)",
    ),
    "sigma ignored": Mutant(
        "_ascent.py", "_tree.cosine(subtracted, g) if sigma is None else sigma", "1.0"
    ),
    "released F-SAM subtracts the new average": Mutant(
        "_ascent.py", "weight if as_released else weight * decay", "weight * decay"
    ),
    "released F-SAM starts its average at zero": Mutant(
        "_ascent.py", "step = jnp.where(state.ema_started, step, 1)", "pass"
    ),
    "ascent stands still while the cadence skips": Mutant(
        "_core.py",
        "        d, descent_state = step.d, step.descent_state\n",
        "        d, descent_state = step.d, step.descent_state\n"
        "        ascent_state = jax.tree.map(\n"
        "            lambda n, o: jnp.where(decision, n, o), ascent_state, state.ascent_state\n"
        "        )\n",
    ),
    "descent stands still while the cadence skips": Mutant(
        "_core.py",
        "return _Step(d, descend_from_equal()[1], measured), cadence_state",
        "return _Step(d, state.descent_state, measured), cadence_state",
    ),
    "period off by one": Mutant(
        "_cadence.py", "step % k == 0,", "step % (k + 1) == 0,"
    ),
    "cadence starts a step late": Mutant(
        "_cadence.py", "step % k == 0,", "step % k == k - 1,"
    ),
    "cadence forgets": Mutant(
        "_core.py",
        "return step, cadence.remember(step.d, plain, cadence_state)",
        "return step, cadence_state",
    ),
    "ascend= ignored": Mutant(
        "_core.py",
        "decision if ascend is None else ascend",
        "decision",
        first="ascend",
    ),
    "no guard": Mutant(
        "_core.py",
        "finite = verdicts[0] if verdicts else _tree.all_finite(g)",
        "finite = jnp.bool_(True)",
        first="non_finite",
    ),
    "an ascent that vouches for everything": Mutant(
        "_ascent.py",
        "vouch(jnp.isfinite(sphere.square))",
        "vouch(jnp.bool_(True))",
        first="non_finite",
    ),
    "a masked ascent vouches for all of g": Mutant(
        "_ascent.py",
        "    return optax.GradientTransformationExtraArgs(init_fn, update_fn)\n\n\n"
        "def _on_masked",
        "    return VouchingAscent(init_fn, update_fn)\n\n\ndef _on_masked",
        first="outside_the_mask",
    ),
    "overflow hidden by a rectifier": Mutant(
        "_core.py",
        "d = _tree.scale(jnp.where(~finite & decision, jnp.nan, 1), d)",
        "pass",
        first="rectifier",
    ),
    "a gradient nobody used spoils a step": Mutant(
        "_core.py",
        "jnp.where(~finite & decision, jnp.nan, 1)",
        "jnp.where(~finite, jnp.nan, 1)",
        first="bad_batch",
    ),
    "a gap that is not finite is kept and not seen": Mutant(
        "_wsam.py",
        "return _tree.add_scaled(ascent_gradient, 0, gap), gap",
        "return ascent_gradient, gap",
        first="decoupled",
    ),
    "the last gap is descended on again": Mutant(
        "_wsam.py",
        "jnp.where(finite, x, 0)",
        "x",
        first="decoupled",
    ),
    "rounding draws what another part draws": Mutant(
        "_perturb.py",
        "    key = jax.random.fold_in(key, _OF_ROUNDING)\n",
        "",
        first="rounding_with_the_key",
    ),
    "points on the way rounded to nearest": Mutant(
        "_core.py",
        "perturb=lambda params, e: perturb(params, e, group),",
        "",
        first="on_the_way",
    ),
    "norms by columns": Mutant(
        "_tree.py", "@jax.jit\ndef _square", "def _square", first="by_rows"
    ),
    "inner products by columns": Mutant(
        "_tree.py", "@jax.jit\ndef _overlap", "def _overlap", first="by_rows"
    ),
    "guard stops counters": Mutant(
        "_guard.py",
        "if _is_value(n) else n,",
        "if True else n,",
        first="non_finite",
    ),
    "groups share the mean gradient": Mutant(
        "_core.py",
        "ascend_from(group_gradient, evaluate, group)",
        "ascend_from(g, evaluate, group)",
        first="per_group",
    ),
    "carried state from a group": Mutant(
        "_core.py",
        "perturbation, _ = ascend_from(group_gradient",
        "nonlocal ascent_state\n"
        "            perturbation, ascent_state = ascend_from(group_gradient",
        first="per_group",
    ),
    "mask inverted": Mutant(
        "_ascent.py",
        "lambda keep, e, zero: e if keep",
        "lambda keep, e, zero: e if not keep",
        first="mask",
    ),
    "perturbation in half precision": Mutant(
        "_perturb.py",
        "    w, e = _tree.at_least_float32((w, e))\n",
        "    e = e.astype(w.dtype)\n",
        first="narrow or mixed or rounding",
    ),
    "norm in half precision": Mutant(
        "_tree.py",
        "return jnp.asarray(leaf, widest(dtype, jnp.dtype(jnp.float32)))",
        "return leaf",
        first="float16 or mixed",
    ),
    "stochastic rounding is biased": Mutant(
        "_perturb.py",
        "* jnp.abs(gap) <",
        "* jnp.abs(gap) * 2 <",
        first="rounding",
    ),
    "rounding key stands still": Mutant(
        "_core.py",
        "else keys.next(state.rounding_key)[1]",
        "else state.rounding_key",
        first="rounding",
    ),
    "carrier unpacked in any trace": Mutant(
        "_carrier.py",
        "if became_argument or not any(",
        "if False and not any(",
        first="carrier",
    ),
    "report swaps its norms": Mutant(
        "_core.py",
        "ascent_norm=_tree.norm(g)",
        "ascent_norm=measured.descent_norm",
        first="report",
    ),
    "GSAM schedule upside down": Mutant(
        "_hyperparameters.py",
        "rho_min + (rho_max",
        "rho_max - (rho_max",
        first="learning_rate",
    ),
    # --- The defining term of every further method.
    "GSAM: sign of alpha": Mutant(
        "_descent.py",
        "_tree.add_scaled(kept, alpha,",
        "_tree.add_scaled(kept, -alpha,",
        first="gsam",
    ),
    "GSAM: projection's arguments swapped": Mutant(
        "_tree.py",
        "projection(subtract(x, y), direction)",
        "projection(direction, subtract(x, y))",
        first="gsam",
    ),
    "GSAM: the two minimized losses swapped": Mutant(
        "_descent.py",
        'ga if minimize == "perturbed_loss" else g',
        'g if minimize == "perturbed_loss" else ga',
        first="gsam",
    ),
    "StableSAM: factor inverted": Mutant(
        "_descent.py",
        "factor = length / jnp.where(is_zero, 1, reach)",
        "factor = reach / length",
        first="stable",
    ),
    "StableSAM: bounds ignored": Mutant(
        "_descent.py", "jnp.clip(factor, minimum, maximum)", "factor", first="bounds"
    ),
    "StableASAM as released: weights of w twice": Mutant(
        "_descent.py",
        "_tree.add_scaled(perturbation, 1, params)",
        "params",
        first="stable",
    ),
    "WSAM: weight": Mutant(
        "_descent.py", "blend(gamma / (1 - gamma))", "blend(gamma)", first="wsam"
    ),
    "decoupled WSAM: sign": Mutant(
        "_wsam.py", "-weight, gap)", "weight, gap)", first="wsam"
    ),
    "decoupled WSAM: coupled": Mutant(
        "_wsam.py",
        "return _tree.add_scaled(ascent_gradient, 0, gap), gap",
        "return updates, gap",
        first="wsam",
    ),
    "gap penalty: weight": Mutant(
        "_descent.py", "blend(1 + lam)", "blend(lam)", first="gap"
    ),
    "Fisher SAM: inverse": Mutant(
        "_ascent.py", "return u / jnp.hypot(", "return u * jnp.hypot(", first="fisher"
    ),
    "VaSSO: theta and 1 - theta swapped": Mutant(
        "_ascent.py",
        "_advance(state, innovation, theta, as",
        "_advance(state, innovation, 1 - theta, as",
        first="vasso",
    ),
    "F-SAM: cosine ignored": Mutant(
        "_ascent.py", "_tree.cosine(subtracted, g) if", "1.0 if", first="cosine"
    ),
    "SAM-full is SAM-noise": Mutant(
        "_ascent.py",
        "_project(_tree.projection, decay)",
        "_project(_tree.orthogonal, decay)",
        first="sam_full",
    ),
    "SAM-noise: given full gradient ignored": Mutant(
        "_ascent.py",
        "state.gradient_ema if full_gradient is None else full_gradient",
        "state.gradient_ema",
        first="sam_full",
    ),
    "SAM-noise: rounding becomes a direction": Mutant(
        "_ascent.py",
        "_tree.zero_if_rounding_of(g, component(g, known))",
        "component(g, known)",
        first="sam_noise",
    ),
    "ESAM: mask inverted": Mutant("_noise.py", "x < keep", "x >= keep", first="esam"),
    "ESAM: not divided by beta": Mutant(
        "_noise.py", "u / jnp.asarray(keep, u.dtype)", "u", first="esam"
    ),
    "noise: key stands still": Mutant(
        "_noise.py",
        "function(now, _tree.at_least_float32(updates)), NoiseState(later)",
        "function(now, _tree.at_least_float32(updates)), state",
        first="independent",
    ),
    "noise: groups share it": Mutant(
        "_random.py", "if group is not None:", "if False:", first="group"
    ),
    "noise: leaves share it": Mutant(
        "_tree.py",
        "jax.random.fold_in(key, index), leaf.shape",
        "key, leaf.shape",
        first="independent",
    ),
    "random SAM: variance": Mutant(
        "_noise.py",
        "scale = 1 / math.sqrt(max(_tree.size(updates), 1))",
        "scale = 1 / max(_tree.size(updates), 1)",
        first="random",
    ),
    "R-SAM: gradient at w": Mutant(
        "_noise.py",
        "grad_fn(perturb(params, noise))",
        "grad_fn(params)",
        first="rsam",
    ),
    "multi-step: gradient at w": Mutant(
        "_noise.py",
        "grad_fn(perturb(params, perturbation))",
        "grad_fn(params)",
        first="multi_step",
    ),
    "SSAM: mask inverted": Mutant(
        "_sparse.py",
        "jnp.where(keep, u, 0 * u)",
        "jnp.where(keep, 0 * u, u)",
        first="ssam",
    ),
    "SSAM-F: smallest in place of largest": Mutant(
        "_sparse.py",
        "_keep_largest(magnitudes, kept)\n",
        "_keep_largest(jax.tree.map(lambda x: 1 / x, magnitudes), kept)\n",
        first="ssam",
    ),
    "SSAM-D: drops the largest": Mutant(
        "_sparse.py",
        "_keep_largest(magnitudes, kept - exchanged, among=mask)",
        "_keep_largest(\n"
        "            jax.tree.map(lambda x: 1 / x, magnitudes), kept - exchanged, among=mask\n"
        "        )",
        first="ssam",
    ),
    "SSAM: never refreshed": Mutant(
        "_sparse.py", "step % every == 0", "step < 0", first="ssam"
    ),
    "LookSAM: kept direction never refreshed": Mutant(
        "_cadence.py",
        "state._replace(kept_direction=each(direction_of, d, g))",
        "state",
        first="look_sam",
    ),
    "LookSAM: rounding becomes a direction": Mutant(
        "_tree.py",
        "jnp.where(is_rounding, 0, 1)",
        "1",
        first="look_sam",
    ),
    "LookSAM: alpha ignored": Mutant(
        "_cadence.py", "weight * _tree.norm(g)", "_tree.norm(g)", first="look_sam"
    ),
    "LookSAM: per tensor always": Mutant(
        "_cadence.py",
        "if per_tensor else function(*trees)",
        "if True else function(*trees)",
        first="splitting",
    ),
    "RST: probability inverted": Mutant(
        "_cadence.py",
        "jax.random.bernoulli(now, value_at(probability, step))",
        "~jax.random.bernoulli(now, value_at(probability, step))",
        first="rst",
    ),
    "RST: key stands still": Mutant(
        "_cadence.py",
        "AtRandomState(optax.safe_increment(step), later)",
        "AtRandomState(optax.safe_increment(step), key_data)",
        first="rst",
    ),
    "AE-SAM: condition inverted": Mutant(
        "_cadence.py", "steep = square >= mean", "steep = square < mean", first="ae_sam"
    ),
    "AE-SAM: variance dropped": Mutant(
        "_cadence.py",
        "+ value_at(threshold, step) * jnp.sqrt(variance)",
        "",
        first="ae_sam",
    ),
    "extra arguments dropped": Mutant(
        "_value_and_grad.py",
        "return {**extra_args, **for_update}",
        "return for_update",
        first="full_gradient or trajectory",
    ),
    "a skipped step descends on the sub-batch": Mutant(
        "_core.py",
        "evaluate.descent(params).gradient if evaluate.recompute else g",
        "g",
        first="does_not_ascend",
    ),
    "sub-batch for both gradients": Mutant(
        "_data.py",
        "Choice(part.gradient(params), part, lambda point: batch, recompute=True)",
        "Choice(part.gradient(params), part, lambda point: part, recompute=True)",
        first="sub_batch",
    ),
    "another batch for both gradients": Mutant(
        "_data.py",
        "            lambda point: batch,\n            recompute=True,",
        "            lambda point: batch.replace(others),\n            recompute=True,",
        first="another_batch",
    ),
    "ESAM selects the smallest increase": Mutant(
        "_data.py",
        "batch.take(_largest(rise",
        "batch.take(_largest(-rise",
        first="esam",
    ),
    "ESAM selects by the loss": Mutant(
        "_data.py", ".losses - before", ".losses", first="esam"
    ),
    "ESAM as released takes the cut": Mutant(
        "_data.py",
        "count = batch.size if gamma >= 0.99 else count - 1",
        "pass",
        first="esam",
    ),
    "K-SAM's second gradient on the batch": Mutant(
        "_data.py",
        "Choice(seen, chosen, lambda point: chosen)",
        "Choice(seen, chosen, lambda point: batch)",
        first="k_sam",
    ),
    "K-SAM's first gradient on the batch": Mutant(
        "_data.py",
        "Choice(seen, chosen, lambda point: chosen)",
        "Choice(seen, batch, lambda point: chosen)",
        first="k_sam",
    ),
    "the gap against another batch's loss": Mutant(
        "_groups.py",
        "seen if seen.batch is chosen else chosen.forward(params)",
        "seen",
        first="reported_gap",
    ),
    "no mean of the gradient over the axis": Mutant(
        "_groups.py",
        "gradient=axis.mean(here.gradient),",
        "gradient=here.gradient,",
        first="every_setting or two_devices",
    ),
    "the mean of the gradient a sum": Mutant(
        "_groups.py",
        "gradient=axis.mean(here.gradient),",
        "gradient=jax.lax.psum(here.gradient, axis.names),",
        first="every_setting or two_devices",
    ),
    "no mean of the second gradient": Mutant(
        "_groups.py",
        "grad_fn=averaged(axis.mean),",
        "grad_fn=own,",
        first="every_setting",
    ),
    "the mean of the second gradient a sum": Mutant(
        "_groups.py",
        "grad_fn=averaged(axis.mean),",
        "grad_fn=averaged(lambda tree: jax.lax.psum(tree, axis.names)),",
        first="every_setting",
    ),
    "no mean over the groups of devices": Mutant(
        "_groups.py",
        "return axis.mean(follow(shared_g, averaged(axis.shared_mean), 0))",
        "return follow(shared_g, averaged(axis.shared_mean), 0)",
        first="every_setting",
    ),
    "the mean over the groups of devices a sum": Mutant(
        "_groups.py",
        "return axis.mean(follow(shared_g, averaged(axis.shared_mean), 0))",
        "return jax.tree.map(\n"
        "            lambda x: jax.lax.psum(x, axis.names),\n"
        "            follow(shared_g, averaged(axis.shared_mean), 0),\n"
        "        )",
        first="every_setting",
    ),
    "no mean over devices with groups of examples": Mutant(
        "_groups.py",
        "return axis.mean(here.per_group(follow))",
        "return here.per_group(follow)",
        first="on_each_of_several",
    ),
    "no mean of the loss over the axis": Mutant(
        "_groups.py",
        "loss=axis.mean(here.loss),",
        "loss=here.loss,",
        first="loss_is_averaged",
    ),
    "devices that share have gradients of their own": Mutant(
        "_groups.py",
        "shared_g = axis.shared_mean(here.gradient)",
        "shared_g = here.gradient",
        first="may_share",
    ),
    "devices that share have second gradients of their own": Mutant(
        "_groups.py",
        "averaged(axis.shared_mean)",
        "own",
        first="may_share",
    ),
    "gradients arrive summed under check_vma": Mutant(
        "_groups.py",
        "own = self.axis.vary(params)",
        "own = params",
        first="every_setting",
    ),
    "second gradients arrive summed under check_vma": Mutant(
        "_groups.py",
        "lambda point: evaluate(axis.vary(point)))",
        "lambda point: evaluate(point))",
        first="every_setting",
    ),
    "one perturbation where each device has its own": Mutant(
        "_groups.py",
        "shared = names if sync_perturbation else ()",
        "shared = names",
        first="every_setting",
    ),
    "all groups have one number": Mutant(
        "_groups.py",
        "return path(g, one.grad_fn, index), None",
        "return path(g, one.grad_fn, 0 * index), None",
        first="own_noise",
    ),
    "all devices have one number": Mutant(
        "_groups.py",
        "axis.group() * here.groups + index",
        "index",
        first="agree_between",
    ),
    "a group's number ignores the device": Mutant(
        "_groups.py",
        "axis.group() * here.groups + index",
        "axis.group() + index",
        first="on_each_of_several or agree_between or each_device",
    ),
    "a sum over groups one after another": Mutant(
        "_groups.py", "x / self.count if", "x if", first="however_they_run"
    ),
    "g of the first groups alone": Mutant(
        "_groups.py",
        "return _tree.mean_of_groups(averaged), each",
        "return jax.tree.map(lambda x: x[0], averaged), each",
        first="nan_in_one or second_door",
    ),
    "groups summed in half precision": Mutant(
        "_groups.py",
        "start = self.vary(_tree.at_least_float32(zeros))",
        "start = self.vary(zeros)",
        first="half_precision",
    ),
    "further ascent steps on the descent's examples": Mutant(
        "_groups.py",
        "ascent=lambda point: evaluate(ascent, point)",
        "ascent=lambda point: evaluate(descent(point), point)",
        first="further_ascent",
    ),
    "LookSAM keeps what lies across the ascent's gradient": Mutant(
        "_core.py",
        "cadence.remember(step.d, plain, cadence_state)",
        "cadence.remember(step.d, g, cadence_state)",
        first="look_sam_keeps",
    ),
    "a skipped step descends on one group": Mutant(
        "_groups.py",
        "return groups.run(lambda e: (choose(look(e))(point), None), examples)[0]",
        "return choose(look_at(batch.take(slice(0, m)), params, rule))(point)",
        first="groups_that_skips",
    ),
    "sparse masks keep one more": Mutant(
        "_sparse.py",
        "before(position)) <= room",
        "before(position)) <= room + 1",
        first="found_by_counting",
    ),
    "SAF compares with the last visit": Mutant(
        "_trajectory_loss.py",
        "state.past_outputs[index, visits % lag]",
        "state.past_outputs[index, (visits - 1) % lag]",
        first="saf",
    ),
    "SAF compares with what was never seen": Mutant(
        "_trajectory_loss.py", "visits >= lag", "visits >= 0", first="saf"
    ),
    "KL the other way round": Mutant(
        "_trajectory_loss.py",
        "jnp.exp(target) * difference",
        "-jnp.exp(predicted) * difference",
        first="saf or mesa",
    ),
    "no factor of the temperature": Mutant(
        "_trajectory_loss.py", "** 2 * kl", "** 0 * kl", first="saf or mesa"
    ),
    "a term without an end": Mutant(
        "_trajectory_loss.py", "counts &= step < stop", "pass", first="start_until_stop"
    ),
    "MESA's decay inverted": Mutant(
        "_trajectory_loss.py", "1 - value_at(decay", "value_at(decay", first="mesa"
    ),
    "the average is never updated": Mutant(
        "_trajectory_loss.py",
        "params, state.average, 1 -",
        "state.average, state.average, 1 -",
        first="mesa",
    ),
    # --- Measures of sharpness.
    "sharpness: descends": Mutant(
        "sharpness/_ball.py",
        "_tree.scale(self.rho, _tree.unit(gradient))",
        "_tree.scale(-self.rho, _tree.unit(gradient))",
        first="surrogate_gap",
    ),
    "sharpness: never projects": Mutant(
        "sharpness/_ball.py",
        "return ball.project(delta), best",
        "return delta, best",
        first="brute_force",
    ),
    "sharpness: cube is no cube": Mutant(
        "sharpness/_ball.py",
        "jnp.clip(d, -rho, rho)",
        "jnp.minimum(d, rho)",
        first="brute_force",
    ),
    "sharpness: last point not looked at": Mutant(
        "sharpness/_ball.py",
        "return keep_higher(best, at(delta, mean_loss), delta)",
        "return best",
        first="brute_force or minimum or m_sharpness",
    ),
    "sharpness: last point wins": Mutant(
        "sharpness/_ball.py",
        "is_higher = loss > best[0]",
        "is_higher = loss == loss",
        first="brute_force",
    ),
    "sharpness: restarts all at w": Mutant(
        "sharpness/_ball.py",
        "jnp.where(index == 0, 0, 1)",
        "jnp.where(index == 0, 0, 0)",
        first="restarts",
    ),
    "sharpness: gradient not stretched": Mutant(
        "sharpness/_ball.py",
        "        gradient = self.stretch(gradient)\n",
        "",
        first="brute_force or surrogate_gap",
    ),
    "sharpness: biased deviation": Mutant(
        "sharpness/_estimate.py", "values.std(ddof=1) / jnp.sqrt(count)", "values.std()"
    ),
    "sharpness: last batch counts as a whole one": Mutant(
        "sharpness/_batches.py",
        "(size - whole * batch) / size, last)",
        "batch / size, last)",
        first="products",
    ),
    "sharpness: batches overlap": Mutant(
        "sharpness/_batches.py",
        "x, index * batch, batch)",
        "x, index, batch)",
        first="products",
    ),
    "sharpness: consecutive batches of spread examples": Mutant(
        "sharpness/_batches.py",
        "x.reshape(batch, count, *x.shape[1:])",
        "x.reshape(count, batch, *x.shape[1:]).swapaxes(0, 1)",
        first="stay_on",
    ),
    "sharpness: groups of every n-th example": Mutant(
        "sharpness/_batches.py",
        "return x.reshape(x.shape[0] // m, m, *x.shape[1:])",
        "return x.reshape(m, x.shape[0] // m, *x.shape[1:]).swapaxes(0, 1)",
        first="m_sharpness",
    ),
    "sharpness: streamed shapes not checked": Mutant(
        "sharpness/_batches.py",
        "if _outline(batch) != expected:",
        "if False:",
        first="alike",
    ),
    "sharpness: params left in half precision": Mutant(
        "sharpness/_checks.py",
        "return _tree.at_least_float32(jax.tree.map(jnp.asarray, params))",
        "return jax.tree.map(jnp.asarray, params)",
        first="half",
    ),
    "sharpness: no curvature of the loss": Mutant(
        "sharpness/_matrices.py",
        "jax.jvp(gradient, (outputs,), (forwards(vector),))[1]",
        "forwards(vector)",
        first="products",
    ),
    "sharpness: Fisher not a mean": Mutant(
        "sharpness/_matrices.py",
        "forwards(vector) / len(values)",
        "forwards(vector)",
        first="products",
    ),
    "sharpness: Lanczos divides by zero": Mutant(
        "sharpness/_spectrum.py",
        "return product + jnp.finfo(v.dtype).eps * size * noise",
        "return product",
        first="divide_by_zero",
    ),
    "sharpness: Lanczos at another scale": Mutant(
        "sharpness/_spectrum.py",
        "return tridiagonal.scale * nodes, vectors[0] ** 2",
        "return nodes, vectors[0] ** 2",
        first="moments",
    ),
    "sharpness: weights of the last row": Mutant(
        "sharpness/_spectrum.py",
        "nodes, vectors[0] ** 2",
        "nodes, vectors[-1] ** 2",
        first="moments",
    ),
    "sharpness: smallest for largest": Mutant(
        "sharpness/_spectrum.py",
        'if which == "smallest" else',
        'if which != "smallest" else',
        first="eigenpairs",
    ),
    "sharpness: residuals of the first vector": Mutant(
        "sharpness/_spectrum.py",
        "jnp.abs(coefficients[-1])",
        "jnp.abs(coefficients[0])",
        first="residuals",
    ),
    "sharpness: plane transposed": Mutant(
        "sharpness/_landscape.py",
        "jnp.stack(jnp.meshgrid(xs, ys), axis=-1)",
        'jnp.stack(jnp.meshgrid(xs, ys, indexing="ij"), axis=-1)',
        first="planes",
    ),
    "sharpness: filters along the first axis": Mutant(
        "sharpness/_landscape.py",
        "np.delete(range(weights.ndim), filter_axis)",
        "np.delete(range(weights.ndim), 0)",
        first="directions",
    ),
    "recorder: steps counted by reports": Mutant(
        "_recorder.py",
        "self._next_step = first + len(steps)",
        "self._next_step = first + 1",
        first="recorder",
    ),
}


def survives(mutant: Mutant) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        for name in ("sam_optax", "tests", "benchmarks"):
            shutil.copytree(ROOT / name, copy / name)
        shutil.copy(ROOT / "pyproject.toml", copy)
        target = copy / "sam_optax" / mutant.file
        source = target.read_text()
        if source.count(mutant.old) != 1:
            raise SystemExit(f"{mutant.file} has {mutant.old!r} not exactly once")
        target.write_text(source.replace(mutant.old, mutant.new))
        measures = ["test_sharpness.py", "test_plot.py"]
        files = [
            "test_closed_forms.py",
            "test_random.py",
            "test_tree.py",
            "test_properties.py",
            "test_golden.py",
            "test_bad_input.py",
            "test_data_rules.py",
            "test_devices.py",
            "test_trajectory_loss.py",
            "test_contracts.py",
        ]
        if mutant.file.startswith(("sharpness/", "_recorder")):
            files = measures
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += [f"tests/{file}" for file in files]
        environment = {"PYTHONPATH": folder, "PATH": "", "JAX_PLATFORMS": "cpu"}
        for selection in [["-k", mutant.first]] * bool(mutant.first) + [[]]:
            result = subprocess.run(
                command + selection,
                cwd=copy,
                env=environment,
                capture_output=True,
                text=True,
            )
            lines = result.stdout.splitlines()
            failed = [x for x in lines if x.startswith(("FAILED", "ERROR"))]
            if failed:
                print("    by", failed[0].split(" - ")[0])
                return False
            if "Fatal Python error" in result.stderr:  # devices waited for each other
                print("    by a deadlock")
                return False
            if result.returncode:
                print(result.stdout[-2000:], result.stderr[-2000:])
                raise SystemExit("the tests did not run")
        return True


def main(names: list[str]) -> int:
    survivors = 0
    for name in names or MUTANTS:
        print(name, flush=True)
        if survives(MUTANTS[name]):
            survivors += 1
            print("    SURVIVED", flush=True)
    print(f"{survivors} of {len(names or MUTANTS)} mutants survived")
    return survivors


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
