"""Ascents: they turn the gradient g into the perturbation ε.

An ascent is an ordinary Optax transformation: its update receives g, and returns ε. You
build one from parts with `ascents.chain`; in a chain, each part receives the output of
the part before. (`optax.chain` does as well, but it refuses parts that follow d, as
`msam` does, and forgets that an ascent makes no use of g, so that the guard has g
computed.) All parts of this module return at least float32, so that no digits of ε are
lost before w + ε is rounded to the dtype of w.

Besides g and the parameters, the update of an ascent receives these extra arguments:

- ascent_gradient: g itself, for parts that come later in a chain.
- grad_fn: parameters -> the gradient of the loss there, for ascents that take further
  gradients.
- value_and_grad_fn: parameters -> (loss, gradient), for ascents that also need losses.
- descent_grad_fn: like grad_fn, on the loss and the examples that the step descends on;
  the same function as grad_fn, if these are no others.
- perturb: (params, ε) -> w + ε, rounded as the step rounds it. An ascent takes a
  further gradient by `grad_fn(perturb(params, shift))`.
- group: the index of the group of examples whose perturbation is computed, or None.
  Parts that draw random numbers fold it into their key.
- the extra arguments of the step, such as `full_gradient=`.

The update runs on every step, including those that take no second gradient.

An ascent that learns from the direction d of each step is made by `following`. A part
that reads `ascent_gradient`, behind one that drops g, is made known by
`reading_gradient`.
"""

from sam_optax._parts import chain, following, reading_gradient
from sam_optax.methods._asam import asam_ascent as asam
from sam_optax.methods._asam import scale_by_magnitude
from sam_optax.methods._by_layer import (
    by_label,
    normalize_by_leaf_norm,
    scale_by_fans,
    scale_by_leaf_norm,
)
from sam_optax.methods._eigen_sam import eigen_sam_ascent as eigen_sam
from sam_optax.methods._eigen_sam import lean_to_eigenvector
from sam_optax.methods._esam import mask_at_random, mask_leaves_at_random
from sam_optax.methods._fisher_sam import fisher_sam_ascent as fisher_sam
from sam_optax.methods._fisher_sam import scale_by_inverse_root_fisher
from sam_optax.methods._friendly import fasam_ascent as fasam
from sam_optax.methods._friendly import fsam_ascent as fsam
from sam_optax.methods._friendly import subtract_ema
from sam_optax.methods._functional_sam import divide_by_root_of
from sam_optax.methods._le_sam import le_sam_ascent as le_sam
from sam_optax.methods._lpf_sgd import replace_by_filter_noise
from sam_optax.methods._msam import against_momentum, given_direction
from sam_optax.methods._msam import msam_ascent as msam
from sam_optax.methods._multi_step_sam import ascend_repeatedly
from sam_optax.methods._random_sam import ascend_from_noise, replace_by_noise
from sam_optax.methods._sagm import sagm_ascent as sagm
from sam_optax.methods._sam import normalize_by_global_norm, scale_by_rho
from sam_optax.methods._sam import sam_ascent as sam
from sam_optax.methods._sam_full import (
    project_on_full_gradient,
    subtract_projection_on_full_gradient,
)
from sam_optax.methods._sam_full import sam_full_ascent as sam_full
from sam_optax.methods._sam_full import sam_noise_ascent as sam_noise
from sam_optax.methods._sam_on import layerwise_sam_ascent as layerwise_sam
from sam_optax.methods._ssam import (
    drop_and_grow,
    keep_largest_fisher,
    keep_largest_gradient,
    mean_squared_gradients,
)
from sam_optax.methods._state_dtype import with_state_dtype
from sam_optax.methods._unified_sam import monge_sam_ascent as monge_sam
from sam_optax.methods._unified_sam import normalize_partly, shorten_by_slope
from sam_optax.methods._unified_sam import unified_sam_ascent as unified_sam
from sam_optax.methods._usam import usam_ascent as usam
from sam_optax.methods._vasso import follow_ema
from sam_optax.methods._vasso import vasso_ascent as vasso
from sam_optax.methods._zsharp import keep_large_z_scores
from sam_optax.methods._zsharp import zsharp_ascent as zsharp

__all__ = [
    "against_momentum",
    "asam",
    "ascend_from_noise",
    "ascend_repeatedly",
    "by_label",
    "chain",
    "divide_by_root_of",
    "drop_and_grow",
    "eigen_sam",
    "fasam",
    "fisher_sam",
    "follow_ema",
    "following",
    "fsam",
    "given_direction",
    "keep_large_z_scores",
    "keep_largest_fisher",
    "keep_largest_gradient",
    "layerwise_sam",
    "le_sam",
    "lean_to_eigenvector",
    "mask_at_random",
    "mask_leaves_at_random",
    "mean_squared_gradients",
    "monge_sam",
    "msam",
    "normalize_by_global_norm",
    "normalize_by_leaf_norm",
    "normalize_partly",
    "project_on_full_gradient",
    "reading_gradient",
    "replace_by_filter_noise",
    "replace_by_noise",
    "sagm",
    "sam",
    "sam_full",
    "sam_noise",
    "scale_by_fans",
    "scale_by_inverse_root_fisher",
    "scale_by_leaf_norm",
    "scale_by_magnitude",
    "scale_by_rho",
    "shorten_by_slope",
    "subtract_ema",
    "subtract_projection_on_full_gradient",
    "unified_sam",
    "usam",
    "vasso",
    "with_state_dtype",
    "zsharp",
]
